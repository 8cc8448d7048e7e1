"""Find the scoring function that a router's code calls, where it cannot be measured.

That is on the meta device, where nothing runs, and for a router that does not return its logits. Only calls count, not
comments or docstrings; the result is None for code that calls several functions.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

_FUNCTIONS = {
    **{"softmax": "softmax", "log_softmax": "softmax"},
    **{"sigmoid": "sigmoid", "logsigmoid": "sigmoid"},
    "sparsemixer": "sparsemixer",
}
"""Names of calls, and the function from logits to weights that each computes."""
_TABLE = "ACT2FN"
"""transformers' names for its table of functions."""


def scoring_function(*modules: nn.Module | None) -> str | None:
    """Return the scoring function of the first module whose code calls any; None if it calls several."""
    kinds: list[Any] = [type(module) for module in modules if module is not None]
    for kind in kinds:
        if found := _called(kind):
            return next(iter(found)) if len(found) == 1 else None
    return None


@cache
def _called(kind: type) -> frozenset[str]:
    """Return the scoring functions that a class calls, else those of its nearest base class that calls any.

    Cached: finding a class in its module's source takes as long as building a small model, and every layer needs it.
    """
    for base in kind.__mro__:
        if base is nn.Module or base.__module__.startswith("torch."):
            break
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # defined in a shell, or without its source
            continue
        if found := frozenset(_FUNCTIONS[name] for name in _names(tree) if name in _FUNCTIONS):
            return found
    return frozenset()


def _names(tree: ast.AST) -> Iterator[str]:
    """Yield the names of the functions that code calls, and of those it takes from transformers' table."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr=name)) | ast.Call(func=ast.Name(id=name)):
                yield name
            case ast.Subscript(value=ast.Name(id=table), slice=ast.Constant(value=str(name))) if table == _TABLE:
                yield name
