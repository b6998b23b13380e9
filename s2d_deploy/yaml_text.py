"""YAML text -> a plain document, safely: what JSON can say, and nothing else.

PyYAML's safe loader builds no objects, but still hangs on an alias bomb, keeps the last of two equal keys without a
word, and answers odd values with bare ValueErrors. Here the node graph is checked before anything is built from it.
What comes back holds dict, list, str, int, finite float, bool and None only, and no two places share a value.
"""

from __future__ import annotations

import math
from typing import Any

import yaml

from s2d_deploy.errors import RecipeError, message

# Far above any recipe (the embedded ones have below 100 nodes), far below what could be felt.
MAX_NODES = 20_000
MAX_DEPTH = 50


def read_yaml(text: str, origin: str) -> Any:
    """The document in `text`.

    Args:
        text: YAML; tags other than YAML's own are refused.
        origin: file or flag, for messages.

    Raises:
        RecipeError: not YAML, a key given twice, nested too deeply, more than `MAX_NODES` values once aliases are
            expanded, or a value that JSON cannot say (a date, binary data, NaN).
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        _check_nodes(node, origin)
        document = _construct(node)
    except yaml.YAMLError as error:
        raise RecipeError(message(f"{origin}: not YAML", found=" ".join(str(error).split())[:300])) from error
    except RecursionError:
        raise _too_deep(origin) from None
    except (ValueError, OverflowError, AttributeError, TypeError) as error:
        if isinstance(error, RecipeError):
            raise
        # PyYAML's constructors pass on what int(), float() and datetime() raise.
        raise RecipeError(
            message(f"{origin}: a value is not what its form promises", found=str(error), fix="quote it")
        ) from error
    return plain(document, origin)


def plain(value: Any, origin: str, path: str = "", depth: int = 0) -> Any:
    """A deep copy of `value` that JSON can express.

    Raises:
        RecipeError: it holds anything else; the message names the key.
    """
    where = f"{origin}: key {path!r}" if path else origin
    if depth > MAX_DEPTH:
        raise _too_deep(origin)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RecipeError(message(f"{where}: not a finite number", found=str(value), fix="give a finite number"))
        return value
    if isinstance(value, list | tuple):
        return [plain(v, origin, f"{path}.{i}" if path else str(i), depth + 1) for i, v in enumerate(value)]
    if isinstance(value, dict):
        copy = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise RecipeError(
                    message(f"{where}: a key is not text", found=repr(key)[:80], fix=f'write it as "{str(key)[:80]}"')
                )
            copy[key] = plain(item, origin, f"{path}.{key}" if path else key, depth + 1)
        return copy
    raise RecipeError(
        message(f"{where}: not a plain value", found=f"a {type(value).__name__}", fix="put it into quotes")
    )


def _construct(node: yaml.Node) -> Any:
    # A loader of its own for each document: PyYAML's constructors keep state when one fails.
    return yaml.SafeLoader("").construct_document(node)


def _check_nodes(root: yaml.Node, origin: str) -> None:
    """Refuse cycles, bombs, depth and doubled keys in time linear in the text, not in what aliases expand to."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise _too_deep(origin)
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise RecipeError(message(f"{origin}: line {node.start_mark.line + 1}: an alias contains itself"))
        open_nodes.add(id(node))
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, origin)
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        total = 1 + sum(size(child, depth + 1) for child in children)
        open_nodes.discard(id(node))
        sizes[id(node)] = total
        if total > MAX_NODES:
            raise RecipeError(
                message(
                    f"{origin}: too large to be a recipe",
                    expected=f"at most {MAX_NODES} values once aliases are expanded",
                    found=f"more, from line {node.start_mark.line + 1}",
                )
            )
        return total

    size(root, 0)


def _check_keys(node: yaml.MappingNode, origin: str) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.value in seen:
            raise RecipeError(
                message(
                    f"{origin}: line {key.start_mark.line + 1}: key {key.value!r} is given twice",
                    expected="each key once in a section",
                    fix="remove one of the two",
                )
            )
        seen.add(key.value)


def _too_deep(origin: str) -> RecipeError:
    return RecipeError(message(f"{origin}: nested too deeply to be a recipe", expected=f"at most {MAX_DEPTH} levels"))
