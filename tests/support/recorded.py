"""What `moewh.record` stored, and what the experts of the recorded passes were called with, by the tests' own hooks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import moewh
from tests.support.families import FAMILIES, build
from tests.support.models import byte_tokenizer

Rows = dict[tuple[int, int], list[tuple[int, float]]]
"""(position, layer) → [(expert, weight) by rank]"""


def ids_of(text: str) -> list[int]:
    return list(byte_tokenizer()(text)["input_ids"])


@functools.cache
def model_of(name: str) -> Any:
    """A small model of a family; tests leave it as it is."""
    return build(next(family for family in FAMILIES if family.name == name))


def recorded(warehouse: Path, run: str) -> dict[tuple[int, ...], Rows]:
    """{ids of a sequence that the model was given: its rows}"""
    opened = moewh.open(warehouse)
    given: dict[int, list[int]] = {}
    asked = "select prompt_id, vocab_id from tokens where run_id = $run and kind <> 'generated' order by token_id"
    for prompt, token in opened.sql(asked, run=run).fetchall():
        given.setdefault(prompt, []).append(token)
    found: dict[tuple[int, ...], Rows] = {tuple(ids): {} for ids in given.values()}
    asked = """
        select token_id >> 24, token_id & 16777215, layer, expert, weight
        from routing
        where run_id = $run
        order by token_id, layer, rank
    """
    for prompt, position, layer, expert, weight in opened.sql(asked, run=run).fetchall():
        found[tuple(given[prompt])].setdefault((position, layer), []).append((expert, weight))
    assert len(found) == len(given)
    return found


def batch(texts: tuple[str, ...], side: str = "right", pad: int = 0) -> dict[str, torch.Tensor]:
    """Ids and mask of texts padded on one side."""
    ids = [ids_of(text) for text in texts]
    S = max(map(len, ids))
    rows = [([pad] * (S - len(one)), one) for one in ids]
    padded = [one + fill if side == "right" else fill + one for fill, one in rows]
    masks = [
        [1] * len(one) + [0] * len(fill) if side == "right" else [0] * len(fill) + [1] * len(one) for fill, one in rows
    ]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)}


@contextmanager
def watched(model: Any) -> Iterator[list[dict[int, tuple[torch.Tensor, torch.Tensor]]]]:
    """The arguments of OLMoE's experts, by pass and layer, seen by the test's own hooks."""
    passes: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = []

    def hook(layer: int) -> Any:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, experts, weights = (*args, *kwargs.values())
            if not passes or layer in passes[-1]:
                passes.append({})
            passes[-1][layer] = (experts.detach().clone(), weights.detach().clone())

        return before

    handles = [
        layer.mlp.experts.register_forward_pre_hook(hook(number), with_kwargs=True)
        for number, layer in enumerate(model.model.layers)
    ]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def expected(seen: dict[int, tuple[torch.Tensor, torch.Tensor]], mask: torch.Tensor, row: int) -> Rows:
    """The rows of one sequence of a pass over a padded batch."""
    S = mask.shape[1]
    places = mask[row].nonzero().flatten().tolist()
    found: Rows = {}
    for layer, (experts, weights) in seen.items():
        for position, place in enumerate(places):
            pairs = zip(experts[row * S + place].tolist(), weights[row * S + place].float().tolist(), strict=True)
            found[position, layer] = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
    return found


def record(model: Any, warehouse: Path, run: str, **options: Any) -> Any:
    return moewh.record(model, byte_tokenizer(), warehouse=warehouse, run_id=run, **options)
