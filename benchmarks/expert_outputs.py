"""The cost of `--expert-outputs`: the speed of an ingest with it, relative to the same ingest without it.

    python -m benchmarks.expert_outputs [--device cpu|cuda] [--rounds N] [--prompts N]

Both sides run the same prompts through the same in-memory model, in turn, each round into new warehouses. The time
covers everything from reading the prompts to the sealed run, without describing the model. The ratio is per round:
median, least and greatest. On a CPU it is process time, which other programs disturb less; on a GPU it is wall time.
The table also has the extra arithmetic that the run reports before it begins, and the size of both tables on disk.

On a CPU the model is that of `benchmarks.ingest`; on cuda it is OLMoE-1B-7B's shape in bf16. Weights are random.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from benchmarks.ingest import CPU_SHAPE, OLMOE_1B_7B
from benchmarks.timing import machine
from moewh.ingest.capture.expert_outputs import arithmetic_share
from moewh.ingest.model.in_memory import model_in_memory
from moewh.ingest.model.layers import find_moe_layers
from moewh.ingest.model.loading import LoadedModel
from moewh.ingest.options import RECORDS, IngestOptions
from moewh.ingest.prompts.in_memory import in_memory
from moewh.ingest.run import ingest
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from tests.support.models import byte_tokenizer


def made_model(device: torch.device) -> Any:
    """Return a model with random weights."""
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    shape = OLMOE_1B_7B if cuda else CPU_SHAPE
    with device:
        model: Any = OlmoeForCausalLM(OlmoeConfig(**shape, pad_token_id=0, eos_token_id=None))
    return model.to(torch.bfloat16 if cuda else torch.float32).eval()


def seconds(loaded: LoadedModel, texts: list[str], root: Path, *, expert_outputs: bool) -> tuple[float, Path]:
    """Ingest once; return the seconds it took, and the first segment."""
    clock = time.perf_counter if loaded.model.device.type == "cuda" else time.process_time
    options = IngestOptions(model="benchmark", prompts=(RECORDS,), run_id="r", expert_outputs=expert_outputs)
    began = clock()
    ingest(options, Layout(root), model=loaded, records=in_memory(texts))
    return clock() - began, root / "segments" / "run_id=r" / "segment=0"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64, help="(default: 64; on a GPU, give thousands)")
    chosen = parser.parse_args()
    loaded = model_in_memory(made_model(torch.device(chosen.device)), byte_tokenizer())
    model = loaded.model
    letters = random.Random(0)
    texts = ["".join(letters.choices("abcdefgh ", k=letters.randrange(100, 400))) for _ in range(chosen.prompts)]
    ratios = []
    for number in range(chosen.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            without, _ = seconds(loaded, texts, Path(folder) / "without", expert_outputs=False)
            with_them, segment = seconds(loaded, texts, Path(folder) / "with", expert_outputs=True)
            sizes = [(segment / table.file).stat().st_size for table in (schema.ROUTING, schema.EXPERT_OUTPUTS)]
        if number:  # the first round warms up
            ratios.append(without / with_them)
    told = arithmetic_share(model, find_moe_layers(model, model.config).moe_layers, model.config.num_experts_per_tok)
    tokens = sum(len(text) + 1 for text in texts)
    name = torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"
    print(f"{machine()}; torch {torch.__version__}, {name}, {torch.get_num_threads()} threads; {tokens:,} tokens\n")
    print("| speed with / without | more arithmetic, as reported | routing, bytes per token | expert outputs |")
    print("|---:|---:|---:|---:|")
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"| {spread} | {told:.0%} | {sizes[0] / tokens:.0f} | {sizes[1] / tokens:.0f} |")


if __name__ == "__main__":
    main()
