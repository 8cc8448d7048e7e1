"""What changes a model's passes and is in no tensor: hooks, forwards that were replaced, modules of a user's own.

Names are all that can be told of a function. Two that are called alike may add other numbers, so a run with any of
these passes for no other run: see `moewh.ingest.identity`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

_LIBRARIES = {"torch", "transformers", "transformers_modules", "accelerate", "peft"}
"""Whose code is known by the versions and the configuration."""
_HOOKS = {"_forward_pre_hooks": "pre-hook", "_forward_hooks": "hook"}
_FORWARDS = ("forward", "_old_forward", "_original_forward")
"""Attributes that hold a forward in place of the class's own; accelerate keeps what it replaces."""


def patches(model: nn.Module) -> tuple[str, ...]:
    """Return a line for each hook, replaced forward or foreign module of a model: `PATH: KIND NAME`, in order."""
    return tuple(f"{path or '(model)'}: {what}" for path, module in model.named_modules() for what in _patches(module))


def _patches(module: nn.Module) -> Iterator[str]:
    for attribute, what in _HOOKS.items():
        for hook in getattr(module, attribute).values():
            if _is_foreign(hook):
                yield f"{what} {_name(hook)}"
    for attribute in _FORWARDS:
        replaced = vars(module).get(attribute)
        if replaced is not None and _is_foreign(replaced):
            yield f"forward {_name(replaced)}"
    kind = type(module)
    if _root(kind.__module__) not in _LIBRARIES:
        yield f"module {kind.__module__}.{kind.__qualname__}"
    elif _is_foreign(kind.forward):
        yield f"forward of its class {_name(kind.forward)}"


def _is_foreign(function: Any) -> bool:
    """Tell whether any function that is run here is no library's: itself, what it wraps, what it is part of."""
    seen: set[int] = set()
    waiting = [function]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, functools.partial):
            waiting.append(one.func)
            continue
        inner = getattr(one, "__func__", one)
        scope = getattr(inner, "__globals__", None)  # a wrapper takes the name of what it wraps, but not these
        home = scope.get("__name__", "") if scope is not None else type(inner).__module__
        if _root(home) not in _LIBRARIES:
            return True
        waiting += [wrapped] if (wrapped := getattr(inner, "__wrapped__", None)) is not None else []
    return False


def _name(function: Any) -> str:
    function = function.func if isinstance(function, functools.partial) else function
    inner = getattr(function, "__func__", function)
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{named.__module__}.{named.__qualname__}"


def _root(name: str) -> str:
    return name.partition(".")[0]
