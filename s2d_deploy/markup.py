"""HTML and SVG by function call. Text is escaped unless it is `Markup`, so nothing can be forgotten.

tag("td", "a < b", class_="num")  ->  <td class="num">a &lt; b</td>
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

_VOID = frozenset({"br", "hr", "input", "meta"})
# C0 controls (but tab and newline), C1 controls, lone surrogates, non-characters: not text in HTML or in XML 1.0.
_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def plain(text: str) -> str:
    """`text` with what no document can hold replaced by U+FFFD."""
    return _NOT_TEXT.sub("\ufffd", text)


def escape(text: str) -> Markup:
    """`text` as markup; markup stays what it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(plain(text), quote=True))


def join(parts: Iterable[str | None], separator: str = "") -> Markup:
    """Parts, escaped where they are not markup; None is left out."""
    return Markup(escape(separator).join(escape(part) for part in parts if part is not None))


def tag(name: str, /, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """One element.

    Args:
        name: the element's name.
        children: text (escaped), markup (kept) or None (left out).
        attributes: ``class_`` is written ``class``; other underscores become hyphens. None and False leave
            an attribute out, True writes it bare; floats are rounded to 0.01 (SVG user units).
    """
    written = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        attribute = key.rstrip("_").replace("_", "-")
        written.append(attribute if value is True else f'{attribute}="{_attribute(value)}"')
    opening = Markup(f"<{' '.join(written)}>")
    return opening if name in _VOID else Markup(f"{opening}{join(children)}</{name}>")


def _attribute(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return escape(str(value))
