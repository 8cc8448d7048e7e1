"""Which scoring function a router's code calls, for where it cannot be measured.

That is: on the meta device, where nothing runs, and for a router that does not return its logits. Calls alone
count, so that comments and docstrings do not; of a code that calls several functions nothing is said.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

_FUNCTIONS = {
    **{"softmax": "softmax", "log_softmax": "softmax"},
    **{"sigmoid": "sigmoid", "logsigmoid": "sigmoid"},
    "sparsemixer": "sparsemixer",
}
"""What a call is named, and the function from logits to weights that it stands for."""
_TABLE = "ACT2FN"
"""What transformers calls its table of functions by name."""


def scoring_function(*modules: nn.Module | None) -> str | None:
    """The one function that the code of the first of the modules to call any calls; None if there are several."""
    for module in modules:
        if module is not None and (found := _called(type(module))):
            return found.pop() if len(found) == 1 else None
    return None


def _called(kind: type) -> set[str]:
    """The scoring functions that a class calls, or if none the nearest of the classes that it is made from."""
    for base in kind.__mro__:
        if base is nn.Module or base.__module__.startswith("torch."):
            break
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # made in a shell, or without its source
            continue
        if found := {_FUNCTIONS[name] for name in _names(tree) if name in _FUNCTIONS}:
            return found
    return set()


def _names(tree: ast.AST) -> Iterator[str]:
    """Names of the functions that code calls, and those it takes from transformers' table."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr=name)) | ast.Call(func=ast.Name(id=name)):
                yield name
            case ast.Subscript(value=ast.Name(id=table), slice=ast.Constant(value=str(name))) if table == _TABLE:
                yield name
