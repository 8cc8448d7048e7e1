"""Load a model and its tokenizer from the hub, a local folder or the embedded demo, and name them.

The model's contract is checked once, here: a model that moewh cannot record is refused before any work.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from moewh.ingest import demo
from moewh.ingest.families.configuration import text_config
from moewh.ingest.families.rule import MoELayer
from moewh.ingest.model.architecture import (
    check_location,
    check_parallel,
    check_quantization,
    check_versions,
    dequantizer,
    empty_model,
    loading_arguments,
    model_class,
    quantization_method,
    read_config,
    require_named,
)
from moewh.ingest.model.expected import max_positions
from moewh.ingest.model.generation_tokens import StatedTokens, read_generation_tokens
from moewh.ingest.model.layers import MoELayers, find_moe_layers, refuse_by_name
from moewh.ingest.model.peft_adapter import BASE_MODEL_ONLY, PeftAdapter, find_adapter
from moewh.ingest.model.repository import Repository, broken_links, hub_commit, looks_like_path, not_fetched
from moewh.ingest.model.stored import first_names, stored_tensors, weight_files
from moewh.ingest.model.tokenizer import TokenizerSource, load_tokenizer
from moewh.ingest.model.weights import check_loaded, check_stored, unloaded_modules
from moewh.ingest.options import DEMO, MOST, IngestOptions
from moewh.ingest.processes import Process
from moewh.warehouse.errors import MoewhError, UsageError, first_line, lacking, require_utf8, short_message
from moewh.warehouse.files.folders import own_entries
from moewh.warehouse.files.manifest import file_sha256
from moewh.warehouse.files.schema import POSITION_BITS

_FALLBACK_MAX_LENGTH = 4_096
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: the arguments for transformers, and the names for it."""

    location: str
    revision: str | None
    """For the hub; None for a folder."""
    name: str
    """Base name: the last part of a hub id or folder."""
    title: str
    """As the user named it."""
    checkpoint: str | None
    """Revision or folder name, which identifies the checkpoint."""
    series: str | None
    """Name shared by the checkpoints of one training run; None for a folder until it is loaded."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be observed, with its tokenizer and its MoE layers."""

    source: Source
    model: Any
    tokenizer: PreTrainedTokenizerBase
    found: MoELayers
    weights_sha256: str | None
    """Fingerprint of a local folder's weights, and of an adapter with its base; None for the hub, which has commits."""
    commit: str | None = None
    """Commit of the hub's repository; None for a folder."""
    train_step: int | None = None
    train_tokens: int | None = None
    adapter: PeftAdapter | None = None
    """The adapter in the model's modules; None without one."""
    generation_tokens: StatedTokens | None = None
    """The tokens that start and end its generation; None for a run that generates nothing."""
    patches: tuple[str, ...] | None = None
    """For a model in memory, what changes its passes besides its weights; None for one loaded from files."""

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers that are observed."""
        return self.found.moe_layers

    @property
    def text_config(self) -> Any:
        """The configuration of the text stack."""
        return text_config(self.config)

    @property
    def max_length(self) -> int:
        """Longest context in tokens, from its configuration."""
        return min(max_positions(self.config) or _FALLBACK_MAX_LENGTH, 1 << POSITION_BITS)

    @property
    def pad_id(self) -> int:
        """A token id to pad with; padded positions are masked, so any valid id works."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        rows = self.vocabulary_rows
        return next(int(token) for token in ids if isinstance(token, int) and 0 <= token < (rows or token + 1))

    @property
    def vocabulary_rows(self) -> int | None:
        """Rows of the embedding, more than any valid token id; None for a model without a plain embedding table."""
        try:
            embedding = self.model.get_input_embeddings()
        except (NotImplementedError, AttributeError):  # a model's own code may not define it
            return None
        rows = getattr(embedding, "num_embeddings", None)
        return int(rows) + int(getattr(embedding, "num_additional_embeddings", 0)) if isinstance(rows, int) else None


