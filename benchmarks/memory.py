"""Host memory of `moewh ingest` as the corpus grows: peak resident memory with few and with many segments.

    python -m benchmarks.memory [--segment-tokens N]

Each run is a separate process, on the small CPU model of `benchmarks.ingest`. Sizes take turns, three times, and the
table has medians.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from benchmarks.ingest import CPU_SHAPE, save_random_model, write_prompts

SIZES = (1, 5, 20)
TURNS = 3
LONGEST = 512


def main() -> None:
    """Print the peak of each size and its ratio to that of five segments, where the pipeline is full."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segment-tokens", type=int, default=10_000, help="tokens per segment (default: 10000)")
    tokens = parser.parse_args().segment_tokens
    # The estimate assumes four bytes per token; the byte tokenizer makes four tokens of them.
    rows = tokens // 4 * CPU_SHAPE["num_hidden_layers"] * CPU_SHAPE["num_experts_per_tok"]
    peaks: dict[int, list[int]] = {size: [] for size in SIZES}
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder) / "model", torch.device("cpu"))
        for turn in range(TURNS):
            for size in SIZES:
                prompts = write_prompts(Path(folder) / f"{size}.jsonl", tokens * size, LONGEST, ragged=True)
                command = [sys.executable, "-c", "from moewh.cli.main import main; main()", "ingest"]
                command += ["--model", f"{folder}/model", "--prompts", str(prompts), "--batch-tokens", "4096"]
                command += ["--segment-rows", str(rows), "--warehouse", f"{folder}/wh{turn}.{size}"]
                done = subprocess.run(
                    [sys.executable, "-c", _PEAK, *command], capture_output=True, text=True, check=True
                )
                peaks[size].append(int(done.stdout.splitlines()[-1]))
        segments = {
            size: len(list(Path(folder).glob(f"wh0.{size}/segments/run_id=model*/segment=*"))) for size in SIZES
        }
    middle = median(peaks[SIZES[1]])
    print(f"| segments of {tokens:,} tokens | peak MiB | over {segments[SIZES[1]]} | each |\n|---|---:|---:|---|")
    for size, found in peaks.items():
        each = ", ".join(f"{peak / 2**20:,.0f}" for peak in found)
        print(f"| {segments[size]} | {median(found) / 2**20:,.0f} | {median(found) / middle:.2f} | {each} |")


_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


if __name__ == "__main__":
    main()
