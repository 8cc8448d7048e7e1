"""The cost of `moewh.record` in a user's own loop: the same passes with and without it, in turn.

    python -m benchmarks.record [--device cpu|cuda] [--rounds N] [--batches N] [--new-tokens N]

Two models with the same weights take turns, one of them recorded: batch by batch through the whole model (`calls`), and
`generate` after `generate` (`generate`: greedy, with a cache). The recorded side's clock holds everything from hooks to
committed segments, closing included; entering (the proof of the model, and hashing its weights) is stated apart. The
ratio is the speed with recording over the speed without, per round: median, least and greatest. On a CPU the clock is
that of the process, which other programs disturb less; on a GPU it is the wall's.

On a CPU the model is that of `benchmarks.ingest`; on cuda it is OLMoE-1B-7B's shape in bf16. Weights are random.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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


@dataclass
class Sides:
    """Seconds of each side, in all."""

    bare: float = 0.0
    recorded: float = 0.0
    entering: float = 0.0
    ratios: list[float] = field(default_factory=list)


def made_models(device: torch.device) -> tuple[Any, Any]:
    """Two models of the same random weights."""
    cuda = device.type == "cuda"
    config = OlmoeConfig(**(OLMOE_1B_7B if cuda else CPU_SHAPE), pad_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if cuda else torch.float32
    models: list[Any] = [OlmoeForCausalLM(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    return models[0].to(device, dtype).eval(), models[1].to(device, dtype).eval()


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
    """Run every batch through both sides in turn, `rounds` times, each in a separate run."""
    sides = Sides()
    cuda = models[0].device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time

    def timed(work: Callable[..., Any], *arguments: Any) -> float:
        began = clock()
        work(*arguments)
        if cuda:
            torch.cuda.synchronize()
        return clock() - began

    for _ in range(rounds):
        bare = recorded = 0.0
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            recorder = moewh.record(models[1], byte_tokenizer(), Path(folder), "run")
            sides.entering += timed(recorder.__enter__)
            for batch in batches:
                bare += timed(use, models[0], batch)
                recorded += timed(use, models[1], batch)
            recorded += timed(recorder.__exit__, None, None, None)
        sides.ratios.append(bare / recorded)
        sides.bare, sides.recorded = sides.bare + bare, sides.recorded + recorded
    return sides


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=32)
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    models, batches = made_models(device), made_batches(chosen.batches, device)
    length = chosen.new_tokens
    uses: dict[str, Callable[[Any, Any], Any]] = {
        "calls": lambda model, batch: model(**batch),
        "generate": lambda model, batch: model.generate(
            batch["input_ids"][:, : POSITIONS // 4], max_new_tokens=length, do_sample=False
        ),
    }
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{machine()}; torch {torch.__version__}, {name}, {torch.get_num_threads()} threads\n")
    print("| loop | without, ms a batch | with | speed with / without | entering, s |\n|---|---:|---:|---:|---:|")
    for loop, use in uses.items():
        compare(models, batches[:1], use, 1)  # the first of everything
        sides = compare(models, batches, use, chosen.rounds)
        each = 1_000 / (chosen.rounds * len(batches))
        middle, least, most = statistics.median(sides.ratios), min(sides.ratios), max(sides.ratios)
        print(
            f"| {loop} | {sides.bare * each:.1f} | {sides.recorded * each:.1f} "
            f"| {middle:.3f} ({least:.3f} to {most:.3f}) | {sides.entering / chosen.rounds:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
