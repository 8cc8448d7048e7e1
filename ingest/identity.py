"""Describe a run of a model as a `RunRecord`: everything that shapes its rows, and the rows that describe it.

Two commands with an equal identity write equal rows, so the second resumes the first. A run_id that is
reused with another identity is refused with a message that lists the differences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import torch
import transformers

from moewh.ingest.families.rule import MoELayer, unwrapped
from moewh.ingest.model.expected import num_layers
from moewh.ingest.model.loading import LoadedModel, config_sha256
from moewh.ingest.options import IngestOptions, shaping_options
from moewh.ingest.prompts.stream import PromptPlan
from moewh.ingest.prompts.template_time import KEY as TEMPLATE_TIME
from moewh.ingest.prompts.template_time import as_seen
from moewh.ingest.prompts.tokenise import TokenRules, tokenizer_sha256
from moewh.ingest.proof.measure import LayerFacts
from moewh.ingest.record import Identity, RunRecord, default_run_id
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout, deleted
from moewh.warehouse.files.manifest import MANIFEST, read_manifest
from moewh.warehouse.files.names import SEGMENT_FOLDER, check_run_id
from moewh.warehouse.files.tables import run_row

_CONTENTS = {
    "prompts_sha256": " (text, domain, metadata and source, which is the file's name unless a column names it)"
}
"""What a digest is of, for a reader who has only two of them to compare."""
_LABELS = ("series", "train_step", "train_tokens")
"""Options that are columns of `runs` and no part of a run's identity."""


def identify(loaded: LoadedModel, options: IngestOptions, rules: TokenRules, plan: PromptPlan) -> Identity:
    """Return the identity of the run that these options describe, and its run_id.

    The run_id does not depend on the time that a chat template sees, because it is used to find the run that recorded
    that time.
    """
    config = loaded.config
    shaping = {
        "model": loaded.source.name if loaded.weights_sha256 else loaded.source.title,
        "revision": loaded.commit or loaded.source.checkpoint,
        "config_sha256": config_sha256(config),
        "weights_sha256": loaded.weights_sha256,
        "attn_implementation": getattr(config, "_attn_implementation", None),
        "experts_implementation": getattr(config, "_experts_implementation", None),
        "tokenizer_sha256": tokenizer_sha256(loaded.tokenizer),
        "prompts_sha256": plan.prompts_sha256,
    }
    found = {"dtype": _dtype(loaded), "max_length": rules.max_length, "chat_arguments": rules.chats.arguments}
    shaping |= shaping_options(options, found)
    if loaded.generation_tokens is not None and loaded.commit is None:
        shaping |= loaded.generation_tokens.shaping
    if rules.chats.generation_prompt:
        shaping["generation_prompt"] = True
    if plan.pinned:
        shaping["datasets"] = list(plan.pinned)
    shaping |= in_memory_identity(loaded)
    run_id = options.run_id or default_run_id(loaded.source.name, shaping)
    if rules.chats.now is not None:
        shaping[TEMPLATE_TIME] = as_seen(rules.chats.now, loaded.tokenizer)
    return Identity(shaping, check_run_id(run_id))


def in_memory_identity(loaded: LoadedModel) -> dict[str, Any]:
    """Return the part of the identity that describes a model in memory.

    Hooks and replaced code are known by name only, so a run with any of them gets an identity that no other run has.
    """
    if loaded.patches is None:
        return {}
    return {"in_memory": True} | ({"patches": list(loaded.patches), "unlike": uuid4().hex} if loaded.patches else {})


def require_same(layout: Layout, identity: Identity) -> bool:
    """Return whether the run is already in the warehouse. Raises MoewhError if its run_id belongs to another run."""
    row = run_row(layout.run(identity.run_id))
    if row is None:
        _require_same_segments(layout, identity)
        return False
    if row["identity"] == identity.sha256:
        return True
    stored = json.loads(row["options"])
    differing = [name for name in {**stored, **identity.shaping} if stored.get(name) != identity.shaping.get(name)]
    changes = "; ".join(
        f"{name} was {_given(stored, name)}, now {_given(identity.shaping, name)}{_CONTENTS.get(name, '')}"
        for name in differing
    )
    raise MoewhError(
        f"run {identity.run_id!r} exists and is another run: {changes}. "
        f"Choose another --run-id, or delete it with `moewh runs --delete {identity.run_id} {layout.option}`."
    )


