"""Expert pruning: held-out loss of the demo model without a share of its experts, chosen in several ways.

    python -m benchmarks.pruning [--share 0.25] [--seeds N] [--windows N] [--revision NAME]

For calibration, windows of the training documents are ingested with --expert-outputs. Each criterion is a rank of the
view `expert_saliency`: equally many experts are dropped in every layer, with their rows of the router. There is no
training afterwards. Random choices are made with several seeds. The loss is in nats per token, on windows of documents
held out from training, with equal weight for each domain.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, OlmoeForCausalLM

import moewh
from benchmarks.timing import machine
from moewh.ingest import demo
from moewh.ingest.demo.corpus import DOMAINS, documents, split
from moewh.ingest.demo.heldout import model_loss, windows
from moewh.ingest.demo.tokenizer import encode

Dropped = dict[int, list[int]]
"""Layer → its dropped experts."""
WINDOW = 256
CALIBRATION_WINDOWS = 24
"""Windows per domain."""
RUN = "calibration"
DROP = """
select
    expert_saliency.layer as layer,
    expert_saliency.expert as expert
from expert_saliency
join layers
    on layers.run_id = expert_saliency.run_id
    and layers.layer = expert_saliency.layer
where expert_saliency.run_id = '{run}'
    and expert_saliency.{rank} > layers.num_experts - {dropped}
order by layer, expert
"""
"""Lists the experts to drop, `dropped` per layer."""
RANKS = {
    "mean weight · norm (REAP)": "mean_weighted_norm_rank",
    "mean norm (EAN, MAN)": "mean_norm_rank",
    "mean squared norm (MSAN)": "mean_squared_norm_rank",
    "sum of weight · norm": "weighted_norm_sum_rank",
    "sum of norms": "norm_sum_rank",
    "choices (least used)": "choices_rank",
}
"""The criterion by which the dropped experts are least, and its rank."""
HEADER = f"| dropped experts are least by | loss | more than whole | {' | '.join(DOMAINS)} |"


@dataclass(frozen=True)
class Trial:
    """The held-out loss of one model, by domain."""

    of_domain: dict[str, float]

    @property
    def loss(self) -> float:
        """The mean over domains."""
        return statistics.mean(self.of_domain.values())


def calibrate(root: Path, revision: str | None, texts: dict[str, list[str]]) -> None:
    """Ingest the calibration set with expert outputs."""
    prompts = root / "calibration.jsonl"
    rows = ({"text": text, "domain": domain} for domain, of_domain in texts.items() for text in of_domain)
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    moewh.ingest("demo", [prompts], root / "wh", run_id=RUN, revision=revision, expert_outputs=True)


def to_drop(root: Path, rank: str, dropped: int) -> Dropped:
    """Return the last experts by a rank of `expert_saliency`."""
    with moewh.open(root / "wh") as warehouse:
        rows = warehouse.sql(DROP.format(run=RUN, rank=rank, dropped=dropped)).fetchall()
    return _by_layer(rows)


def at_random(layers: int, experts: int, dropped: int, seed: int) -> Dropped:
    """Return equally many random experts of each layer."""
    rng = np.random.default_rng(seed)
    chosen = (rng.choice(experts, dropped, replace=False) for _ in range(layers))
    return _by_layer((layer, int(expert)) for layer, some in enumerate(chosen) for expert in sorted(some))


def _by_layer(rows: Iterable[tuple[int, int]]) -> Dropped:
    found: Dropped = {}
    for layer, expert in rows:
        found.setdefault(layer, []).append(expert)
    return found


def without_experts(model: OlmoeForCausalLM, dropped: Dropped) -> OlmoeForCausalLM:
    """Return a smaller model, without the dropped experts' matrices and router rows, equally many per layer."""
    config = copy.deepcopy(model.config)
    (fewer,) = {len(experts) for experts in dropped.values()}
    config.num_experts -= fewer
    state = dict(model.state_dict())
    for layer, experts in dropped.items():
        kept = [expert for expert in range(model.config.num_experts) if expert not in experts]
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            key = f"model.layers.{layer}.mlp.{name}"
            state[key] = state[key][kept]
    smaller = OlmoeForCausalLM(config)
    torch.nn.Module.to(smaller, model.dtype)  # the model's own method has no types
    smaller.load_state_dict(state)
    smaller.eval()
    return smaller


def evaluate(model: OlmoeForCausalLM, held_out: dict[str, Any], start: int) -> Trial:
    """Return the held-out loss of a model."""
    return Trial({domain: model_loss(model, windows_WS, start) for domain, windows_WS in held_out.items()})


def row(name: str, trials: list[Trial], whole: Trial) -> str:
    """Return a line of the table: means, and for several trials the deviation and range."""
    losses = [trial.loss for trial in trials]
    spread = f" ± {statistics.stdev(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
    domains = (statistics.mean(trial.of_domain[domain] for trial in trials) for domain in DOMAINS)
    mean = statistics.mean(losses)
    return (
        f"| {name} | {mean:.3f}{spread} | {mean - whole.loss:+.3f} | {' | '.join(f'{loss:.3f}' for loss in domains)} |"
    )


def main() -> None:
    """Calibrate, drop, evaluate, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--windows", type=int, default=32, help="held-out windows per domain")
    parser.add_argument("--revision", help="checkpoint of the demo")
    chosen = parser.parse_args()
    training, held_out = split(documents())
    folder = demo.checkpoint_path(chosen.revision)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers, experts = model.config.num_hidden_layers, model.config.num_experts
    dropped = round(chosen.share * experts)

    def cut(some: list[Any], domain: str, most: int) -> Any:
        return windows(np.concatenate(encode(tokenizer, some, domain)), WINDOW, most)

    calibration = {domain: cut(training, domain, CALIBRATION_WINDOWS) for domain in DOMAINS}
    texts = {domain: tokenizer.batch_decode(ids, skip_special_tokens=True) for domain, ids in calibration.items()}
    unseen = {domain: cut(held_out, domain, chosen.windows) for domain in DOMAINS}
    start = tokenizer.bos_token_id
    whole = evaluate(model, unseen, start)
    print(f"{machine()}; torch {torch.__version__}\n")
    print(f"{dropped} of {experts} experts of each layer are dropped.\n\n{HEADER}\n{'|---' * HEADER.count(' | ')}|---|")
    print(row("none: the whole model", [whole], whole), flush=True)
    with tempfile.TemporaryDirectory() as root:
        calibrate(Path(root), chosen.revision, texts)
        for name, rank in RANKS.items():
            print(
                row(name, [evaluate(without_experts(model, to_drop(Path(root), rank, dropped)), unseen, start)], whole)
            )
    trials = [
        evaluate(without_experts(model, at_random(layers, experts, dropped, seed)), unseen, start)
        for seed in range(chosen.seeds)
    ]
    print(row(f"nothing: at random, {chosen.seeds} seeds", trials, whole), flush=True)


if __name__ == "__main__":
    main()
