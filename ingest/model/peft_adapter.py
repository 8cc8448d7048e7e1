"""peft adapters: a folder or repository with adapter_config.json is a model, base and adapter together.

In: where a model comes from. Out: the base model, and that base with the adapter in it. Nothing is merged into the
weights: the recorded pass is the one that peft runs. An adapter that cannot be applied completely is refused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME
from transformers.utils.peft_utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    find_adapter_config_file,
)

from moewh.ingest.model.repository import Repository, hub_commit, looks_like_path, not_fetched
from moewh.warehouse.errors import MoewhError, short_message
from moewh.warehouse.files.folders import own_entries
from moewh.warehouse.files.manifest import file_sha256

_FAILURES = (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, EOFError)
_OLDEST_PEFT = (0, 21)
_NAME = "default"
"""peft's name for an unnamed adapter."""
SUPPORTED_TYPES = frozenset(
    {"ADALORA", "C3A", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "OFT", "RANDLORA"}
    | {"SHIRA", "TRAINABLE_TOKENS", "VERA"}
)
"""Types that change modules in place, so that the model's own forward is that of the adapted model."""
_UNSUPPORTED_SETTINGS = {
    "alora_invocation_tokens": "is active from certain tokens on (aLoRA)",
    "arrow_config": "is routed over several others (Arrow)",
    "layer_replication": "repeats layers of its base",
    "megatron_config": "is for Megatron's layers",
}
_NOT_SHAPING = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type")
BASE_MODEL_ONLY: dict[str, Any] = {"adapter_kwargs": {"subfolder": "no-adapter"}}
"""Makes transformers' from_pretrained look for an adapter where there is none, so that it loads the plain base."""
_TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter's files, and its base."""

    files: Repository
    title: str
    """As the user named it."""
    settings: dict[str, Any]
    """The content of adapter_config.json."""
    base: Repository
    """The base model."""

    @property
    def kind(self) -> str:
        """Its type, as peft names it."""
        return str(self.settings.get("peft_type"))

    @property
    def tokenizer(self) -> Repository:
        """Where its tokenizer is: with the adapter if it has one, else with the base."""
        return self.files if self.files.optional_file(_TOKENIZER_CONFIG) else self.base

    def sha256(self, base_weights: str | None) -> str:
        """Return a digest of the adapter's settings and weights, and of the base's weights or hub id and revision."""
        shaping = {name: value for name, value in self.settings.items() if name not in _NOT_SHAPING}
        base = base_weights or [self.base.location, self.base.revision]
        content = json.dumps([shaping, file_sha256(self._weights_file()), base], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def check(self, allow_pickle: bool) -> None:
        """Raise MoewhError unless peft is installed and can apply the adapter, and all its files are there."""
        if _peft_version() < _OLDEST_PEFT:
            raise MoewhError(
                f"{self.title} has an adapter ({ADAPTER_CONFIG_NAME}). Applying it needs peft "
                f"{'.'.join(map(str, _OLDEST_PEFT))} or newer. Install it: pip install 'moewh[peft]'."
            )
        if self.kind not in SUPPORTED_TYPES:
            known = ", ".join(sorted(SUPPORTED_TYPES))
            raise MoewhError(
                f"{self.title} is an adapter of type {self.kind}, which is not recorded: only {known} are."
            )
        for name, reason in _UNSUPPORTED_SETTINGS.items():
            if self.settings.get(name):
                raise MoewhError(f"{self.title}: an adapter that {reason} is not recorded ({name} is set).")
        if self._weights_file().suffix != ".safetensors" and not allow_pickle:
            raise MoewhError(
                f"{self.title} has no safetensors adapter, and pickled weights can run code of their own. Convert "
                "them, or give --allow-pickle if you trust them."
            )

    def apply(self, model: Any) -> Any:
        """Return the base model with the adapter in its modules. Raises MoewhError if not all of it fits."""
        from peft import PeftConfig, PeftModel

        folder = str(self._weights_file().parent)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the faults that peft warns about are refused below
                config = PeftConfig.from_pretrained(folder)
                config.inference_mode = True
                if hasattr(config, "lora_dropout"):
                    config.lora_dropout = 0.0  # unused in inference, and peft refuses it on fused experts
                adapted = PeftModel(model, config, _NAME)
                result = adapted.load_adapter(folder, _NAME, torch_device="cpu")
        except (*_FAILURES, UnpicklingError, SafetensorError) as error:
            if line := not_fetched(Path(folder)):
                raise MoewhError(f"{self.title}: {line}") from error
            raise MoewhError(f"{self.title}: the adapter does not fit its base: {_one_line(error)}.") from error
        for problem, names in (("lacks", result.missing_keys), ("holds, unused,", result.unexpected_keys)):
            if names:
                raise MoewhError(
                    f"{self.title}: the adapter does not fit its base: {ADAPTER_CONFIG_NAME} and the weights disagree. "
                    f"The file {problem} {', '.join(names[:3])}{' …' if len(names) > 3 else ''} ({len(names)} tensors)."
                )
        return adapted.get_base_model()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Turn an error in a pass of the adapted model into a MoewhError: peft also adapts modules it cannot run."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (*_FAILURES, MoewhError) as error:
            cause = error.__cause__ if isinstance(error, MoewhError) else error  # the pass may have wrapped it already
            if not isinstance(cause, _FAILURES):
                raise
            raise MoewhError(
                f"{self.title}: the model does not run with this adapter, which targets a module that peft cannot "
                f"adapt: {_one_line(cause)}."
            ) from cause

    def _weights_file(self) -> Path:
        for name in (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME):
            if path := self.files.optional_file(name):
                return path
        raise MoewhError(
            f"{self.title} has {ADAPTER_CONFIG_NAME} but no {ADAPTER_SAFE_WEIGHTS_NAME}: the adapter's weights are "
            f"missing. Complete it, or remove {ADAPTER_CONFIG_NAME} to record the base alone."
        )


def adapter_settings_file(files: Repository) -> Path | None:
    """Return the path of the file that marks a folder or repository as an adapter; None for an ordinary model."""
    if Path(files.location).is_file():
        return None
    file = find_adapter_config_file(files.location, revision=files.revision)
    return Path(file) if file else None


def find_adapter(files: Repository, title: str) -> PeftAdapter | None:
    """Return the adapter in a folder or repository; None if there is none.

    Raises MoewhError for an adapter_config.json that cannot be read or does not name a base.
    """
    file = adapter_settings_file(files)
    if file is None:
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MoewhError(f"{title}: {ADAPTER_CONFIG_NAME} is not valid JSON: {error}. Correct it.") from error
    if not isinstance(settings, dict):
        raise MoewhError(f"{title}: {ADAPTER_CONFIG_NAME} is not a JSON object. Correct it.")
    return PeftAdapter(files, title, settings, _find_base(files, title, settings))


def _find_base(files: Repository, title: str, settings: dict[str, Any]) -> Repository:
    """Return the model beside a local adapter, else the one that its settings name."""
    folder = Path(files.location)
    if (folder / CONFIG_NAME).is_file() and any(
        not path.name.startswith("adapter_")
        for pattern in ("*.safetensors", "*.bin")
        for path in own_entries(folder, pattern)
    ):
        return files
    named = settings.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise MoewhError(
            f"{title}: {ADAPTER_CONFIG_NAME} names no base model, and there is none beside it. "
            "Set base_model_name_or_path to its folder or hub id."
        )
    if Path(named).is_dir():
        base = Repository(str(Path(named).resolve()), None)
    elif looks_like_path(named):
        raise MoewhError(
            f"{title}: its base model {named} is not there. Put it there, or correct base_model_name_or_path in "
            f"{ADAPTER_CONFIG_NAME}."
        )
    else:
        revision = str(settings.get("revision") or "main")
        base = Repository(named, hub_commit(named, revision) or revision)
    if adapter_settings_file(base) is not None:
        raise MoewhError(
            f"{title}: its base model {named} has an adapter too. Only one is applied: merge the first into its base."
        )
    return base


def _peft_version() -> tuple[int, ...]:
    """Return the first two numbers of peft's installed version; (0,) if it is not installed."""
    try:
        return tuple(int(part) for part in importlib.metadata.version("peft").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return (0,)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {short_message(error)}"
