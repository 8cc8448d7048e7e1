"""Generation is argmax, or uses only the temperature; from generation_config.json, only end tokens are used."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from click.testing import CliRunner

from moewh.cli.main import main
from moewh.ingest.capture.generation import generate_batch, plan_equal_batches
from moewh.ingest.capture.vectors import WantedVectors
from moewh.ingest.model.loading import load_model
from moewh.ingest.options import IngestOptions
from moewh.ingest.prompts.canonical import CANONICAL
from moewh.ingest.prompts.tokenise import TokenRules, tokenise
from moewh.ingest.run import ingest
from moewh.warehouse.files.layout import Layout
from tests.support.families import FAMILIES, build
from tests.support.models import byte_tokenizer
from tests.support.opened import viewed

NEW = 5
IDS = [[5, 9, 5, 9, 5], [40, 41, 42, 40, 41], [200, 3]]
TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")
SETTINGS: dict[str, Any] = {
    **{"max_length": 7, "max_new_tokens": 2, "min_length": 30, "min_new_tokens": 30, "early_stopping": True},
    **{"max_time": 1e-9, "stop_strings": ["a", "e", "t"], "do_sample": True, "num_beams": 3, "use_mtp": True},
    **{"use_cache": False, "cache_implementation": "static", "cache_config": {"backend": "quanto"}, "max_cache_len": 4},
    **{"temperature": 3.0, "top_k": 3, "top_p": 0.3, "min_p": 0.5, "top_h": 0.5, "typical_p": 0.2},
    **{"epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "repetition_penalty": 5.0, "encoder_repetition_penalty": 0.1},
    **{"length_penalty": 5.0, "no_repeat_ngram_size": 1, "bad_words_ids": "said", "renormalize_logits": True},
    **{"forced_bos_token_id": 77, "forced_eos_token_id": 77, "remove_invalid_values": True},
    **{"exponential_decay_length_penalty": [1, 50.0], "suppress_tokens": "said", "begin_suppress_tokens": "said"},
    **{"sequence_bias": "said", "token_healing": True, "guidance_scale": 4.0},
    **{"watermarking_config": {"greenlist_ratio": 0.1, "bias": 50.0}, "num_return_sequences": 2},
    **{"output_attentions": True, "output_hidden_states": True, "output_scores": True, "output_logits": True},
    **{"return_dict_in_generate": True, "encoder_no_repeat_ngram_size": 1, "is_assistant": True},
    **{"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.1},
    **{"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "assistant_early_exit": 1},
    **{"assistant_lookbehind": 1, "target_lookbehind": 1, "assistant_ensemble_weight": 0.9, "speculation_type": "x"},
    **{"compile_config": {"mode": "default"}, "disable_compile": True, "continuous_batching_config": {"a": 1}},
    **{"low_memory": True, "penalty_alpha": 0.6, "dola_layers": "low", "diversity_penalty": 2.0, "num_beam_groups": 3},
    **{"constraints": [1], "force_words_ids": [[77]], "prefill_chunk_size": 2, "transformers_version": "9.9.9"},
}
"""For each setting, a value that would change the output if anything does; "said" is the output without it."""
MATTERING = (
    *("bad_words_ids", "begin_suppress_tokens", "do_sample", "max_time"),
    *("exponential_decay_length_penalty", "forced_eos_token_id", "guidance_scale", "no_repeat_ngram_size", "num_beams"),
    *("num_return_sequences", "repetition_penalty", "sequence_bias", "stop_strings", "suppress_tokens"),
    *("return_dict_in_generate", "watermarking_config", "max_new_tokens"),
)
"""Settings for which transformers' own `generate` gives another output, or none, with the values above."""
NAMES = [name for name in vars(transformers.GenerationConfig()) if not name.startswith("_") and name not in TOKENS]
_OTHERS = [name for name in NAMES if name not in MATTERING]
SETS = [*((name,) for name in NAMES if name in MATTERING), *(tuple(_OTHERS[start::4]) for start in range(4))]
"""Each setting that matters by itself, and the others in groups, because they can only fail."""


