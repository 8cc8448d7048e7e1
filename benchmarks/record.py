"""The cost of `moewh.record` in a user's own loop: the same passes with and without it, in turn.

    python -m benchmarks.record [--device cpu|cuda] [--rounds N] [--batches N] [--new-tokens N]

Two models with the same weights take turns, one of them recorded, in the next round the other: batch by batch through
the whole model (`calls`), and `generate` after `generate` (`generate`: greedy, with a cache). Two ratios of speed with
recording over speed without:

    passes  the passes alone, hooks and copies included: median of all batches, with its quartiles
    run     with all that follows until the run is committed and sealed: median of the rounds, least and greatest

What leaving the block takes is stated apart, and so is entering it (the proof of the model, and hashing its weights).
On a CPU the clock is that of the process, which other programs disturb less; on a GPU it is the wall's.

On a CPU there are two shapes: `small` is that of `benchmarks.ingest`, whose passes are so short that anything shows;
`medium` is a model that somebody might run on a CPU. On cuda it is OLMoE-1B-7B's shape in bf16. Weights are random.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import moewh
from benchmarks.ingest import CPU_SHAPE, OLMOE_1B_7B
from benchmarks.timing import machine
from tests.support.models import byte_tokenizer

ROWS, POSITIONS = 8, 256
"""Sequences per batch, and positions of the longest."""


MEDIUM: dict[str, Any] = {
    "num_hidden_layers": 8,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 8_192,
}


@dataclass
class Sides:
    """Seconds of both sides: of each batch in every round, and of each round's beginning and end."""

    bare: list[list[float]] = field(default_factory=list)
    recorded: list[list[float]] = field(default_factory=list)
    entering: list[float] = field(default_factory=list)
    leaving: list[float] = field(default_factory=list)

    @property
    def passes(self) -> list[float]:
        """Ratio of every batch."""
        return [bare / recorded for bare, recorded in zip(chain(*self.bare), chain(*self.recorded), strict=True)]

    @property
    def runs(self) -> list[float]:
        """Ratio of every round, with its end."""
        rounds = zip(self.bare, self.recorded, self.leaving, strict=True)
        return [sum(bare) / (sum(recorded) + leaving) for bare, recorded, leaving in rounds]


def made_models(shape: dict[str, Any], device: torch.device) -> tuple[Any, Any]:
    """Return two models with the same random weights."""
    config = OlmoeConfig(**shape, pad_token_id=0, eos_token_id=None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        with device:
            model: Any = OlmoeForCausalLM(config)
        models.append(model.to(dtype).eval())
    return models[0], models[1]


def made_batches(count: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Return right-padded batches of random ids."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        lengths = torch.randint(POSITIONS // 2, POSITIONS + 1, (ROWS, 1), generator=generator)
        ids = torch.randint(1, 256, (ROWS, POSITIONS), generator=generator)
        batches.append(
            {"input_ids": ids.to(device), "attention_mask": (torch.arange(POSITIONS) < lengths).long().to(device)}
        )
    return batches


def compare(
    models: tuple[Any, Any], batches: list[dict[str, torch.Tensor]], use: Callable[[Any, Any], Any], rounds: int
) -> Sides:
    """Run every batch through both sides in turn, `rounds` times, each in a separate run.

    A model may be slower than its twin, for its place in memory, so the recorded one changes from round to round.
    """
    sides = Sides()
    cuda = models[0].device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time

    def timed(work: Callable[..., Any], *arguments: Any) -> float:
        began = clock()
        work(*arguments)
        if cuda:
            torch.cuda.synchronize()
        return clock() - began

    for turn in range(rounds):
        pair = models if turn % 2 else models[::-1]
        seconds: tuple[list[float], list[float]] = ([], [])
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            recorder = moewh.record(pair[1], byte_tokenizer(), Path(folder), "run")
            sides.entering.append(timed(recorder.__enter__))
            for number, batch in enumerate(batches):
                for side in (0, 1) if number % 2 else (1, 0):
                    seconds[side].append(timed(use, pair[side], batch))
            sides.leaving.append(timed(recorder.__exit__, None, None, None))
        sides.bare.append(seconds[0])
        sides.recorded.append(seconds[1])
    return sides


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    cuda = device.type == "cuda"
    shapes = {"OLMoE-1B-7B": OLMOE_1B_7B} if cuda else {"small": CPU_SHAPE, "medium": MEDIUM}
    batches = made_batches(chosen.batches, device)
    uses: dict[str, Callable[[Any, Any], Any]] = {
        "calls": lambda model, batch: model(**batch),
        "generate": lambda model, batch: model.generate(
            batch["input_ids"][:, : POSITIONS // 4], max_new_tokens=chosen.new_tokens, do_sample=False
        ),
    }
    name = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"{machine()}; torch {torch.__version__}, {name}, {torch.get_num_threads()} threads")
    print(f"{chosen.rounds} rounds of {chosen.batches} batches; `generate`: {chosen.new_tokens} tokens\n")
    print("| model, loop | without, ms a batch | with | passes | run | leaving, s | entering, s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for shape, numbers in shapes.items():
        models = made_models(numbers, device)
        for loop, use in uses.items():
            compare(models, batches[:1], use, 1)  # the first of everything
            print(f"| {shape}, {loop} | {cells(compare(models, batches, use, chosen.rounds))} |", flush=True)


def cells(sides: Sides) -> str:
    """Return the cells of a row of the table."""
    bare, recorded = (statistics.median(chain(*side)) * 1e3 for side in (sides.bare, sides.recorded))
    lower, middle, upper = statistics.quantiles(sides.passes, n=4)
    runs = sides.runs
    return (
        f"{bare:.1f} | {recorded:.1f} | {middle:.3f} ({lower:.3f} to {upper:.3f}) "
        f"| {statistics.median(runs):.3f} ({min(runs):.3f} to {max(runs):.3f}) "
        f"| {statistics.median(sides.leaving):.2f} | {statistics.median(sides.entering):.2f}"
    )


if __name__ == "__main__":
    main()
