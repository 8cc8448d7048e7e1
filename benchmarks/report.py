"""`moewh report` of an OLMoE-sized warehouse: size, seconds to make it, and seconds until the page is usable.

    python -m benchmarks.report [--folder DIR] [--tokens N] [--results FILE]

The warehouse is simulated (`benchmarks/simulated.py`): three checkpoints of 16 layers, 64 experts and 10 M tokens each.
Two segments of each are written; the others repeat the second one's files. Chromium opens the page from disk, in a new
profile each time. Ready means that run, domain and layer can be chosen and the visible figures are drawn; a change
means that the next layer is chosen and the visible figures are redrawn.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import simulated
from moewh.ingest.write.run_files import write_run
from moewh.warehouse.files.commit import make_folder
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.sealing.seal import seal

CHECKPOINTS = {1_000: 0.2, 10_000: 0.4, 100_000: 0.5}
"""Training step → the share of the routing that the token decides."""
_DOMAINS = 4
_TIMES = 3
_CHANGE = """() => new Promise((done) => {
    const began = performance.now(), layer = document.getElementById("layer");
    layer.value = Number(layer.value) + 1;
    layer.dispatchEvent(new Event("input"));
    requestAnimationFrame(() => setTimeout(() => done((performance.now() - began) / 1000)));
})"""


def build(folder: Path, tokens: int) -> Layout:
    """Write the warehouse of all checkpoints, or complete it."""
    layout = Layout(folder / "warehouse")
    layout.create()
    segments = max(2, tokens // simulated.SEGMENT_TOKENS)
    for step, share in CHECKPOINTS.items():
        own = Layout(folder / f"step-{step}")
        simulated.build(own.root, 2 * simulated.SEGMENT_TOKENS, domains=_DOMAINS, token_share=share)
        run_id = f"olmoe-step{step}"
        facts = {"series": "olmoe", "tokens_key": "simulated", "train_step": step}
        write_run(layout, simulated.simulated_run(segments, run_id, **facts))
        for number in range(segments):
            target = layout.segment(run_id, number)
            if not target.is_dir():
                make_folder(target)
                for file in own.segment(simulated.RUN, min(number, 1)).iterdir():
                    os.link(file, target / file.name)
        seal(layout, run_id)
    return layout


def make(layout: Layout, output: Path) -> dict[str, float]:
    """Make the report as a user does; return the command's wall seconds and processor seconds."""
    began, used = time.perf_counter(), _used()
    code = "from moewh.cli.main import main; main()"
    command = [sys.executable, "-c", code, "report", "--warehouse", str(layout.root), "-o", str(output)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return {"clock": time.perf_counter() - began, "cores": _used() - used}


def _used() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def opened(output: Path) -> dict[str, float]:
    """Open the page in a new browser; return the seconds until it is ready, in its main thread, and for a change."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page: Any = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto("about:blank")
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        began = time.perf_counter()
        page.goto(output.as_uri(), wait_until="commit")
        page.locator("html[data-ready='true']").wait_for(state="attached")
        ready = time.perf_counter() - began
        metrics = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
        page.evaluate("document.getElementById('figure-co_routing').scrollIntoView()")
        page.wait_for_timeout(1000)
        change = page.evaluate(_CHANGE)
        browser.close()
    return {"ready": ready, "thread": metrics["TaskDuration"], "change": change}


def main() -> None:
    """Build, make, open; print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder for the warehouse (default: a temporary folder)")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="tokens per checkpoint (default: 10 M)")
    parser.add_argument("--results", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        layout = build(folder, arguments.tokens)
        output = folder / "report.html"
        made = [make(layout, output) for _ in range(_TIMES)]
        times = [opened(output) for _ in range(_TIMES)]
        page = _page(arguments.tokens, output.stat().st_size, made, times)
    print(page)
    if arguments.results:
        arguments.results.write_text(page)


def _page(tokens: int, size: int, made: list[dict[str, float]], times: list[dict[str, float]]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("duckdb", "plotly", "playwright"))
    load = os.getloadavg()[0]
    rows = [
        ("size", f"{size / 1e6:.1f} MB", "8 MB"),
        ("made in", _seconds(made, "clock"), "10 s"),
        ("made in, processor time", _seconds(made, "cores"), ""),
        ("ready in", _seconds(times, "ready"), "2 s"),
        ("ready in, main thread", _seconds(times, "thread"), ""),
        ("another layer in", _seconds(times, "change"), ""),
    ]
    return "\n".join(
        [
            "# The report of an OLMoE-sized warehouse",
            "",
            f"`python -m benchmarks.report` on {os.cpu_count()} cores (load {load:.1f}), Python "
            f"{platform.python_version()}, {versions}, Debian's Chromium.",
            f"{len(CHECKPOINTS)} checkpoints of {simulated.LAYERS} layers, {simulated.EXPERTS} experts, top-"
            f"{simulated.TOP_K}, {tokens:,} tokens each. Median (least to most) of {_TIMES}.",
            "",
            "| | measured | goal |",
            "|---|---|---|",
            *(f"| {name} | {value} | {goal} |" for name, value, goal in rows),
            "",
        ]
    )


def _seconds(measured: list[dict[str, float]], name: str) -> str:
    values = [one[name] for one in measured]
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