def require_same_labels(layout: Layout, run_id: str, options: IngestOptions) -> None:
    """Raise UsageError for a label that was given and differs from a run's own, which was written when it began.

    Raises MoewhError if another command has deleted the run.
    """
    row = run_row(layout.run(run_id), list(_LABELS))
    if row is None:
        raise deleted(run_id)
    for name in _LABELS:
        given, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if given is not None and given != row[name]:
            begun = "without one" if row[name] is None else f"with {row[name]}"
            raise UsageError(
                f"{flag} is {given}, but run {run_id!r} began {begun}. Leave {flag} out, choose another --run-id, "
                f"or delete the run with `moewh runs --delete {run_id} {layout.option}`."
            )


def _given(shaping: Mapping[str, Any], name: str) -> str:
    value = shaping.get(name)
    return "not given" if value is None else str(value)


def has_planned_segments(layout: Layout, run_id: str) -> bool:
    """Return whether a run has as many segments as its own row plans; False if that row is missing."""
    row = run_row(layout.run(run_id), ["segments_planned"])
    if row is None or row["segments_planned"] is None:
        return False
    return len(list(layout.segments(run_id).glob(f"{SEGMENT_FOLDER}*"))) >= int(row["segments_planned"])


def _require_same_segments(layout: Layout, identity: Identity) -> None:
    """Raise MoewhError if a run has lost its own files and its segments belong to another run."""
    for path in layout.segments(identity.run_id).glob(f"{SEGMENT_FOLDER}*/{MANIFEST}"):
        if read_manifest(path.parent).identity != identity.sha256:
            raise MoewhError(
                f"run {identity.run_id!r} has lost its own files, and its segments belong to another run. "
                "Run the command that began it, which writes them again, choose another --run-id, or delete it with "
                f"`moewh runs --delete {identity.run_id} {layout.option}`."
            )


def describe_run(loaded: LoadedModel, identity: Identity, facts: dict[int, LayerFacts], plan: PromptPlan) -> RunRecord:
    """Return a run as plain data: its identity, and the facts measured on its model."""
    shaping = identity.shaping
    run = {
        "model": loaded.source.title,
        "revision": loaded.source.checkpoint,
        "commit_hash": loaded.commit,
        "series": loaded.source.series,
        "model_type": loaded.text_config.model_type,
        "num_hidden_layers": num_layers(loaded.config),
        "num_moe_layers": len(loaded.moe_layers),
        "num_experts": max(moe.num_experts for moe in loaded.moe_layers),
        "top_k": max(fact.top_k for fact in facts.values()),
        "dtype": shaping["dtype"],
        "attn_implementation": shaping["attn_implementation"],
        "experts_implementation": shaping["experts_implementation"],
        "device": loaded.model.device.type,
        "threads": torch.get_num_threads(),
        "max_length": shaping["max_length"],
        "train_step": loaded.train_step,
        "train_tokens": loaded.train_tokens,
        "prompts_sha256": plan.prompts_sha256,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "segments_planned": plan.segments,
        "origin": "forward",
    }
    layers = [layer_row(moe, facts[moe.layer]) for moe in loaded.moe_layers]
    experts = [row for moe in loaded.moe_layers for row in expert_rows(moe, facts[moe.layer])]
    return RunRecord(identity, run, layers, experts)


def layer_row(moe: MoELayer, facts: LayerFacts) -> dict[str, Any]:
    """Return a layer's row in the table `layers`."""
    return {
        "layer": moe.layer,
        "stack": moe.stack,
        "module": moe.path,
        "router_class": type(unwrapped(moe.router)).__name__ if moe.router is not None else None,
        "num_experts": moe.num_experts,
        "top_k": facts.top_k,
        "scoring": facts.scoring,
        "renormalized": facts.renormalized,
        "post_scale": facts.post_scale,
        "num_shared_experts": facts.num_shared_experts,
        "router_input": facts.router_input,
    }


def expert_rows(moe: MoELayer, facts: LayerFacts) -> list[dict[str, Any]]:
    """Return the rows of a layer's experts in the table `experts`."""
    biases = facts.selection_bias or (None,) * moe.num_experts
    return [
        {"layer": moe.layer, "expert": expert, "kind": kind, "selection_bias": biases[expert]}
        for expert, kind in enumerate(moe.kinds)
    ]


def _dtype(loaded: LoadedModel) -> str:
    return str(loaded.model.dtype).removeprefix("torch.")
