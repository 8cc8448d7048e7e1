"""Changes to a model's passes that no tensor holds: hooks, replaced forwards, and a user's own modules.

Only the name of a function can be recorded, and two functions with the same name may compute different things, so a run
with any of these never counts as the same as another: see `moewh.ingest.identity`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

_LIBRARIES = {"torch", "transformers", "transformers_modules", "accelerate", "peft"}
"""Packages whose code the recorded versions and the configuration identify."""
_HOOKS = {"_forward_pre_hooks": "pre-hook", "_forward_hooks": "hook"}
_FORWARDS = ("forward", "_old_forward", "_original_forward")
"""Attributes that hold a forward instead of the class's own; accelerate keeps the one it replaces."""


def patches(model: nn.Module) -> tuple[str, ...]:
    """Return a line per hook, replaced forward or foreign module of a model: `PATH: KIND NAME`, in order."""
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
    """Return whether a function, one that it wraps, or one that it is part of, comes from outside the libraries."""
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
        scope = getattr(inner, "__globals__", None)  # a wrapper copies the name of what it wraps, but not its globals
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
