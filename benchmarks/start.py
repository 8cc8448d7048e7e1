"""The start-up cost of `moewh ingest` with a few prompts, in core-seconds and seconds, and its stages.

    python -m benchmarks.start [--before CHECKOUT] [--rounds N]

Whole processes take turns: moewh from another checkout, if given; moewh from this one; and the floor, a plain script
that imports torch and transformers, loads the same model and its tokenizer, and runs the same prompts through it.
Core-seconds include the process's exit. The stages of one more run are measured from inside.

The model has OLMoE's classes, 4 layers of 64 experts, 200 MB in fp32 and random weights, and is in the page cache.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLOOR = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
texts = [json.loads(line)["text"] for line in open(sys.argv[2])]
with torch.inference_mode():
    model.model(**tokenizer(texts, return_tensors="pt", padding=True), use_cache=False)
"""
MOEWH = "from moewh.cli.main import main; main()"
HERE = Path(__file__).resolve().parent.parent
TOKENS = 600


@dataclass(frozen=True)
class Cost:
    """The cost of a process or a stage."""

    cores: float
    seconds: float


class Stages:
    """Measures core-seconds and seconds between marks, in this process."""

    def __init__(self) -> None:
        self.taken: dict[str, Cost] = {}
        self._last = Cost(0.0, time.perf_counter())
        """Wall time excludes the interpreter's own start."""

    def mark(self, name: str) -> None:
        """End a stage, which covers everything since the last mark."""
        now, before = Cost(time.process_time(), time.perf_counter()), self.taken.get(name, Cost(0.0, 0.0))
        self.taken[name] = Cost(
            before.cores + now.cores - self._last.cores, before.seconds + now.seconds - self._last.seconds
        )
        self._last = now

    def around(self, owner: Any, name: str, stage: str) -> None:
        """Make a function a stage; everything before it counts as the rest."""
        real: Callable[..., Any] = getattr(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            self.mark("the rest")
            result = real(*args, **kwargs)
            self.mark(stage)
            return result

        setattr(owner, name, marked)


def print_stages(model: str, prompts: str, warehouse: str) -> None:
    """Ingest like the command, and print each stage's name, core-seconds and seconds."""
    stages = Stages()
    import moewh.cli.main  # noqa: F401

    stages.mark("interpreter and command")
    from moewh.ingest.model import light_start

    light_start.sleep_while_waiting()
    with light_start.no_collection():
        import torch  # noqa: F401
    stages.mark("torch")
    light_start.start_light(other_code=False)
    stages.mark("transformers")
    from moewh.ingest import run
    from moewh.ingest.capture.forward import BatchRunner
    from moewh.ingest.model import loading
    from moewh.ingest.options import IngestOptions
    from moewh.warehouse.files.layout import Layout

    stages.mark("the rest of moewh")
    stages.around(loading, "check_files", "model class, headers of the weights")
    stages.around(loading, "load_tokenizer", "tokenizer")
    stages.around(loading, "_from_files", "weights")
    stages.around(loading, "_fingerprint", "fingerprint")
    stages.around(run, "plan_run", "plan of the prompts")
    stages.around(BatchRunner, "prove", "first batch and its proof")
    stages.around(run, "publish", "publishing")
    stages.around(run, "write_segment", "writing")
    run.ingest(IngestOptions(model=model, prompts=(prompts,)), Layout(Path(warehouse)))
    stages.mark("the rest")
    for name, cost in stages.taken.items():
        print(f"{name}\t{cost.cores}\t{cost.seconds}")


def process(checkout: Path, folder: Path, *command: str) -> tuple[Cost, str]:
    """Run a Python process that imports moewh from a checkout; return its cost and output."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cores, seconds), done.stdout


def build(folder: Path) -> tuple[str, str]:
    """Write the model and the prompts; return their paths."""
    import torch

    from benchmarks.ingest import save_random_model, write_prompts

    save_random_model(folder / "model", torch.device("cpu"))
    return str(folder / "model"), str(write_prompts(folder / "prompts.jsonl", TOKENS, 100, ragged=True))


def measure(folder: Path, model: str, prompts: str, before: Path | None, rounds: int) -> dict[str, list[Cost]]:
    """Run every side in turn, each ingest into a new warehouse; the first round warms up."""
    checkouts = {**({"moewh before": before} if before else {}), "moewh": HERE}
    costs: dict[str, list[Cost]] = {}
    for turn in range(rounds + 1):
        for name, checkout in checkouts.items():
            words = ("ingest", "--model", model, "--prompts", prompts, "--warehouse", f"{name}-{turn}")
            costs.setdefault(name, []).append(process(checkout, folder, "-c", MOEWH, *words)[0])
        costs.setdefault("floor", []).append(process(HERE, folder, "-c", FLOOR, model, prompts)[0])
    return {name: taken[1:] for name, taken in costs.items()}


def report(costs: dict[str, list[Cost]], stages: str, whole: Cost) -> str:
    """Return the two tables: whole processes, and the stages of one."""
    lines = ["| process | core-seconds, least | median | seconds, least | median |", "|---|---:|---:|---:|---:|"]
    for name, taken in costs.items():
        cores, seconds = [cost.cores for cost in taken], [cost.seconds for cost in taken]
        figures = (min(cores), statistics.median(cores), min(seconds), statistics.median(seconds))
        lines.append(f"| {name} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")
    lines += ["", "| stage of moewh | core-seconds | seconds |", "|---|---:|---:|"]
    rest = whole
    for line in stages.splitlines():
        name, *figures_of_stage = line.split("\t")
        stage = Cost(*map(float, figures_of_stage))
        lines.append(f"| {name} | {stage.cores:.2f} | {stage.seconds:.2f} |")
        rest = Cost(rest.cores - stage.cores, rest.seconds - stage.seconds)
    return "\n".join([*lines, f"| exit | {rest.cores:.2f} | {rest.seconds:.2f} |"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout of moewh to compare with this one")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, prompts = build(folder)
        costs = measure(folder, model, prompts, chosen.before and chosen.before.resolve(), chosen.rounds)
        code = "import sys; from benchmarks.start import print_stages; print_stages(*sys.argv[1:])"
        whole, stages = process(HERE, folder, "-c", code, model, prompts, "stages")
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {chosen.rounds} rounds")
        print(report(costs, stages, whole))


if __name__ == "__main__":
    main()
