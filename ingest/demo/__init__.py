"""The embedded demo: a small OLMoE trained by `moewh.ingest.demo.train`, its checkpoints and its prompts.

In: only the files in this folder, which `python -m moewh.ingest.demo.train` regenerates (`prompts.jsonl` is written by
hand). Out: paths and facts, so that `--model demo` and `--prompts demo` work without a network. Nothing here imports
torch.
"""

import json
from pathlib import Path
from typing import Any

from moewh.warehouse.errors import UsageError

FOLDER: Path = Path(__file__).resolve().parent
PROMPTS: Path = FOLDER / "prompts.jsonl"
MODEL: Path = FOLDER / "model"
TRAINING: Path = FOLDER / "training.json"


def checkpoints() -> list[str]:
    """Return the revision names (`step-000060`, …) in training order, read from the folders in `model/`."""
    # Step numbers have six digits, so sorting the names sorts them by training step.
    return sorted(path.parent.name for path in MODEL.glob("step-*/config.json"))


def checkpoint_path(revision: str | None = None) -> Path:
    """Return the Hugging Face folder of one checkpoint; None means the final one.

    Raises UsageError, with the known revisions, if there is no such checkpoint.
    """
    known = checkpoints()
    name = revision if revision is not None else (known[-1] if known else "")
    if name not in known:
        listed = ", ".join(known) or "none: run python -m moewh.ingest.demo.train"
        raise UsageError(f"the demo model has no revision {name!r}. Known: {listed}.")
    return MODEL / name


def facts() -> dict[str, Any]:
    """Return the content of `training.json`: sizes, versions, tokens seen and held-out losses (nats per token)."""
    loaded: dict[str, Any] = json.loads(TRAINING.read_text(encoding="utf-8"))
    return loaded