def load_model(options: IngestOptions, process: Process | None = None) -> LoadedModel:
    """Load the model that the options name on this process's device.

    Raises MoewhError or UsageError with the reason and a remedy.
    """
    if options.dtype not in ("auto", *_DTYPES):
        raise UsageError(f"--dtype {options.dtype} is not known. Use auto, {', '.join(_DTYPES)}.")
    check_versions()
    device = choose_device(options.device, process or Process())
    silence_libraries()
    check_location(options.model, options.revision)
    source = find_source(options.model, options.revision, options.series)
    with explaining(source.title):
        # A branch may move while its files are fetched, so all of them come from its current commit.
        commit = commit_of(source)
        files = Repository(source.location, commit or source.revision)
        adapter = find_adapter(files, source.title)
        if adapter is not None:
            adapter.check(options.allow_pickle)
        base, tokenizer_files = (files, files) if adapter is None else (adapter.base, adapter.tokenizer)
        code = {"trust_remote_code": options.trust_remote_code}
        config = read_config(base.location, revision=base.revision, **code)
        refuse_by_name(config, expert_outputs=options.expert_outputs)
        check_quantization(config)
        absent = check_files(source.title, base, config, options)
        tokenizer = load_tokenizer(_tokenizer_source(options, source.title, tokenizer_files), options.chat_template)
        more = {**device_arguments(device), **({} if adapter is None else BASE_MODEL_ONLY)}
        model, info = _from_files(base, config, options, more)
        generation_tokens = read_generation_tokens(base, tokenizer, config) if options.generate else None
    unloaded = _require_loaded(source.title, model, info, absent, options)
    if adapter is not None:
        model = adapter.apply(model)
    found = observed_moe_layers(model, options)
    check_parallel(model)
    if device is not None:
        model.to(device)
    model.eval().requires_grad_(False)
    fingerprint = _fingerprint(base, adapter)
    if source.series is None:
        source = replace(source, series=_series(source, base, fingerprint or ""))
    step, tokens = training_progress(source.checkpoint)
    return LoadedModel(
        source,
        model,
        tokenizer,
        MoELayers(found.moe_layers, found.others + unloaded),
        fingerprint,
        commit,
        train_step=step if options.train_step is None else options.train_step,
        train_tokens=tokens if options.train_tokens is None else options.train_tokens,
        adapter=adapter,
        generation_tokens=generation_tokens,
    )


def silence_libraries() -> None:
    """Silence transformers and the hub on the terminal: moewh reports what a user must know."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()


def _from_files(files: Repository, config: Any, options: IngestOptions, more: dict[str, Any]) -> tuple[Any, Any]:
    """Load a model and return it with transformers' loading report. Raises whatever transformers raises."""
    model, info = model_class(config, options.trust_remote_code).from_pretrained(
        files.location,
        revision=files.revision,
        config=config,
        dtype=options.dtype,
        use_safetensors=None if options.allow_pickle else True,
        # Its own settings are not used: see moewh.ingest.model.generation_tokens.
        generation_config=GenerationConfig(),
        output_loading_info=True,
        trust_remote_code=options.trust_remote_code,
        **more,
        **loading_arguments(config),
    )
    return model, info


def _require_loaded(
    title: str, model: Any, info: Any, absent: list[str] | None, options: IngestOptions
) -> list[tuple[str, torch.nn.Module]]:
    """Refuse a model that lacks weights which a pass needs; return the modules without weights that no pass reaches.

    `info` is transformers' loading report, `absent` what `check_files` returned.
    """
    head = bool(options.generate)
    if head and not model.can_generate():
        raise MoewhError(f"{title}: {type(model).__name__} has no LM head to generate with. Leave --generate out.")
    found = observed_moe_layers(model, options)
    if absent is None:
        check_loaded(title, model, found, info, head=head)
    return unloaded_modules(model, found, absent or info["missing_keys"], head=head)


def _fingerprint(files: Repository, adapter: PeftAdapter | None) -> str | None:
    """Return the fingerprint of a folder's weights, with any adapter's; None for a hub model without an adapter."""
    folder = Path(files.location)
    of_weights = weights_fingerprint(folder) if folder.is_dir() else None
    return of_weights if adapter is None else adapter.sha256(of_weights)


def observed_moe_layers(model: Any, options: IngestOptions) -> MoELayers:
    """Return the MoE layers that a run observes: without generation, those that see a prompt. Raises MoewhError."""
    found = find_moe_layers(model, model.config)
    return found if options.generate else found.of_prompts()


