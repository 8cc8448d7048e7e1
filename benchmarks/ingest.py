"""The cost of recording: the bare forward pass, moewh's capture, the whole ingest, and the usual script.

    python -m benchmarks.ingest [--device cpu|cuda] [--pairs N] [--tokens N]

All sides run the same model on the same right-padded batches, in turn (a b c d e f, a b …), and the device is
synchronised before each clock is read. The table gives medians of the ratios within a round, with the interval that
holds the middle half. On a CPU, whose speed varies, they take turns batch by batch: (f) has its own (b), which runs
each batch right after (f) did, and whose time is subtracted from (f)'s.

    a  forward with the LM head
    b  forward without it (the physical limit)
    c  output_router_logits=True, softmax, top-k, numpy: the usual script
    d  nnsight tracing of the routers, if installed (`pip install nnsight`)
    e  moewh's capture alone, up to numpy arrays
    f  the whole ingest (tokenising, capture, rollups, Parquet, hashing, fsync, commit) in steady state, from the
       first segment's commit to the last's, five segments later; start-up, before that, is reported separately

On a CPU the model has 4 layers, 64 experts, top-8, hidden 256, intermediate 256 and a vocabulary of 2,048, so that the
head does not dominate; on cuda it has OLMoE-1B-7B's shape in bf16. Weights are random: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from moewh.ingest.capture.forward import run_batch
from moewh.ingest.capture.hooks import run_stack, to_device
from moewh.ingest.capture.vectors import WantedVectors
from moewh.ingest.model.layers import find_moe_layers
from moewh.ingest.model.loading import LoadedModel, Source
from moewh.ingest.options import IngestOptions
from moewh.ingest.prompts.batches import Batch, make_batch, plan_batches
from moewh.ingest.prompts.canonical import CANONICAL
from moewh.ingest.prompts.tokenise import TokenRules, tokenise
from moewh.ingest.run import Progress, ingest
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from tests.support.models import byte_tokenizer

CPU_SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2_048,
}
OLMOE_1B_7B: dict[str, Any] = {
    "num_hidden_layers": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "hidden_size": 2_048,
    "intermediate_size": 1_024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 50_304,
}
STEADY_SEGMENTS = 5


@dataclass(frozen=True)
class Pair:
    """Seconds of a side, and of (b) over the same tokens."""

    own: float
    bare: float


@dataclass
class Bench:
    """A model, its prompts as the batches of an ingest on the host, and how to wait for its device."""

    loaded: LoadedModel
    batches: list[Batch]
    tokens: int
    folder: Path
    options: IngestOptions
    device: torch.device
    waiting: list[float] = field(default_factory=list)
    """Share of (f)'s time spent waiting for the writer, per round."""
    startup: list[float] = field(default_factory=list)
    """Seconds from (f)'s first batch to its first commit, per round: the proof of the model and one segment."""

    @property
    def flops_per_token(self) -> float:
        """Multiplications and additions per token: two per weight used, without attention scores."""
        config = self.loaded.config
        experts = sum(weight.numel() for moe in self.loaded.moe_layers for weight in moe.experts.parameters())
        rest = sum(weight.numel() for weight in self.loaded.model.parameters()) - experts
        embeddings = config.vocab_size * config.hidden_size * 2
        return float(2 * (rest - embeddings + experts * config.num_experts_per_tok / config.num_experts))

    def synchronise(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forward(self, batches: list[Batch], run: Callable[[torch.Tensor, torch.Tensor], Any]) -> float:
        """Run batches through `run` and return the seconds taken."""
        self.synchronise()
        began = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                run(to_device(batch.input_ids_BS, self.device), to_device(batch.attention_mask_BS, self.device))
        self.synchronise()
        return time.perf_counter() - began


def with_head(bench: Bench, batches: list[Batch]) -> float:
    """(a)"""
    model = bench.loaded.model
    return bench.forward(batches, lambda ids, mask: model(input_ids=ids, attention_mask=mask, use_cache=False))


def without_head(bench: Bench, batches: list[Batch]) -> float:
    """(b)"""
    return bench.forward(batches, lambda ids, mask: run_stack(bench.loaded.model, ids, mask))


def usual_script(bench: Bench, batches: list[Batch]) -> float:
    """(c)"""
    model = bench.loaded.model
    K = model.config.num_experts_per_tok

    def run(ids: torch.Tensor, mask: torch.Tensor) -> list[Any]:
        output = model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True)
        routed = [torch.softmax(logits.float(), -1).topk(K) for logits in output.router_logits]
        return [(weights.cpu().numpy(), experts.cpu().numpy()) for weights, experts in routed]

    return bench.forward(batches, run)


