"""What a configuration promises about a whole model, including its family's own rules.

In: a configuration. Out: its number of layers, those that should hold routed experts, experts per token, the longest
context. `moewh.ingest.model.layers` checks the model against these.
"""

from __future__ import annotations

from typing import Any

from moewh.ingest.families.configuration import decoder_layers, text_config, visits
from moewh.ingest.families.find import family_of
from moewh.warehouse.errors import MoewhError


def num_layers(config: Any) -> int:
    """Layers of the text stack; both stacks of an encoder-decoder; in a looping model, each visit counts."""
    text = text_config(config)
    return visits(config, int(text.num_hidden_layers))[0] + (decoder_layers(text) if config.is_encoder_decoder else 0)


def expected_layers(config: Any) -> list[int]:
    """Return the layers that should hold routed experts by the configuration, with the model's own numbers."""
    try:
        return family_of(config).routed_layers(config)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise MoewhError(
            f"the configuration of model type {text_config(config).model_type} does not say which layers have routed "
            f"experts ({error}). Correct it, or fetch it again."
        ) from error


def top_k(config: Any) -> int:
    """Experts per token K; the largest where layers differ."""
    return family_of(config).top_k(config)


def max_positions(config: Any) -> int | None:
    """Return the longest context the configuration allows, in tokens; None if it sets no limit.

    Raises MoewhError for a value that is not a whole number.
    """
    stated = getattr(text_config(config), "max_position_embeddings", None)
    if stated is None:
        return None
    whole = isinstance(stated, (int, float)) and not isinstance(stated, bool) and stated == stated // 1
    if not whole:
        raise MoewhError(f"the configuration has max_position_embeddings = {stated!r}, which is not a whole number.")
    return int(stated) if stated > 0 else None