def check_files(title: str, files: Repository, config: Any, options: IngestOptions) -> list[str] | None:
    """Refuse weights that do not match the model before loading any; return the parameters that need no stored tensor.

    None if the files' headers cannot show it: quantised weights loaded as they are, or files that are not safetensors.
    """
    method = quantization_method(config)
    paths = weight_files(files.location, config, files.revision, pickled=options.allow_pickle)
    folder = Path(files.location)
    if not paths and folder.is_dir() and not own_entries(folder, "*.bin*"):
        raise MoewhError(_no_weights(title, folder))
    if not paths or (method is not None and dequantizer(config) is None):
        return None
    quantizer, config = dequantizer(config) or (None, copy.deepcopy(config))
    empty: Any = empty_model(config, options.trust_remote_code)
    if quantizer is not None:
        quantizer.preprocess_model(model=empty, dtype=config.dtype, checkpoint_files=paths)
    found = observed_moe_layers(empty, options)
    stored = stored_tensors(paths)
    return check_stored(title, empty, found, stored, quantizer=quantizer, head=bool(options.generate))


def _no_weights(title: str, folder: Path) -> str:
    """Return the line for a folder in which transformers finds no weights."""
    if broken := broken_links(folder, "*.safetensors*"):
        return f"{title}: {first_names(broken)} is a link to a file that does not exist. Fetch the model again."
    others = [path.name for path in own_entries(folder, "*.safetensors") if path.is_file()]
    if others and SAFE_WEIGHTS_NAME not in others:
        return (
            f"{title} has {first_names(others)}, but neither {SAFE_WEIGHTS_NAME} nor an index of shards "
            f"({SAFE_WEIGHTS_INDEX_NAME}). Fetch the index, or save the model again with save_pretrained."
        )
    return f"{title} has no safetensors weights beside its {CONFIG_NAME}. Fetch them too."


@contextmanager
def explaining(title: str) -> Iterator[None]:
    """Turn whatever transformers raises while reading a model's files into a one-line MoewhError.

    A configuration may hold anything, so any kind of exception can occur.
    """
    try:
        yield
    except MoewhError:
        raise
    except Exception as error:
        raise MoewhError(load_failure(title, error)) from error


def _tokenizer_source(options: IngestOptions, title: str, files: Repository) -> TokenizerSource:
    """Return where the tokenizer comes from: --tokenizer, else the model's own folder or commit."""
    if options.tokenizer is None:
        return TokenizerSource(files.location, title, files.revision, options.trust_remote_code)
    named = find_source(options.tokenizer, None)
    return TokenizerSource(named.location, named.title, named.revision, options.trust_remote_code, named=True)


def choose_device(name: str | None, process: Process) -> torch.device | None:
    """Return the device to run on: the named one, else the first available of cuda, mps and cpu.

    With several GPUs, a process takes the one with its local number. None for `auto`: the model is spread over all.
    Raises UsageError for a device that cannot be used.
    """
    if name == "auto":
        if importlib.util.find_spec("accelerate") is None:
            raise UsageError("--device auto needs accelerate. Install it: pip install 'moewh[accelerate]'.")
        return None
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise UsageError("--device meta holds no numbers. Name a device that computes.")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", process.local % max(torch.cuda.device_count(), 1))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {first_line(error)}") from error
    return device


def device_arguments(device: torch.device | None) -> dict[str, Any]:
    """Return arguments that make from_pretrained load each tensor directly onto its device, not through host memory.

    None means all devices. Empty for a CPU, and without accelerate, which this needs.
    """
    if device is None:
        return {"device_map": "auto"}
    placed = device.type != "cpu" and importlib.util.find_spec("accelerate") is not None
    return {"device_map": {"": device}} if placed else {}


