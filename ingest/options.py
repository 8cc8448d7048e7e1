"""What a user asks of `moewh ingest`: one value per option, checked before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from warehouse.errors import UsageError
from warehouse.layout import check_run_id

Overflow = Literal["truncate", "chunk", "skip", "error"]
PromptFormat = Literal["jsonl", "csv", "parquet", "txt"]

SEGMENT_ROWS = 64_000_000
BATCH_TOKENS = 8_192
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
    prompts: tuple[str, ...]
    revision: str | None = None
    run_id: str | None = None
    prompts_format: PromptFormat | None = None
    """None: by each file's suffix; standard input is jsonl."""
    text_column: str = "text"
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
    generate: int = 0
    """Tokens to generate after each prompt, at most."""
    temperature: float = 0.0
    seed: int = 0
    router_logits: bool = False
    hidden_states: str | None = None
    """MoE layers separated by commas, or all."""
    trust_remote_code: bool = False
    allow_pickle: bool = False
    """Load weights that are not safetensors."""

    def __post_init__(self) -> None:
        """Raise UsageError for a value no run could have."""
        if self.run_id is not None:
            check_run_id(self.run_id)
        if not self.prompts:
            raise UsageError("no prompts were named. Give at least one file with --prompts, or --prompts demo.")
        for option in ("max_length", "batch_tokens", "segment_rows", "limit"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UsageError(f"--{option.replace('_', '-')} is {value}. Give a whole number of at least 1.")
        if self.generate < 0 or not 0 <= self.temperature < float("inf") or self.seed < 0:
            raise UsageError("--generate, --temperature and --seed take numbers from 0 on.")
        if self.generate and self.on_overflow == "chunk":
            raise UsageError("--generate needs a prompt in one piece. Choose another --on-overflow than chunk.")

    @property
    def sampling(self) -> Sampling | None:
        """What to generate; None for nothing."""
        return Sampling(self.generate, self.temperature, self.seed) if self.generate else None
