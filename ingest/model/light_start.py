"""The light start of a command that runs a model: what it does before it imports torch and transformers' model code.

Importing any model class makes transformers import torch's compiler and its distributed tensors, neither of which a
command uses. Threads that wait are told to sleep. All of it holds for the whole process, so a command does this; the
library does not.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

from moewh.warehouse.cpus import usable_cpus

_COMPILER = "torch._dynamo"
_MODEL_CODE = "transformers.modeling_utils"
_THREADS_GIVEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_WAITING_GIVEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def start_light() -> None:
    """Import torch and transformers' model code, and settle torch's threads.

    What the user sets in the environment wins. Raises UsageError as `usable_cpus` does.
    """
    if _MODEL_CODE not in sys.modules:
        if not any(name in os.environ for name in _WAITING_GIVEN):
            # Where cores are shared, threads that spin while they wait take the core of the one they wait for.
            os.environ["OMP_WAIT_POLICY"] = "passive"
        with _no_collection():
            _import_model_code()
    set_threads()


def set_threads() -> None:
    """Let torch use no more threads than this process may use CPUs, unless the environment says how many."""
    import torch

    if not any(name in os.environ for name in _THREADS_GIVEN):
        torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))


def _import_model_code() -> None:
    import torch
    from transformers.utils import is_torch_distributed_available

    if _COMPILER not in sys.modules and (spec := importlib.util.find_spec(_COMPILER)) is not None:
        sys.modules[_COMPILER] = _LazyCompiler(spec)
    available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        is_torch_distributed_available()  # transformers keeps the first answer
    finally:
        torch.distributed.is_available = available
    importlib.import_module(_MODEL_CODE)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Look for no garbage while importing: there is none, and looking takes an eighth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class _LazyCompiler(ModuleType):
    """Stands for torch's compiler until something asks for more than transformers does when it is imported.

    Until it is loaded nothing is compiled, so that its decorators only need to be remembered. Its submodules can be
    imported without it.
    """

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__path__ = spec, list(spec.submodule_search_locations or ())
        self._in_graph: list[Callable[..., Any]] = []

    def __getattr__(self, name: str) -> Any:
        """Load the compiler in this module's place for whatever else is asked for."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._loaded(), name)

    def assume_constant_result(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Mark a function as the compiler does."""
        function.__dict__["_dynamo_marked_constant"] = True
        return function

    def allow_in_graph(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Keep a function to tell the compiler of."""
        self._in_graph.append(function)
        return function

    def disable(self, fn: Callable[..., Any] | None = None, recursive: bool = True, **more: Any) -> Callable[..., Any]:
        """Return a function that the compiler, once it is loaded, leaves alone; without `fn`, the decorator."""
        if fn is None:
            return functools.partial(self.disable, recursive=recursive, **more)
        if not inspect.isroutine(fn):
            return cast(Callable[..., Any], self._loaded().disable(fn, recursive, **more))

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            compiler = sys.modules[_COMPILER]
            return (fn if compiler is self else compiler.disable(fn, recursive, **more))(*args, **kwargs)

        return call

    def _loaded(self) -> ModuleType:
        if sys.modules[_COMPILER] is self:
            del sys.modules[_COMPILER]
            compiler = importlib.import_module(_COMPILER)
            for name, part in vars(self).items():
                if isinstance(part, ModuleType):
                    setattr(compiler, name, part)  # a submodule that was imported before
            for function in self._in_graph:
                compiler.allow_in_graph(function)
        return sys.modules[_COMPILER]