def weights_fingerprint(folder: Path) -> str:
    """Return a digest of a folder's safetensors files: names, sizes, headers, and 4 KiB at 64 offsets in each.

    If there are only pickled weights, it covers the whole files.

    Training changes every tensor, so two checkpoints differ at these offsets, and reading them costs the same for a
    large model as for a small one.
    """
    digest = hashlib.sha256()
    paths = own_entries(folder, "*.safetensors")
    if not paths:
        for path in own_entries(folder, "*.bin"):
            digest.update(f"{path.name}\0{file_sha256(path)}\0".encode())
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(min(8 + int.from_bytes(file.read(8), "little"), size)))
            for sample in range(64):
                file.seek(size * sample // 64)
                digest.update(file.read(4_096))
    return digest.hexdigest()


def config_sha256(config: Any) -> str:
    """Return a digest of a configuration's content, without the names and versions that moving a model changes."""
    content = {
        key: value
        for key, value in config.to_dict().items()
        if not key.startswith("_") and key not in ("transformers_version", "dtype", "torch_dtype")
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


_STEP = re.compile(r"(?:step|checkpoint|iter)[-_=]?(\d+)")
_TOKENS = re.compile(r"tokens[-_=]?(\d+(?:\.\d+)?)([KMBT]?)")
_PHASE = re.compile(r"(?:epoch|stage)[-_=]?\d+(?:\.\d+)?")
_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def training_progress(checkpoint: str | None) -> tuple[int | None, int | None]:
    """Read (steps, tokens) from a checkpoint's name; None for each that it does not contain.

    Names such as step5000-tokens20B (OLMoE's branches), checkpoint-500 (the folders of transformers' Trainer) or
    iter_0005000 (Megatron's). A number too large for a column is not read as one.
    """
    step, tokens = _STEP.search(checkpoint or ""), _TOKENS.search(checkpoint or "")
    steps = int(step[1]) if step else None
    seen = round(Decimal(tokens[1]) * _SCALE[tokens[2]]) if tokens else None
    return steps if (steps or 0) <= MOST else None, seen if (seen or 0) <= MOST else None


def find_source(model: str, revision: str | None, series: str | None = None) -> Source:
    """Return where a model comes from: the demo, a folder, or else the hub. Raises UsageError."""
    require_named(model)
    if model == DEMO:
        folder = demo.checkpoint_path(revision)
        return Source(str(folder), None, DEMO, DEMO, folder.name, series or DEMO)
    path = Path(model)
    if path.is_dir():
        path = Path(require_utf8(str(path.resolve())))
        return Source(str(path), None, path.name, str(path), path.name, series)
    name = model.rstrip("/").rpartition("/")[2]
    return Source(model, revision or "main", name, model, revision, series or model)


def commit_of(source: Source) -> str | None:
    """Return the commit of a hub model's revision; None for a folder."""
    return None if source.revision is None else hub_commit(source.location, source.revision)


def _series(source: Source, base: Repository, weights_sha256: str) -> str:
    """Return a name that a folder shares with the other checkpoints of its training run, and with no other model.

    For a checkpoint, whose name holds a training step or tokens, that is its parent's name, the rest of its own name,
    and a digest of the configuration. Any other folder is its own series: its name and a digest of its weights.
    """
    folder = Path(source.location)
    if training_progress(folder.name) == (None, None):
        return f"{folder.name}-{weights_sha256[:8]}"
    rest = _PHASE.sub("", _TOKENS.sub("", _STEP.sub("", folder.name))).strip("-_.")
    return "-".join(part for part in (folder.parent.name, rest, _config_digest(base)) if part)


def _config_digest(files: Repository) -> str:
    """Return a short digest of a model's configuration."""
    try:
        return config_sha256(AutoConfig.from_pretrained(files.location, revision=files.revision))[:8]
    except (OSError, ValueError, KeyError):
        return "unknown"


def load_failure(title: str, error: Exception) -> str:
    """Return one line that explains why a model or its configuration cannot be loaded, and what to do."""
    text = " ".join(str(error).split()) or type(error).__name__
    if lack := lacking(error):
        return f"cannot load the model {title}: {lack}"
    if looks_like_path(title) and not Path(title).exists():
        return f"there is no folder {title}. Check the path given to --model."
    if "trust_remote_code" in text:
        return f"{title} needs code of its own. Read that code, then give --trust-remote-code."
    if "safetensors" in text and ("does not appear" in text or "no file named" in text):
        return (
            f"{title} has no safetensors weights, and pickled ones can run code of their own. Convert the model, or "
            "give --allow-pickle if you trust it."
        )
    if "does not recognize this architecture" in text:
        return (
            f"{title}: transformers {transformers.__version__} does not know this kind of model. Install a newer one."
        )
    advice = (
        not_fetched(Path(title)) or f"Check the files there, first {CONFIG_NAME}."
        if Path(title).exists() and "connect to" not in text
        else "Check the name or path, the revision, and (for a hub id) the network or HF_HUB_OFFLINE."
    )
    return f"cannot load the model {title}: {short_message(error)}. {advice}"
