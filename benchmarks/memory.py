"""Host memory of `moewh ingest` as the corpus grows: peak resident memory at 1, 5 and 20 segments.

    python -m benchmarks.memory [--segment-tokens N]

Each size runs in a process of its own, on the small CPU model of `benchmarks.ingest`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.ingest import CPU_SHAPE, save_random_model, write_prompts

SIZES = (1, 5, 20)
LONGEST = 512


def main() -> None:
    """Print the peak of each size and its ratio to that of five segments, when the pipeline is full."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segment-tokens", type=int, default=10_000, help="tokens of one segment (default: 10000)")
    tokens = parser.parse_args().segment_tokens
    # The estimate takes four bytes for a token; the byte tokenizer makes four of them.
    rows = tokens // 4 * CPU_SHAPE["num_hidden_layers"] * CPU_SHAPE["num_experts_per_tok"]
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder) / "model", torch.device("cpu"))
        for size in SIZES:
            prompts = write_prompts(Path(folder) / f"{size}.jsonl", tokens * size, LONGEST, ragged=True)
            command = [sys.executable, "-c", "from warehouse.cli import main; main()", "ingest"]
            command += ["--model", f"{folder}/model", "--prompts", str(prompts), "--batch-tokens", "4096"]
            command += ["--segment-rows", str(rows), "--warehouse", f"{folder}/wh{size}"]
            done = subprocess.run([sys.executable, "-c", _PEAK, *command], capture_output=True, text=True, check=True)
            peaks[size] = int(done.stdout.splitlines()[-1])
            segments = len(list(Path(folder).glob(f"wh{size}/segments/run_id=model*/segment=*")))
            print(f"{segments:>3} segments of {tokens:,} tokens: {peaks[size] / 2**20:,.0f} MiB at most")
    for size, peak in peaks.items():
        print(f"{size:>3} segments: {peak / peaks[5]:.3f} of the peak at 5")


_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


if __name__ == "__main__":
    main()
