"""Arguments of a traced operator, by the names that its schema gives them."""

from __future__ import annotations

from typing import Any

from torch import fx


def argument(node: fx.Node, name: str) -> Any:
    """Return an argument by its schema name, defaults included."""
    for position, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if parameter.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, parameter.default_value)
    return None


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set an argument by its schema name."""
    names = [parameter.name for parameter in node.target._schema.arguments]  # type: ignore[union-attr]
    if names.index(name) < len(node.args):
        node.update_arg(names.index(name), value)
    else:
        node.update_kwarg(name, value)