@pytest.fixture(scope="module", params=["olmoe", "switch_transformers"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    family = next(family for family in FAMILIES if family.name == request.param)
    # With tied embeddings, random weights repeat the same token; with a capacity, a pass over all tokens drops some
    # that a single step does not. Two layers in place of four: what is set here concerns no layer.
    if request.param == "olmoe":
        changes: dict[str, Any] = {"num_hidden_layers": 2}
    else:
        changes = {"num_hidden_layers": 2, "num_layers": 2, "num_decoder_layers": 2, "expert_capacity": 64}
        changes |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    model: Any = build(dataclasses.replace(family, changes={**family.changes, **changes, "tie_word_embeddings": False}))
    with torch.no_grad():
        model.lm_head.weight.mul_(20 if request.param == "olmoe" else 1.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return class_of(folder).from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def unended(model: Any) -> list[list[int]]:
    """What the model says if no token ends it."""
    return [argmax_loop(model, ids) for ids in IDS]


@pytest.fixture(scope="module")
def greedy(unended: list[list[int]]) -> list[list[int]]:
    return [until(tokens, {0}) for tokens in unended]


@pytest.fixture(scope="module")
def sampled(model: Any) -> list[list[int]]:
    """Samples with temperature 2.5 and seed 3."""
    samples = []
    for prompt, tokens in enumerate(IDS):
        generator = np.random.default_rng([3, prompt])
        # The greatest of logits / temperature + Gumbel noise is a sample of softmax(logits / temperature).
        noise = lambda logits, g=generator: logits / 2.5 + torch.from_numpy(g.gumbel(size=len(logits))).float()  # noqa: E731
        samples.append(until(argmax_loop(model, tokens, noise=noise), {0}))
    return samples


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in IDS))
    return path


def class_of(folder: Path) -> Any:
    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


def until(tokens: list[int], ends: set[int]) -> list[int]:
    """Cut tokens after the first that ends them."""
    return tokens[: next((place for place, token in enumerate(tokens, 1) if token in ends), None)]


def argmax_loop(model: Any, ids: list[int], start: int = 0, noise: Any = None) -> list[int]:
    """Generate after a prompt with a whole forward pass per token; `noise(logits)` is added before the argmax."""
    said: list[int] = []
    while len(said) < NEW:
        decoder = {"decoder_input_ids": torch.tensor([[start, *said]])} if model.config.is_encoder_decoder else {}
        fed = ids if decoder else ids + said
        with torch.inference_mode():
            logits_V = model(input_ids=torch.tensor([fed]), use_cache=False, **decoder).logits[0, -1].float()
        said.append(int((logits_V if noise is None else noise(logits_V)).argmax()))
    return said


def with_settings(folder: Path, copy: Path, settings: Any) -> Path:
    """A copy of a model with other generation settings: an object, or the text of the file."""
    shutil.copytree(folder, copy, copy_function=lambda source, target: Path(target).symlink_to(source))
    (copy / "generation_config.json").unlink(missing_ok=True)
    if settings is not None:
        text = settings if isinstance(settings, str) else json.dumps(settings)
        (copy / "generation_config.json").write_text(text)
    return copy


def generated(model: Path, **options: Any) -> list[list[int]]:
    """What a model that is loaded as for an ingest generates, before anything is written."""
    chosen = IngestOptions(model=str(model), prompts=("demo",), generate=NEW, **options)
    loaded = load_model(chosen)
    rows = [{"text": json.dumps(row), "form": "input_ids", "source": "ids"} for row in IDS]
    segment = tokenise(
        pa.Table.from_pylist(rows, CANONICAL), 0, loaded.tokenizer, TokenRules(64, "error", special_tokens=True)
    )
    spoken: dict[int, list[int]] = {}
    assert chosen.sampling is not None
    for contexts in plan_equal_batches(segment.length_C, 4_096, NEW):
        batch = generate_batch(loaded, segment, contexts, chosen.sampling, WantedVectors())
        spoken |= zip(contexts.tolist(), (tokens[batch.starts :] for tokens in batch.generated), strict=True)
    return [spoken[prompt] for prompt in range(len(IDS))]


def said(warehouse: Path, model: Path, ids: Path, **options: Any) -> list[list[int]]:
    ingest(IngestOptions(model=str(model), prompts=(str(ids),), generate=NEW, **options), Layout(warehouse))
    rows = viewed(Layout(warehouse)).execute(
        "select prompt_id, vocab_id from tokens where kind = 'generated' order by token_id"
    )
    spoken: list[list[int]] = [[] for _ in IDS]
    for prompt, token in rows.fetchall():
        spoken[prompt].append(token)
    return spoken


def value_of(name: str, greedy: list[list[int]]) -> Any:
    tokens = sorted({token for tokens in greedy for token in tokens})
    if SETTINGS[name] != "said":
        return SETTINGS[name]
    return {"bad_words_ids": [[t] for t in tokens], "sequence_bias": [[[t], -1e4] for t in tokens]}.get(name, tokens)


def test_every_setting_that_transformers_reads_has_a_value_here() -> None:
    assert set(NAMES) <= set(SETTINGS)


@pytest.mark.parametrize("names", SETS, ids=lambda names: names[0])
def test_settings_of_the_model_shape_nothing(
    names: tuple[str, ...], folder: Path, greedy: list[list[int]], tmp_path: Path
) -> None:
    values = {name: value_of(name, greedy) for name in names}
    settings = {"eos_token_id": 0, "decoder_start_token_id": 0, **values}
    assert generated(with_settings(folder, tmp_path / "m", settings)) == greedy


@pytest.mark.parametrize("name", MATTERING)
def test_these_settings_would_change_what_transformers_says(
    name: str, folder: Path, greedy: list[list[int]], tmp_path: Path
) -> None:
    """Otherwise the test above would show nothing."""
    settings = {"eos_token_id": 0, "decoder_start_token_id": 0, name: value_of(name, greedy)}
    copy = with_settings(folder, tmp_path / "m", settings)
    try:
        run_decoder = class_of(folder).from_pretrained(copy)
    except (ValueError, AttributeError, TypeError, KeyError):
        return  # it has changed everything
    changed = False
    torch.manual_seed(0)
    for prompt, expected in zip(IDS, greedy, strict=True):
        try:
            limit = {} if name == "max_new_tokens" else {"max_new_tokens": NEW}
            output = run_decoder.generate(torch.tensor([prompt]), **limit)
            changed |= len(output) > 1 or output[0].tolist()[-len(expected) :] != expected
        except (ValueError, AttributeError, TypeError, KeyError):
            changed = True
    assert changed


@pytest.mark.parametrize("name", ["repetition_penalty", "top_k", "top_p", "min_p", "suppress_tokens", "num_beams"])
def test_samples_are_temperature_alone(
    name: str, folder: Path, greedy: list[list[int]], sampled: list[list[int]], tmp_path: Path
) -> None:
    settings = {"eos_token_id": 0, "decoder_start_token_id": 0, "do_sample": True, name: value_of(name, greedy)}
    copy = with_settings(folder, tmp_path / "m", settings)
    assert generated(copy, temperature=2.5, seed=3) == sampled != greedy


def test_all_settings_at_once_shape_nothing(
    folder: Path, greedy: list[list[int]], sampled: list[list[int]], tmp_path: Path, ids: Path
) -> None:
    settings = {"eos_token_id": 0, "decoder_start_token_id": 0, **{name: value_of(name, greedy) for name in NAMES}}
    copy = with_settings(folder, tmp_path / "m", settings)
    assert said(tmp_path / "wh", copy, ids) == greedy
    assert said(tmp_path / "sampled", copy, ids, temperature=2.5, seed=3) == sampled


def test_settings_in_the_configuration_shape_nothing(
    folder: Path, greedy: list[list[int]], tmp_path: Path, ids: Path
) -> None:
    """Where old models kept them."""
    copy = with_settings(folder, tmp_path / "m", None)
    config = json.loads((folder / "config.json").read_text())
    (copy / "config.json").unlink()
    legacy = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3, "suppress_tokens": [1, 2]}
    (copy / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": 0, **legacy}))
    assert said(tmp_path / "wh", copy, ids) == greedy


@pytest.mark.parametrize("kind", ["one", "list", "several", "none", "empty", "negative", "no file"])
def test_end_tokens_are_the_model_s(
    kind: str, folder: Path, unended: list[list[int]], greedy: list[list[int]], *, tmp_path: Path, ids: Path
) -> None:
    """The tokenizer's (0) if the model has none; a list may be empty."""
    middle, other = greedy[0][2], greedy[1][1]
    named: dict[str, Any] = {"one": middle, "list": [middle], "several": [middle, other], "none": None, "empty": []}
    settings = None if kind == "no file" else {"eos_token_id": named.get(kind, [-1]), "decoder_start_token_id": 0}
    ends = {"one": {middle}, "list": {middle}, "several": {middle, other}, "none": {0}, "no file": {0}}.get(kind, set())
    expected = [until(tokens, ends) for tokens in unended]
    copy = with_settings(folder, tmp_path / "m", settings)
    assert generated(copy) == expected
    if kind == "several":
        assert said(tmp_path / "wh", copy, ids) == expected


def test_a_decoder_starts_where_the_model_says(tmp_path: Path, folder: Path, model: Any, ids: Path) -> None:
    settings = {"eos_token_id": 0, "decoder_start_token_id": 9}
    expected = [until(argmax_loop(model, prompt, start=9), {0}) for prompt in IDS]
    assert said(tmp_path / "wh", with_settings(folder, tmp_path / "m", settings), ids) == expected


def identities(folder: Path, tmp_path: Path, ids: Path, settings: Any, **options: Any) -> tuple[str, dict[str, Any]]:
    """Return (identity, what shapes the rows) of a run of the model with other settings, in the same folder."""
    shutil.rmtree(tmp_path / "m", ignore_errors=True)
    copy = with_settings(folder, tmp_path / "m", settings)
    shutil.rmtree(tmp_path / "wh", ignore_errors=True)
    ingest(IngestOptions(model=str(copy), prompts=(str(ids),), **options), Layout(tmp_path / "wh"))
    row = viewed(Layout(tmp_path / "wh")).execute("select identity, options from runs").fetchone()
    assert row is not None
    return row[0], json.loads(row[1])


def test_identity_holds_what_only_the_generation_settings_say(folder: Path, tmp_path: Path, ids: Path) -> None:
    plain, shaping = identities(folder, tmp_path, ids, None, generate=2)
    assert "end_tokens" not in shaping
    assert "decoder_start_token" not in shaping
    saying_the_same = {"eos_token_id": [0], "repetition_penalty": 3.0, "bos_token_id": 0}
    assert identities(folder, tmp_path, ids, saying_the_same, generate=2)[0] == plain
    ended, shaping = identities(folder, tmp_path, ids, {"eos_token_id": [0, 7], "bos_token_id": 0}, generate=2)
    assert ended != plain
    assert shaping["end_tokens"] == [0, 7]
    silent = identities(folder, tmp_path, ids, None)[0]
    assert identities(folder, tmp_path, ids, {"eos_token_id": [0, 7]})[0] == silent
    started, shaping = identities(folder, tmp_path, ids, {"eos_token_id": 0, "decoder_start_token_id": 9}, generate=2)
    assert (started != plain) == ("switch" in folder.parent.name) == ("decoder_start_token" in shaping)


@pytest.mark.parametrize(
    "text",
    [
        *('{"eos_token_id": ', "[]", "null", '{"eos_token_id": "</s>"}', '{"eos_token_id": [0, "x"]}'),
        *('{"eos_token_id": 1.5}', '{"eos_token_id": true}', "\xff"),
    ],
)
def test_broken_settings_are_one_line_with_generate_and_nothing_without(
    text: str, folder: Path, tmp_path: Path, ids: Path
) -> None:
    copy = with_settings(folder, tmp_path / "m", text)
    arguments = ["ingest", "--model", str(copy), "--prompts", str(ids), "--warehouse", str(tmp_path / "wh")]
    result = CliRunner().invoke(main, [*arguments, "--generate", "2"])
    assert result.exit_code == 1, result.output
    assert "generation_config.json" in result.stderr
    assert "leave --generate out" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "wh").exists()
    load_model(IngestOptions(model=str(copy), prompts=(str(ids),)))


@pytest.mark.parametrize(
    "settings",
    [
        *({"num_beams": 0}, {"max_new_tokens": -1}, {"watermarking_config": {"unknown": 1}}, {"validate": 1}),
        *({"to_dict": 1}, {"temperature": "hot"}, {"cache_implementation": "unheard of"}, {"early_stopping": "maybe"}),
    ],
)
def test_settings_that_transformers_refuses_shape_nothing(
    settings: dict[str, Any], folder: Path, greedy: list[list[int]], tmp_path: Path
) -> None:
    copy = with_settings(folder, tmp_path / "m", {"eos_token_id": 0, "decoder_start_token_id": 0, **settings})
    assert generated(copy) == greedy


def test_a_model_that_cannot_generate_is_refused(tmp_path: Path, ids: Path) -> None:
    build(next(family for family in FAMILIES if family.name == "deepseek_ocr2")).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    arguments = ["ingest", "--model", str(tmp_path / "m"), "--prompts", str(ids), "--warehouse", str(tmp_path / "wh")]
    result = CliRunner().invoke(main, [*arguments, "--generate", "2"])
    assert result.exit_code == 1, result.output
    assert "has no LM head to generate with. Leave --generate out." in result.stderr
