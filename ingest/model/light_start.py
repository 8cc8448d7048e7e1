"""Light start-up of a command that runs a model, before it imports torch and transformers' model code.

Importing any model class makes transformers import torch's compiler and distributed tensors, and a command uses
neither. Both are loaded lazily instead, on first use. Packages for images and losses are not loaded at all. Waiting
threads sleep rather than spin. All of this affects the whole process, so only the command does it, not the library.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from moewh.warehouse.cpus import usable_cpus
from moewh.warehouse.errors import MoewhError, UsageError, lacking, short_message

_COMPILER = "torch._dynamo"
_MASKS = f"{_COMPILER}._trace_wrapped_higher_order_op"
_MODEL_CODE = "transformers.modeling_utils"
_UNUSED = {"PIL": "vision", "scipy": "scipy", "torchvision": "torchvision"}
"""Packages for images and losses that importing model code would import, and transformers' names for them."""
_THREADS_GIVEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_READ_ON_IMPORT = ("HF_", "HUGGINGFACE_", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "PYTORCH_", "USE_")
"""How the names of environment variables begin that torch, transformers and their packages read on import."""
_WAITING_GIVEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def start_light(*, other_code: bool) -> None:
    """Import torch and transformers' model code, and set torch's threads.

    With `other_code`, which comes with a model, nothing is left out that it might expect. The user's environment
    variables take precedence. Raises MoewhError if the packages cannot be imported, UsageError under `python -OO`, and
    as `usable_cpus` does.
    """
    if sys.flags.optimize > 1:
        raise UsageError("transformers reads docstrings, which `python -OO` removes. Unset PYTHONOPTIMIZE, or use -O.")
    if _MODEL_CODE not in sys.modules:
        sleep_while_waiting()
        with no_collection(), explaining_imports():
            _import_model_code(other_code=other_code)
    set_threads()


def sleep_while_waiting() -> None:
    """Make torch's threads sleep while they wait for each other; torch reads the environment when it is imported.

    By default they spin. On shared cores, that can take the core of the very thread they wait for.
    """
    if not any(name in os.environ for name in _WAITING_GIVEN):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def set_threads() -> None:
    """Limit torch's threads to the CPUs this process may use, unless the environment sets their number."""
    import torch

    if not any(name in os.environ for name in _THREADS_GIVEN):
        torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))


@contextmanager
def explaining_imports() -> Iterator[None]:
    """Turn whatever goes wrong while packages are imported into a one-line MoewhError, with the first cause."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while (before := cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)) is not None:
            cause = before
        reason = f"{type(cause).__name__}: {short_message(cause)}"
        raise MoewhError(f"torch and transformers cannot be imported: {reason}. {_remedy(cause)}") from error


def _remedy(cause: BaseException) -> str:
    """Return what to do about the first cause of a failed import."""
    if lack := lacking(cause):
        return f"This means that {lack}"
    if isinstance(cause, ModuleNotFoundError):
        return "Install that package."
    given = {name: value for name, value in os.environ.items() if name.startswith(_READ_ON_IMPORT) and value}
    if isinstance(cause, ValueError):
        for name, value in given.items():
            if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", str(cause)):
                return f"The environment has {name}={value}: correct or unset it."
    return "Install versions that fit together, or remove the package that is named here."


def _import_model_code(*, other_code: bool) -> None:
    import torch

    if not other_code:
        _hide_unused_packages()
    from transformers.utils.import_utils import is_torch_distributed_available

    if _COMPILER not in sys.modules and (spec := importlib.util.find_spec(_COMPILER)) is not None:
        _defer_compiler(spec)
    available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        is_torch_distributed_available()  # transformers keeps the first answer
    finally:
        torch.distributed.is_available = available
    importlib.import_module(_MODEL_CODE)
    for package in (torch.distributed, torch.fx.experimental, torch.utils):
        _import_on_access(package)


def _hide_unused_packages() -> None:
    """Make transformers treat the unused packages as not installed.

    They may take as long to import as torch does, and a torchvision built for another version of torch cannot be
    imported.
    """
    hidden = [name for name in _UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be found
    try:
        from transformers.utils import import_utils

        for name in hidden:
            getattr(import_utils, f"is_{_UNUSED[name]}_available")()  # transformers keeps the first answer
    finally:
        for name in hidden:
            del sys.modules[name]


def _import_on_access(package: ModuleType) -> None:
    """Import a submodule on first access, for code such as peft that expects `torch.distributed.tensor` imported."""
    before = vars(package).get("__getattr__")

    def find(name: str) -> Any:
        inner = f"{package.__name__}.{name}"
        if not name.startswith("__") and importlib.util.find_spec(inner) is not None:
            return importlib.import_module(inner)
        if before is not None:
            return before(name)
        raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")

    vars(package)["__getattr__"] = find


def _defer_compiler(spec: ModuleSpec) -> None:
    """Replace the compiler with a lazy module, and import without it the one submodule that building masks needs."""
    compiler = sys.modules[_COMPILER] = _LazyCompiler(spec)
    compiler.__path__ = list(spec.submodule_search_locations or ())
    if importlib.util.find_spec(_MASKS) is not None:
        importlib.import_module(_MASKS)
    del compiler.__path__


@contextmanager
def no_collection() -> Iterator[None]:
    """Disable garbage collection while importing: it would find nothing and take an eighth of the time.

    Python never examines the imported objects again, not even at exit, which would take a second of CPU time. Only with
    DuckDB among them does it do so at exit, because DuckDB reports objects that are not freed.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if "duckdb" in sys.modules:
            atexit.register(gc.unfreeze)


class _LazyCompiler(ModuleType):
    """A stand-in for torch's compiler that loads it when used for more than transformers needs during import.

    Until then nothing is compiled, so its decorators only need to be remembered.
    """

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__file__ = spec, spec.origin
        self._in_graph: list[Callable[..., Any]] = []

    def __getattr__(self, name: str) -> Any:
        """Load the compiler. Importing one of its submodules reads `__path__`."""
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        self._load()
        return getattr(self, name)

    def assume_constant_result(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Mark a function as the compiler does."""
        function.__dict__["_dynamo_marked_constant"] = True
        return function

    def allow_in_graph(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Remember a function to register with the compiler once it is loaded."""
        self._in_graph.append(function)
        return function

    def disable(self, fn: Callable[..., Any] | None = None, recursive: bool = True, **more: Any) -> Callable[..., Any]:
        """Mark a function so that the compiler, once loaded, skips it; without `fn`, return the decorator."""
        if fn is None:
            return functools.partial(self.disable, recursive=recursive, **more)
        if not inspect.isroutine(fn):
            self._load()
            return self.disable(fn, recursive, **more)

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            loaded = type(self) is not _LazyCompiler
            return (self.disable(fn, recursive, **more) if loaded else fn)(*args, **kwargs)

        return call

    def _load(self) -> None:
        """Become the compiler module, as importlib's own lazy modules do."""
        in_graph, spec = vars(self).pop("_in_graph"), self.__spec__
        assert spec is not None
        assert spec.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__path__ = list(spec.submodule_search_locations or ())
        spec.loader.exec_module(self)
        for function in in_graph:
            self.allow_in_graph(function)
