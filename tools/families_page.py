"""Generate docs/families.md: every family and the tests' result for it, from the tests' own run.

`python -m tools.families_page` rewrites it, and a test compares it with the file.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers

from moewh.ingest.families.find import adapter_of
from moewh.warehouse.errors import MoewhError
from tests.support.families import FAMILIES, Family, adapters, configuration, present
from tests.support.observed_families import Ingested, failure, observed

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "families.md"

_HEAD = """# MoE families

Made by `make docs` from the tests' own run: each family is built as a tiny random model and ingested, and its stored
rows are compared with arithmetic done in the test. Exact means that Σ weight · expert(x) · factor is what the block
outputs, to 1e-5 in float32; that no padding has rows; and that a token's experts do not depend on its batch.

With transformers {version}: **{exact} of {present} families are exact**{rest}. With 5.19.0, the oldest supported
version: 62 of 63, 1 refused (`pip install transformers==5.19.0`, then `pytest tests/ingest/test_families.py`, as the
workflow does).

- *MoE layers*: the layers with routed experts among the tiny model's four, without dense and attention-only ones
  (longcat_flash has three layers, inkling2_loop eight visits of four).
- *A token's weights* multiply the experts' outputs inside the block, before the factor (`layers.post_scale`).
- *Router reads*: `experts` means the tensor that the experts get; `own` means another tensor, or more than one.
- An encoder-decoder's prompts go through its encoder, whose layers are recorded. With `--generate`, the decoder's
  layers are recorded too, numbered after the encoder's, for the tokens that it generates.
- A model that loops over some of its layers (inkling2_loop) has a layer per visit, numbered in execution order, as
  transformers numbers its hidden states. `layers.module` is the module that several visits share.
- Experts that moewh cannot observe are refused by name, as are calls of experts without one row per token: a family
  newer than this table is either recorded completely or refused.
- A family without an adapter follows the rule and needs no code in moewh.

| family | class | recorded | MoE layers | scoring | a token's weights | factor after | shared | router reads |
|---|---|---|---|---|---|---|---|---|
"""


def families_page() -> str:
    """Return the page, from the tests' results (computed now if needed)."""
    rows = {family: _row(family) for family in FAMILIES if present(family)}
    refused = sum("refused" in row for row in rows.values())
    differing = sum("NOT EXACT" in row for row in rows.values())
    rest = f", {refused} refused" + (f", {differing} not exact" if differing else "")
    exact = len(rows) - refused - differing
    head = _HEAD.format(version=transformers.__version__, exact=exact, present=len(rows), rest=rest)
    return head + "".join(rows.values()) + "\n" + _adapters()


def pinned_transformers() -> str:
    """Return the version of transformers that the page describes."""
    found = re.search(r"^transformers==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def _row(family: Family) -> str:
    try:
        run = observed(family)
    except MoewhError as refusal:
        return f"| {family.name} | {family.model} | refused: {_reason(refusal)} |  |  |  |  |  |  |\n"
    error = failure(family)
    status = "exact" if error is None else f"NOT EXACT: {' '.join(str(error).split())[:80]}"
    if adapter := adapter_of(configuration(family).model_type):
        status += f", adapter {type(adapter).__name__}"
    fact = run.layers[-1]
    norm = {True: "renormalized", False: "not renormalized", None: "unknown"}[fact["renormalized"]]
    layers = ", ".join(str(row["layer"]) for row in run.layers)
    cells = (
        *(family.name, family.model, status, layers, fact["scoring"], f"{norm}; {_sums(run)}"),
        *(f"{fact['post_scale']:g}", str(fact["num_shared_experts"]), fact["router_input"]),
    )
    return "| " + " | ".join(cells) + " |\n"


def _sums(run: Ingested) -> str:
    """Describe the sum of a token's weights."""
    if run.layers[-1]["top_k"] == 1:
        return "one per token"
    sums = [sum(weight for _, weight in pairs) for pairs in run.alone.values()]
    return f"sum to {sums[0]:.3g}" if max(sums) - min(sums) < 1e-4 * max(sums) else "sums differ"


def _reason(refusal: MoewhError) -> str:
    return str(refusal).partition(": ")[2].partition(". ")[0]


def _adapters() -> str:
    lines = ["## Adapters", ""]
    for name, adapter in adapters().items():
        if adapter.refused:
            continue
        note = " Prompts are run one by one." if adapter.one_context_per_batch else ""
        first = (type(adapter).__doc__ or "").strip().splitlines()[0]
        lines.append(f"- `{name}`: {first}{note}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite the page."""
    torch.set_num_threads(1)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(families_page())


if __name__ == "__main__":
    main()