def nnsight_tracing(bench: Bench, batches: list[Batch]) -> float:
    """(d)"""
    import nnsight

    traced = nnsight.NNsight(bench.loaded.model)

    def run(ids: torch.Tensor, mask: torch.Tensor) -> list[Any]:
        with traced.trace(input_ids=ids, attention_mask=mask, use_cache=False):
            routed: Any = []
            for layer in traced.model.layers:
                routed.append(layer.mlp.gate.output)
            routed.save()
        return [(weights.float().cpu().numpy(), experts.cpu().numpy()) for _, weights, experts in routed]

    return bench.forward(batches, run)


def capture_alone(bench: Bench, batches: list[Batch]) -> float:
    """(e)"""
    bench.synchronise()
    began = time.perf_counter()
    pending = []
    for batch in batches:
        pending.append(run_batch(bench.loaded, batch, WantedVectors()))
        if len(pending) > 4:
            pending.pop(0).wait()
    for routing in pending:
        routing.wait()
    return time.perf_counter() - began


def whole_ingest(bench: Bench, *, beside: bool) -> Pair:
    """Run (f): from the first segment's commit to the last's, in seconds per `bench.tokens` tokens.

    With `beside`, also run (b): each batch once more without moewh, right after the ingest has run it.
    """
    bare: list[float] = []
    committed: list[tuple[float, float]] = []

    def batch_done(_: int) -> None:
        bare.append(without_head(bench, [bench.batches[len(bare)]]) if beside else 0.0)

    def segment_done(*_: int) -> None:
        committed.append((time.perf_counter(), sum(bare)))

    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        layout = Layout(Path(folder) / "wh")
        summary = ingest(bench.options, layout, Progress(batch_done=batch_done, segment_done=segment_done))
    (began, bare_before), (ended, bare_after) = committed[0], committed[-1]
    steady_bare = bare_after - bare_before
    steady = ended - began - steady_bare
    bench.waiting.append(summary.waiting / (summary.seconds - sum(bare)))
    bench.startup.append(summary.seconds - sum(bare) - steady)
    scale = bench.tokens / sum(part.tokens for part in summary.written[1:])
    return Pair(steady * scale, steady_bare * scale)


FORWARDS: dict[str, Callable[[Bench, list[Batch]], float]] = {
    "a": with_head,
    "b": without_head,
    "c": usual_script,
    "d": nnsight_tracing,
    "e": capture_alone,
}


