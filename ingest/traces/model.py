"""The model of a trace: a hub id, a folder or a configuration file in, a `TraceModel` out; no weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moewh.ingest import demo
from moewh.ingest.families.configuration import text_config
from moewh.ingest.families.rule import MoELayer
from moewh.ingest.identity import expert_rows, layer_row
from moewh.ingest.model.architecture import check_location, check_versions, empty_model, read_config
from moewh.ingest.model.expected import num_layers, top_k
from moewh.ingest.model.layers import find_moe_layers
from moewh.ingest.model.loading import config_sha256, explaining, silence_libraries
from moewh.ingest.options import DEMO
from moewh.ingest.proof.measure import declared_facts
from moewh.ingest.traces.trace import TraceModel
from moewh.warehouse.errors import MoewhError, short_message


def read_model(model: str, revision: str | None = None, trust_remote_code: bool = False) -> TraceModel:
    """Return a model's layers and experts from its configuration.

    Raises MoewhError if there is no configuration, or the model has no experts.
    """
    check_versions()
    silence_libraries()
    check_location(model, revision, settings=True)
    location = str(demo.checkpoint_path(revision)) if model == DEMO else model
    with explaining(model):
        hub = {} if Path(location).exists() else {"revision": revision}
        config = read_config(location, trust_remote_code=trust_remote_code, **hub)
    moe_layers = _moe_layers(model, config, trust_remote_code)
    text_part: Any = text_config(config)
    chosen = top_k(config)
    facts = [(moe, declared_facts(moe, config)) for moe in moe_layers]
    experts_L = np.array([moe.num_experts for moe in moe_layers], np.int64)
    vocabulary = getattr(text_part, "vocab_size", None)
    return TraceModel(
        title=model,
        name=_name(model),
        config_sha256=config_sha256(config),
        num_hidden_layers=num_layers(config),
        layers=tuple(moe.layer for moe in moe_layers),
        experts_L=experts_L,
        top_k=chosen,
        vocabulary=vocabulary if isinstance(vocabulary, int) else None,
        run={
            "model": model,
            "revision": revision,
            "model_type": text_part.model_type,
            "num_hidden_layers": num_layers(config),
            "num_moe_layers": len(moe_layers),
            "num_experts": int(experts_L.max()),
            "top_k": chosen,
        },
        layer_rows=[layer_row(moe, fact) for moe, fact in facts],
        expert_rows=[row for moe, fact in facts for row in expert_rows(moe, fact)],
    )


def _moe_layers(model: str, config: Any, trust_remote_code: bool) -> list[MoELayer]:
    try:
        return find_moe_layers(empty_model(config, trust_remote_code), config).moe_layers
    except MoewhError:
        raise
    except Exception as error:
        raise MoewhError(
            f"transformers cannot build {model} from its configuration: {short_message(error)}. Complete it."
        ) from error


def _name(model: str) -> str:
    """Return the last part of a hub id or path; for a file named config.json, that of its folder."""
    path = Path(model)
    if path.suffix == ".json":
        return path.absolute().parent.name if path.stem == "config" else path.stem
    return path.absolute().name if path.exists() else path.name
