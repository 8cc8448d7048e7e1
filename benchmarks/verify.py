"""The speed of `moewh verify`, compared with its bounds: reading from disk, and sha256 on one core.

A segment of simulated OLMoE routing is copied until the warehouse has the requested size. Cold means that the files
were first dropped from the page cache.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.simulated import RUN, SEGMENT_TOKENS, build
from benchmarks.timing import machine
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.manifest import file_sha256, write_manifest
from moewh.warehouse.trust import verify
from tests.support.synthetic import write_table


def warehouse_of(root: Path, size: int, tokens: int) -> Layout:
    """Write a warehouse of about `size` bytes with valid manifests."""
    layout = build(root, tokens, segment_tokens=tokens, progress=lambda line: print(line, file=sys.stderr))
    options = "{}"
    identity = hashlib.sha256(options.encode()).hexdigest()
    first = layout.segment(RUN, 0)
    share = sum(path.stat().st_size for path in first.glob("*.parquet"))
    segments = max(1, round(size / share))
    summary = {"prompts": tokens // 500, "tokens": tokens, "routing_rows": tokens * 16 * 8}
    for number in range(segments):
        folder = layout.segment(RUN, number)
        if number:
            shutil.copytree(first, folder, symlinks=True)
        write_table(folder, schema.SEGMENTS, [{**summary, "last": number == segments - 1}])
        write_manifest(folder, identity, number)
    run = {"model": "simulated", "identity": identity, "options": options, "segments_planned": segments}
    write_table(layout.run(RUN), schema.RUNS, [run])
    write_manifest(layout.run(RUN), identity, None)
    return layout


def evict(layout: Layout) -> None:
    """Drop every file from the page cache."""
    os.sync()
    for path in layout.root.rglob("*.parquet"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_all(path: Path) -> int:
    """Read and discard a file; return its size."""
    block, size = bytearray(1 << 22), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            size += count
    return size


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def sound(layout: Layout, jobs: int | None) -> None:
    """Verify; any fault is an error in this script."""
    faults = verify.check(verify.plan(layout), jobs)
    if faults:
        raise SystemExit(f"{faults[0].path} {faults[0].why}")


def measure(layout: Layout) -> list[str]:
    """Time each way of reading all files, cold and warm, and return the lines of a Markdown table."""
    files = sorted(layout.segments(RUN).rglob("*.parquet"))
    size = sum(path.stat().st_size for path in files) / 1e9
    works: dict[str, Callable[[], object]] = {
        "read only": lambda: [read_all(path) for path in files],
        "sha256, one core": lambda: [file_sha256(path) for path in files],
        "verify --jobs 1": lambda: sound(layout, 1),
        "verify": lambda: sound(layout, None),
    }
    lines = [f"{size:.2f} GB in {len(files)} files", "", "| | cold | | warm | |", "|---|---|---|---|---|"]
    for name, work in works.items():
        evict(layout)
        cold, warm = seconds(work), seconds(work)
        speeds = f"{cold:.1f} s | {size / cold:.2f} GB/s | {warm:.1f} s | {size / warm:.2f} GB/s"
        print(f"{name}: {speeds}", file=sys.stderr)
        lines.append(f"| {name} | {speeds} |")
    return lines


def main() -> None:
    """Write a warehouse, verify it cold and warm, and print GB/s beside reading and sha256."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--tokens", type=int, default=SEGMENT_TOKENS, help="tokens per segment")
    parser.add_argument("--results", type=Path, help="write the table to this file")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        layout = warehouse_of(Path(folder) / "wh", int(chosen.gigabytes * 1e9), chosen.tokens)
        lines = measure(layout)
    load = f"Load average at the end: {os.getloadavg()[0]:.1f}."
    text = "\n".join(["# moewh verify", "", "`python -m benchmarks.verify`", "", machine(), "", *lines, "", load, ""])
    print(text)
    if chosen.results is not None:
        chosen.results.parent.mkdir(parents=True, exist_ok=True)
        chosen.results.write_text(text)


if __name__ == "__main__":
    main()