def build(folder: Path, device: torch.device, tokens: int, batch_tokens: int, longest: int) -> Bench:
    """Make the model and prompts; on a CPU, lengths are ragged (from a quarter of `longest` to `longest`)."""
    model, tokenizer = save_random_model(folder / "model", device)
    on_cpu = device.type == "cpu"
    prompts = write_prompts(folder / "prompts.jsonl", tokens, longest, ragged=on_cpu)
    rows = tokens * model.config.num_hidden_layers * model.config.num_experts_per_tok
    options = IngestOptions(
        model=str(folder / "model"),
        prompts=(str(prompts),),
        batch_tokens=batch_tokens,
        # Estimated rows: the byte tokenizer gives four times the tokens that the estimate assumes.
        segment_rows=max(1, rows // 4 // (STEADY_SEGMENTS + 1)),
        device=str(device),
    )
    source = Source(str(folder / "model"), None, "bench", "bench", None, "bench")
    loaded = LoadedModel(source, model, tokenizer, find_moe_layers(model, model.config).of_prompts(), None)
    batches, found = batches_of_an_ingest(options, folder / "plan", tokenizer)
    return Bench(loaded, batches, found, folder, options, device)


def batches_of_an_ingest(options: IngestOptions, folder: Path, tokenizer: Any) -> tuple[list[Batch], int]:
    """Return exactly the batches that an ingest runs, cut into its segments, and their tokens."""
    summary = ingest(options, Layout(folder))
    if len(summary.written) <= STEADY_SEGMENTS:
        raise RuntimeError(f"only {len(summary.written)} segments: give more --tokens.")
    batches, tokens = [], 0
    for number in range(summary.segments):
        path = Layout(folder).segment(summary.run_id, number) / schema.PROMPTS.file
        rows = [{"text": text, "form": "text"} for text in pq.read_table(path, partitioning=None)["text"].to_pylist()]
        table = pa.Table.from_pylist(rows, schema=CANONICAL)
        segment = tokenise(table, 0, tokenizer, TokenRules(4_096, "truncate", special_tokens=True))
        batches += [
            make_batch(segment, contexts, 0) for contexts in plan_batches(segment.length_C, options.batch_tokens)
        ]
        tokens += len(segment.vocab_id_T)
    return batches, tokens


def save_random_model(folder: Path, device: torch.device) -> tuple[Any, PreTrainedTokenizerFast]:
    """Make and save the benchmark's model for this device, with a tokenizer of one token per byte."""
    torch.manual_seed(0)
    on_cpu = device.type == "cpu"
    config = OlmoeConfig(max_position_embeddings=4_096, eos_token_id=0, **(CPU_SHAPE if on_cpu else OLMOE_1B_7B))
    with torch.device(device):
        model: Any = OlmoeForCausalLM(config)
    model.to(torch.float32 if on_cpu else torch.bfloat16).eval()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def write_prompts(path: Path, tokens: int, longest: int, *, ragged: bool) -> Path:
    """Write prompts of random letters, one token per letter, `tokens` in total."""
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz ,.\n"))
    with path.open("w") as file:
        while tokens > 0:
            length = int(generator.integers(longest // 4, longest)) if ragged else longest - 1
            file.write(json.dumps({"text": "".join(generator.choice(letters, length))}) + "\n")
            tokens -= length + 1
    return path


def one_round(bench: Bench, sides: str) -> dict[str, Pair]:
    """Run every side once. Forward passes take turns batch by batch on a CPU."""
    on_cpu = bench.device.type == "cpu"
    turns = [[batch] for batch in bench.batches] if on_cpu else [bench.batches]
    spent = dict.fromkeys([side for side in sides if side in FORWARDS], 0.0)
    for turn in turns:
        for side in spent:
            spent[side] += FORWARDS[side](bench, turn)
    pairs = {side: Pair(seconds, spent["b"]) for side, seconds in spent.items()}
    if "f" in sides:
        whole = whole_ingest(bench, beside=on_cpu)
        pairs["f"] = whole if on_cpu else Pair(whole.own, spent["b"])
    return pairs


def report(rounds: list[dict[str, Pair]], tokens: int) -> str:
    """Return the table: tokens per second of each side, and its ratio to (b) with the middle half."""
    lines = ["| side | tokens/s | speed relative to (b) | middle half |", "|---|---:|---:|---|"]
    for side in rounds[0]:
        ratios = [pairs[side].bare / pairs[side].own for pairs in rounds]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        speed = tokens / statistics.median(pairs[side].own for pairs in rounds)
        lines.append(f"| ({side}) | {speed:,.0f} | {statistics.median(ratios):.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Run every side in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=15, help="rounds of all sides (default: 15)")
    parser.add_argument("--tokens", type=int, default=30_000, help="tokens per round (default: 30000)")
    parser.add_argument("--batch-tokens", type=int, default=4_096)
    parser.add_argument("--longest", type=int, default=512, help="longest prompt in tokens (default: 512)")
    parser.add_argument("--sides", default="abcdef" if importlib.util.find_spec("nnsight") else "abcef")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device(chosen.device)
        bench = build(Path(folder), device, chosen.tokens, chosen.batch_tokens, chosen.longest)
        padded = sum(batch.input_ids_BS.size for batch in bench.batches)
        rounds = [one_round(bench, chosen.sides) for _ in range(chosen.pairs + 1)][1:]  # the first warms up
        print(
            f"{bench.tokens:,} tokens ({padded / bench.tokens - 1:.1%} padding), {len(bench.batches)} batches; ", end=""
        )
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        print(f"{chosen.pairs} rounds on {chosen.device}, {torch.get_num_threads()} threads, {name}")
        print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
        print(report(rounds, bench.tokens))
        fastest = bench.tokens / statistics.median(pairs[chosen.sides[-1]].bare for pairs in rounds)
        print(f"(b) without the head: {fastest * bench.flops_per_token / 1e12:.3f} TFLOP/s")
        if bench.waiting:
            print(f"(f) waits for its writer {statistics.median(bench.waiting):.1%} of the time; ", end="")
            print(f"start-up (model proved, first segment): {statistics.median(bench.startup):.2f} s")


if __name__ == "__main__":
    main()
