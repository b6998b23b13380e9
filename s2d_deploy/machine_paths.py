"""Documents that leave this machine: absolute paths in their texts are cut down to their last part.

A path says who somebody is and how a disk is laid out, and helps nobody elsewhere. Relative paths stay; so do addresses
(``https://...``, ``rpc://...``). What is lost: where a file lay. Which file it was, digests say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A slash that begins a word: /a/b, ~/a, x:/a, file:///a, but not a/b, //host/a or 3/4.
_ABSOLUTE = re.compile(r"(?:file://|(?<![\w./~>-]))~?/(?!/)[^\s\"'<>|:;,()\[\]{}=]+")
_WINDOWS = re.compile(r"(?<!\w)[A-Za-z]:\\[^\s\"'<>|;,]+")


def without_paths(document: Any, root: Path | None = None) -> Any:
    """A copy of a JSON document whose texts hold no absolute path: ``<path>/name`` stands in its place.

    Args:
        document: anything that JSON can express; keys are treated like values.
        root: a folder that is known elsewhere as ``.``, such as the one where the commands were run.
    """
    if isinstance(document, str):
        return _text(document, root)
    if isinstance(document, Mapping):
        return {_text(str(k), root): without_paths(v, root) for k, v in document.items()}
    if isinstance(document, list | tuple):
        return [without_paths(item, root) for item in document]
    return document


def _text(text: str, root: Path | None) -> str:
    if "/" not in text and "\\" not in text:
        return text
    if root is not None and str(root) != "/":
        text = re.sub(rf"(?<![\w./:-]){re.escape(str(root))}(?=/|$|[\s\"',;)\]])", ".", text)
    text = _ABSOLUTE.sub(lambda m: _last(m[0], "/"), text)
    return _WINDOWS.sub(lambda m: _last(m[0], "\\"), text)


def _last(path: str, separator: str) -> str:
    name = path.rstrip(separator).rsplit(separator, 1)[-1]
    return f"<path>/{name}" if name and name != "~" else "<path>"
