"""What a user asks of `moewh ingest`: one value per option, checked before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moewh.warehouse.errors import UsageError
from moewh.warehouse.files.layout import check_run_id

Overflow = Literal["truncate", "chunk", "skip", "error"]
PromptFormat = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "txt"]

SEGMENT_ROWS = 64_000_000
BATCH_TOKENS = 8_192
STDIN = "-"
"""The name that stands for standard input as a file of prompts."""
DEMO = "demo"
"""The name that stands for the embedded model, and for the embedded prompts."""


@dataclass(frozen=True)
class Sampling:
    """What is generated after each prompt: how many tokens at most, and how each is chosen."""

    tokens: int
    temperature: float = 0.0
    """0: always the likeliest token."""
    seed: int = 0
    """With prompt_id, decides a prompt's sample."""


@dataclass(frozen=True)
class IngestOptions:
    """The options of one run. Lengths are in tokens, sizes in routing rows."""

    model: str
    prompts: tuple[str, ...] = ()
    """Files, folders, patterns, hf:// names, - or demo."""
    dataset: str | None = None
    """What the `datasets` library reads: a name on the Hub or a folder; read after `prompts`."""
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    run_id: str | None = None
    prompts_format: PromptFormat | None = None
    """None: by each file's suffix; standard input is jsonl."""
    text_column: str | None = None
    """None: text, messages, input_ids or another of the conventions in `moewh.ingest.prompts.records`."""
    delimiter: str | None = None
    """Between the columns of CSV. None: a tab in .tsv, and in .csv what the header shows."""
    domain_column: str = "domain"
    domain: str | None = None
    """A label for every prompt, instead of a column."""
    max_length: int | None = None
    """None: the model's own limit."""
    on_overflow: Overflow = "truncate"
    special_tokens: bool = True
    batch_tokens: int = BATCH_TOKENS
    segment_rows: int = SEGMENT_ROWS
    device: str | None = None
    """None: cuda if there is one, then mps, else cpu."""
    dtype: str = "auto"
    """auto: as the checkpoint is stored."""
    limit: int | None = None
    series: str | None = None
    train_step: int | None = None
    """Recorded with the run; None: as the checkpoint's name says."""
    train_tokens: int | None = None
    generate: int = 0
    """Tokens to generate after each prompt, at most."""
    temperature: float = 0.0
    seed: int = 0
    router_logits: bool = False
    hidden_states: str | None = None
    """MoE layers separated by commas, or all."""
    tokenizer: str | None = None
    """Hub id or folder; None: the model's own."""
    chat_template: str | None = None
    """File whose content replaces the tokenizer's chat template."""
    chat_arguments: tuple[str, ...] = ()
    """name=value, for the chat template."""
    trust_remote_code: bool = False
    allow_pickle: bool = False
    """Load weights that are not safetensors."""

    def __post_init__(self) -> None:
        """Raise UsageError for a value no run could have."""
        if self.run_id is not None:
            check_run_id(self.run_id)
        if not self.prompts and self.dataset is None:
            raise UsageError("no prompts were named. Give a file with --prompts, a --dataset, or --prompts demo.")
        if self.dataset is None and (self.config or self.split):
            raise UsageError("--config and --split choose from a --dataset. Name one.")
        if self.delimiter is not None and (len(self.delimiter.encode()) != 1 or self.delimiter in '"\r\n'):
            raise UsageError(f"--delimiter is {self.delimiter!r}. Give one ASCII character, such as ';' or a tab.")
        for option in ("max_length", "batch_tokens", "segment_rows", "limit"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UsageError(f"--{option.replace('_', '-')} is {value}. Give a whole number of at least 1.")
        for option in ("train_step", "train_tokens"):
            if (getattr(self, option) or 0) < 0:
                raise UsageError(f"--{option.replace('_', '-')} is below 0.")
        if self.generate < 0 or not 0 <= self.temperature < float("inf") or self.seed < 0:
            raise UsageError("--generate, --temperature and --seed take numbers from 0 on.")
        if self.generate and self.on_overflow == "chunk":
            raise UsageError("--generate needs a prompt in one piece. Choose another --on-overflow than chunk.")

    @property
    def sampling(self) -> Sampling | None:
        """What to generate; None for nothing."""
        return Sampling(self.generate, self.temperature, self.seed) if self.generate else None


def each_checkpoint(
    models: tuple[str, ...], revisions: tuple[str, ...], run_id: str | None, **others: Any
) -> list[IngestOptions]:
    """Return the options of one run per model and revision, in the order given.

    With more than one, `run_id` is what their ids begin with: the revision's or folder's name follows.
    Raises UsageError for what cannot be of several runs.
    """
    if not models:
        raise UsageError("no model was named. Give a hub id or a folder with --model, or --model demo.")
    pairs: list[tuple[str, str | None]] = [(model, revision) for model in models for revision in revisions or (None,)]
    if len(pairs) == 1:
        return [IngestOptions(model=models[0], revision=pairs[0][1], run_id=run_id, **others)]
    for option in ("train_step", "train_tokens"):
        if others.get(option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} is of one checkpoint. Ingest it by itself.")
    if STDIN in others.get("prompts", ()):
        raise UsageError("standard input can be read once only. Write the prompts to a file for several checkpoints.")
    names = [_checkpoint_name(*pair, several_models=len(models) > 1) for pair in pairs]
    if len(set(names)) < len(names):
        raise UsageError(f"two checkpoints are called {max(names, key=names.count)}. Ingest them one by one.")
    return [
        IngestOptions(model=model, revision=revision, run_id=f"{run_id}-{name}" if run_id else None, **others)
        for (model, revision), name in zip(pairs, names, strict=True)
    ]


def _checkpoint_name(model: str, revision: str | None, *, several_models: bool) -> str:
    """What tells a checkpoint from the others of one command, in the letters of a run_id."""
    base = Path(model).name
    name = revision if revision and not several_models else f"{base}-{revision}" if revision else base
    return "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in name)
