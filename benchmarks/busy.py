"""How busy the device stays: a whole `moewh ingest` of many tokens, beside the same passes alone.

    python -m benchmarks.busy [--device cpu|cuda] [--tokens N] [--batch-tokens N]

In order: bare passes over a quarter of the prompts (without the LM head), the ingest of all of them with segments of
the default size, and bare passes again, whose speed differs from the first if the machine's does. Both sides run the
same model and batches of the same shape, without padding. On a GPU, nvidia-smi samples how much of the time a kernel
runs.

The model is that of `benchmarks.ingest`. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.ingest import save_random_model, write_prompts
from benchmarks.timing import machine
from moewh.ingest.capture.hooks import run_stack, to_device
from moewh.ingest.options import IngestOptions
from moewh.ingest.run import Progress, ingest
from moewh.warehouse.files.layout import Layout

LONGEST = 512
"""Tokens of every prompt."""
_EVERY_MS = 200


@dataclass
class Samples:
    """How busy the GPU was, in percent, at moments of `time.time`; empty without a GPU."""

    busy: list[tuple[float, float]] = field(default_factory=list)

    def between(self, began: float, ended: float) -> str:
        """Return the mean of an interval, as a cell of the table."""
        found = [percent for moment, percent in self.busy if began <= moment <= ended]
        return f"{mean(found):.0f}%" if found else "unknown"


@contextmanager
def sampled(device: torch.device) -> Iterator[Samples]:
    """Sample the GPU's use in a process of its own; the samples are complete when the block ends."""
    samples = Samples()
    if device.type != "cuda":
        yield samples
        return
    query = ["nvidia-smi", "--query-gpu=timestamp,utilization.gpu", "--format=csv,noheader,nounits"]
    with tempfile.TemporaryFile("w+") as lines:
        with subprocess.Popen([*query, "-lms", str(_EVERY_MS)], stdout=lines) as process:
            try:
                yield samples
            finally:
                process.terminate()
        lines.seek(0)
        for line in lines:
            moment, _, percent = line.strip().partition(", ")
            if percent.isdigit():
                when = time.mktime(time.strptime(moment.split(".")[0], "%Y/%m/%d %H:%M:%S"))
                samples.busy.append((when, float(percent)))


@dataclass(frozen=True)
class Side:
    """One side's tokens, and when it began and ended, by `time.time`."""

    name: str
    tokens: int
    began: float
    ended: float

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / (self.ended - self.began)


def bare(model: Any, ids_NS: np.ndarray[Any, np.dtype[np.int64]], rows: int) -> Side:
    """Run every batch of `rows` prompts without recording anything."""
    mask_BS = torch.ones((rows, ids_NS.shape[1]), dtype=torch.int64, device=model.device)

    def run(start: int) -> None:
        ids_BS = to_device(ids_NS[start : start + rows], model.device)
        run_stack(model, ids_BS, mask_BS[: len(ids_BS)])

    with torch.inference_mode():
        run(0)
        _synchronise(model.device)
        began = time.time()
        for start in range(0, len(ids_NS), rows):
            run(start)
        _synchronise(model.device)
    return Side("bare passes", ids_NS.size, began, time.time())


def recorded(options: IngestOptions, folder: Path) -> tuple[Side, Side]:
    """Ingest; return it from the launch of the first pass to that of the last, and to the sealed run."""
    tokens: list[tuple[float, int]] = []
    ingest(options, Layout(folder), Progress(batch_done=lambda count: tokens.append((time.time(), count))))
    ended = time.time()
    count = sum(count for _, count in tokens[1:])  # the first batch proves the model
    return (
        Side("ingest, until its last pass", count, tokens[0][0], tokens[-1][0]),
        Side("ingest, until the run is sealed", count, tokens[0][0], ended),
    )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Run both sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=60_000, help="(default: 60000; on a GPU, give millions)")
    parser.add_argument("--batch-tokens", type=int, default=8_192)
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    with tempfile.TemporaryDirectory() as name, sampled(device) as samples:
        folder = Path(name)
        model, tokenizer = save_random_model(folder / "model", device)
        prompts = write_prompts(folder / "prompts.jsonl", chosen.tokens, LONGEST, ragged=False)
        quarter = prompts.read_text().splitlines()[: max(1, chosen.tokens // LONGEST // 4)]
        texts = [json.loads(line)["text"] for line in quarter]
        ids_NS = np.array(tokenizer(texts)["input_ids"], np.int64)
        rows = max(1, chosen.batch_tokens // LONGEST)
        options = IngestOptions(
            model=str(folder / "model"),
            prompts=(str(prompts),),
            batch_tokens=chosen.batch_tokens,
            device=chosen.device,
        )
        sides = [bare(model, ids_NS, rows), *recorded(options, folder / "warehouse"), bare(model, ids_NS, rows)]
        size = sum(path.stat().st_size for path in (folder / "warehouse").rglob("*.parquet"))
        time.sleep(2 * _EVERY_MS / 1_000)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{machine()}; torch {torch.__version__}, transformers {transformers.__version__}, {name}")
    print(f"{sides[1].tokens:,} tokens recorded, {size / 1e9:.2f} GB\n")
    limit = mean((sides[0].speed, sides[-1].speed))
    print("| | tokens | seconds | tokens/s | relative to bare | kernels run |\n|---|---:|---:|---:|---:|---:|")
    for side in sides:
        taken = f"{side.ended - side.began:.1f}"
        shown = f"{side.speed:,.0f} | {side.speed / limit:.3f} | {samples.between(side.began, side.ended)}"
        print(f"| {side.name} | {side.tokens:,} | {taken} | {shown} |")


if __name__ == "__main__":
    main()
