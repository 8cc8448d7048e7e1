"""However a sequence ends in `generate`, what it is fed while its batch continues is recorded as no token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import moewh
from moewh.warehouse.errors import MoewhError
from tests.support.models import byte_tokenizer
from tests.support.recorded import batch, expected, model_of, record, recorded, watched

NEW, STEP = 7, 2
"""Tokens of the longest sequence; the one after which the first sequence ends."""
FILL = 33
TEXTS = ("abc", "xyz")


def unstopped(model: Any) -> torch.Tensor:
    """What the model says if nothing ends it."""
    said: torch.Tensor = model.generate(**batch(TEXTS), max_new_tokens=NEW, do_sample=False)[:, 4:]
    assert said[0, STEP] not in said[1] and said[0, STEP] not in said[0, :STEP] and 0 not in said
    return said


class _First(StoppingCriteria):
    """Ends the first sequence once it is long enough, and only then reports it."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        del scores
        return torch.tensor([input_ids.shape[1] == 4 + STEP + 1, False])


def _end_token(end: int) -> dict[str, Any]:
    return {"eos_token_id": end, "pad_token_id": FILL}


def _settings(end: int) -> dict[str, Any]:
    chosen = GenerationConfig(eos_token_id=[end, 256], pad_token_id=FILL, max_new_tokens=NEW, do_sample=False)
    return {"generation_config": chosen}


def _criterion(_: int) -> dict[str, Any]:
    return {"stopping_criteria": StoppingCriteriaList([_First()]), "pad_token_id": FILL}


def _end_is_padding(end: int) -> dict[str, Any]:
    return {"eos_token_id": end, "pad_token_id": end}


class _Guided(LogitsProcessor):
    """Runs a batch of its own in each step, as guidance does."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        del input_ids
        self._calls += 1
        self._model(input_ids=torch.tensor([[100 + self._calls, 7, 8], [200 + self._calls, 7, 8]]))
        return scores


@pytest.mark.parametrize("ending", [_end_token, _settings, _criterion, _end_is_padding])
@pytest.mark.parametrize("guided", [False, True])
def test_padding_after_the_end_is_no_token(
    ending: Callable[[int], dict[str, Any]], guided: bool, tmp_path: Path
) -> None:
    model = model_of("olmoe")
    said = unstopped(model)
    options = {"max_new_tokens": NEW, "do_sample": False, **ending(int(said[0, STEP]))}
    if guided:
        options["logits_processor"] = LogitsProcessorList([_Guided(model)])
    with record(model, tmp_path, "run"), watched(model) as passes:
        told = model.generate(**batch(TEXTS), **options)[:, 4:]
    assert told[0, : STEP + 1].tolist() == said[0, : STEP + 1].tolist() and told.shape == said.shape
    assert "generate" not in vars(model) and "_get_stopping_criteria" not in vars(model)
    own = [seen for seen in passes if len(seen[0][0]) in (8, 2)]
    found = recorded(tmp_path, "run")
    assert len(found) == 2 + 2 * NEW * guided
    assert all(len(rows) == 3 * len(model.model.layers) for ids, rows in found.items() if len(ids) == 3)
    for row, rows in enumerate(rows for ids, rows in found.items() if len(ids) == 4):
        wanted = expected(own[0], torch.ones(2, 4), row)
        fed = STEP if row == 0 else NEW - 1
        for step in range(fed):
            one = expected(own[1 + step], torch.ones(2, 1), row)
            wanted |= {(4 + step, layer): pairs for (_, layer), pairs in one.items()}
        assert rows == wanted
    tokens = "select vocab_id from tokens where prompt_id = $prompt and kind = 'generated' order by token_id"
    stored = moewh.open(tmp_path).sql(tokens, prompt=0).fetchall()
    assert [token for (token,) in stored] == said[0, : STEP + 1].tolist()


def test_padding_without_a_cache_is_no_token(tmp_path: Path) -> None:
    """Each step is a pass over whole sequences, with the padding of the finished one."""
    model = model_of("olmoe")
    end = int(unstopped(model)[0, STEP])
    with record(model, tmp_path, "run"):
        model.generate(**batch(TEXTS), max_new_tokens=NEW, do_sample=False, use_cache=False, **_end_token(end))
    lengths = "select num_tokens from prompts order by prompt_id"
    found = [length for (length,) in moewh.open(tmp_path).sql(lengths).fetchall()]
    assert found[1::2] == [4 + step for step in range(NEW)]
    assert found[::2] == [min(4 + step, 4 + STEP + 1) for step in range(NEW)]


def test_a_model_without_an_end_token_goes_on(tmp_path: Path) -> None:
    """Then `generate` pads nothing: a criterion that holds for one sequence does not end it."""
    model = model_of("olmoe")
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        with record(model, tmp_path, "run"):
            stop = StoppingCriteriaList([_First()])
            model.generate(**batch(TEXTS), max_new_tokens=NEW, do_sample=False, stopping_criteria=stop)
    finally:
        model.generation_config.eos_token_id = before
    counts = moewh.open(tmp_path).sql("select num_tokens from prompts").fetchall()
    assert counts == [(4 + NEW - 1,)] * 2


def test_a_loop_by_hand_keeps_what_it_feeds(tmp_path: Path) -> None:
    """An end token followed by padding ends nothing outside of `generate`: the model saw tokens."""
    model = model_of("olmoe")
    with record(model, tmp_path, "run"), torch.no_grad():
        cache = model(**batch(TEXTS)).past_key_values
        for token in (0, 0, 5):
            model(input_ids=torch.tensor([[token], [6]]), past_key_values=cache)
    assert moewh.open(tmp_path).sql("select num_tokens from prompts").fetchall() == [(7,)] * 2


def test_a_finished_sequence_that_goes_on_is_refused(tmp_path: Path) -> None:
    """Its padding lies between its tokens in the cache."""
    model = model_of("olmoe")
    end = int(unstopped(model)[0, STEP])
    with pytest.raises(MoewhError, match="a finished sequence goes on"), record(model, tmp_path, "run"):
        options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **_end_token(end)}
        cache = model.generate(**batch(TEXTS), **options).past_key_values
        model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)


def test_a_model_s_own_generate_is_put_back(tmp_path: Path) -> None:
    model = model_of("olmoe")
    calls, generate = [], model.generate

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return generate(*args, **kwargs)

    model.generate = mine
    try:
        with record(model, tmp_path, "run"):
            model.generate(**batch(TEXTS), max_new_tokens=2, do_sample=False)
        assert model.generate is mine and len(calls) == 1
    finally:
        del model.generate


def test_a_run_without_any_token_is_refused(tmp_path: Path) -> None:
    model = model_of("olmoe")
    given = {**batch(TEXTS), "attention_mask": torch.zeros(2, 4)}
    with pytest.raises(MoewhError, match="masks every position"), record(model, tmp_path, "run"):
        model(**given)
    assert moewh.open(tmp_path).sql("select status from runs").fetchall() == [("running",)]
    with record(model, tmp_path, "some"):
        model(**given)
        model(input_ids=torch.tensor([byte_tokenizer()("abc")["input_ids"]]))
    assert moewh.open(tmp_path).sql("select status, prompts from runs where run_id = 'some'").fetchall() == [
        ("complete", 1)
    ]
