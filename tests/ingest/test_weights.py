"""Checked weights: everything the recorded pass uses comes from the model's files, or the model is refused by name."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from moewh.cli.main import main
from moewh.ingest.capture import hooks as capture
from moewh.ingest.capture.vectors import WantedVectors
from moewh.ingest.model.architecture import empty_model, read_config
from moewh.ingest.model.layers import MoELayers, find_moe_layers
from moewh.ingest.model.loading import check_files, load_model
from moewh.ingest.model.repository import Repository
from moewh.ingest.model.stored import DTYPES, StoredTensor, stored_tensors
from moewh.ingest.model.weights import check_stored
from moewh.ingest.options import IngestOptions
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
from tests.support.checkpoints import INDEX, WEIGHTS, Tensors, copy_with, dropped, sharded, with_config
from tests.support.families import FAMILIES, WRAPPERS, build
from tests.support.models import byte_tokenizer, save_model

BY_NAME = {family.name: family for family in (*FAMILIES, *WRAPPERS)}
FOUR = ("olmoe", "mixtral", "deepseek_v3", "gpt_oss")
SMALL = {"num_hidden_layers": 3, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4}
"""The number of experts by each of its names."""
HEAD = {"lm_head.weight"}
Headers = dict[str, StoredTensor]
Check = Callable[[str, Callable[[Headers], Headers]], str | None]


def save_family(name: str, folder: Path, **changes: Any) -> Path:
    """A tiny model of a family, with a tokenizer."""
    family = BY_NAME[name]
    build(dataclasses.replace(family, changes={**family.changes, **changes})).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With layers and experts that are the first, the last and neither: the tests try each tensor."""
    folder = tmp_path_factory.mktemp("families")
    return {name: save_family(name, folder / name, **SMALL) for name in FOUR}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.txt"
    path.write_text("one\nand two\n")
    return path


def door(model: Path, generate: int = 0) -> None:
    """Run the check that `moewh ingest` makes before it loads any data."""
    options = IngestOptions(model=str(model), prompts=("demo",), generate=generate)
    files = Repository(str(model), None)
    assert check_files(str(model), files, read_config(files.location), options) is not None


def refused(model: Path, generate: int = 0) -> str | None:
    """Return the line of the refusal; None for an accepted model."""
    try:
        door(model, generate)
    except MoewhError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def headers(families: dict[str, Path]) -> Check:
    """Return a function from a family and other headers of its files to the line of the refusal, as `refused` does.

    Each family's model is built once: only a check that gets as far as the shapes changes it.
    """

    @functools.cache
    def described(name: str) -> tuple[Any, MoELayers, Headers]:
        model = empty_model(read_config(str(families[name])))
        return model, find_moe_layers(model, model.config), stored_tensors([str(families[name] / WEIGHTS)])

    def line(name: str, change: Callable[[Headers], Headers]) -> str | None:
        model, found, stored = described(name)
        try:
            check_stored(name, model, found, change(stored))
        except MoewhError as error:
            return str(error)
        return None

    return line


def moewh(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def ingest(model: Path, prompts: Path, *more: str) -> Result:
    warehouse = str(prompts.parent / "wh")
    return moewh("ingest", "--model", str(model), "--prompts", str(prompts), "--warehouse", warehouse, *more)


def rows(model: Path, prompts: Path, run_id: str, *more: str) -> list[dict[str, Any]]:
    done = ingest(model, prompts, "--run-id", run_id, *more)
    assert done.exit_code == 0, done.stderr
    segments = Layout(prompts.parent / "wh").segments(run_id)
    table = pq.read_table(next(segments.glob("segment=*")) / "routing.parquet", partitioning=None)
    listed: list[dict[str, Any]] = table.to_pylist()
    return listed


def one_line(done: Result) -> str:
    assert done.exit_code == 1, (done.exception, done.stderr)
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def header_without(key: str) -> Callable[[Headers], Headers]:
    return lambda stored: {other: tensor for other, tensor in stored.items() if other != key}


def stored_as(dtype: str, key: str) -> Callable[[Headers], Headers]:
    return lambda stored: {**stored, key: stored[key]._replace(dtype=dtype)}


def each_kind(tensors: Tensors) -> list[str]:
    """Return one key of every kind: names that differ only in layer and expert numbers count once."""
    kinds = {re.sub(r"\d+", "N", key): key for key in sorted(tensors)}
    return list(kinds.values())


# -------------------------------------------------------------------------------------------------- every tensor


@pytest.mark.parametrize("name", FOUR)
def test_every_tensor_dropped_is_refused_or_harmless(
    name: str, families: dict[str, Path], headers: Check, prompts: Path, tmp_path: Path
) -> None:
    """One at a time; a model that is not refused must give exactly the rows of the whole model."""
    harmless = set()
    for key in load_file(families[name] / WEIGHTS):
        line = headers(name, header_without(key))
        if line is None:
            harmless.add(key)
        else:
            assert key in line
    assert harmless == HEAD
    model = copy_with(families[name], tmp_path / "model", dropped(*harmless))
    assert rows(model, prompts, "less") == rows(families[name], prompts, "whole")


@pytest.mark.parametrize("name", FOUR)
def test_a_tensor_by_another_name_is_refused_by_both(name: str, families: dict[str, Path], tmp_path: Path) -> None:
    for key in set(each_kind(load_file(families[name] / WEIGHTS))) - HEAD:
        other = key.replace(".weight", ".matrix") if key.endswith(".weight") else f"{key}_too"
        renamed = lambda tensors, key=key, other=other: {**dropped(key)(tensors), other: tensors[key]}  # noqa: E731
        line = refused(copy_with(families[name], tmp_path / "model", renamed))
        assert line is not None
        assert key in line
        assert f"have {other} instead" in line


@pytest.mark.parametrize("name", FOUR)
def test_a_tensor_of_another_shape_is_refused(name: str, families: dict[str, Path], tmp_path: Path) -> None:
    for key in each_kind(load_file(families[name] / WEIGHTS)):
        wider = lambda tensors, key=key: {**tensors, key: torch.cat([tensors[key], tensors[key][-1:]])}  # noqa: E731
        line = refused(copy_with(families[name], tmp_path / "model", wider))
        assert line is not None
        assert "do not fit its configuration" in line


@pytest.mark.parametrize("name", FOUR)
def test_one_tensor_of_another_shape_in_the_last_layer_is_refused(
    name: str, families: dict[str, Path], tmp_path: Path
) -> None:
    """Layers alike are tried once, so one that differs from those before it must not pass for one of them."""
    keys = [key for key in load_file(families[name] / WEIGHTS) if re.search(r"\blayers\.\d", key)]
    last = max(int(re.findall(r"\blayers\.(\d+)", key)[0]) for key in keys)
    of_last = sorted(key for key in keys if f"layers.{last}." in key)
    for key in (of_last[0], next(key for key in reversed(of_last) if "experts" in key), of_last[-1]):
        wider = lambda tensors, key=key: {**tensors, key: torch.cat([tensors[key], tensors[key][-1:]])}  # noqa: E731
        assert "do not fit its configuration" in (refused(copy_with(families[name], tmp_path / "model", wider)) or "")


@pytest.mark.parametrize("dtype", ["I8", "U8", "I64", "BOOL", "F8_E4M3"])
@pytest.mark.parametrize("name", FOUR)
def test_numbers_of_another_kind_are_refused(
    dtype: str, name: str, families: dict[str, Path], headers: Check, tmp_path: Path
) -> None:
    for key in set(each_kind(load_file(families[name] / WEIGHTS))) - HEAD:
        line = headers(name, stored_as(dtype, key))
        assert line is not None
        assert f"{key} is stored as {dtype}" in line
    in_file = lambda tensors: {**tensors, key: tensors[key].to(DTYPES[dtype])}  # noqa: E731
    assert f"{key} is stored as {dtype}" in (refused(copy_with(families[name], tmp_path / "model", in_file)) or "")


# ---------------------------------------------------------------------------------------- layers, experts, extras


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not re.search(pattern, key)}


def renumbered(tensors: Tensors) -> Tensors:
    """Experts 1 to 8 of layer 1 instead of 0 to 7: equally many, each in another's place."""
    pattern = re.compile(r"(layers\.1\.mlp\.experts\.)(\d+)")
    return {pattern.sub(lambda found: f"{found[1]}{int(found[2]) + 1}", key): value for key, value in tensors.items()}


def with_extra(key: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, key: torch.zeros(32)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without(r"layers\.2\."), "model.layers.2.self_attn.q_proj.weight"),
        ({"num_hidden_layers": 4}, "model.layers.3."),
        ({"num_hidden_layers": 2}, "no place for: model.layers.2."),
        (without(r"experts\.7\."), "model.layers.0.mlp.experts.7."),
        ({"num_experts": 9}, "do not fit|experts.8."),
        ({"num_experts": 4}, "do not fit|experts.4."),
        (renumbered, "lack .*model.layers.1.mlp.experts.0.* have model.layers.1.mlp.experts.8."),
        (without(r"gate_proj"), "gate_proj"),
        (without(r"embed_tokens"), "model.embed_tokens.weight"),
        (without("."), "model.embed_tokens.weight"),
        (with_extra("model.layers.0.self_attn.q_proj.bias"), "no place for: model.layers.0.self_attn.q_proj.bias"),
        (with_extra("model.layers.0.mlp.shared_expert.up_proj.weight"), "no place for"),
        (with_extra("model.embed_positions.weight"), "no place for: model.embed_positions.weight"),
        (with_extra("layers.0.mlp.gate.weight"), "are the same weight twice"),
        ({"vocab_size": 300}, "model.embed_tokens.weight is 257 x 32 in the files, 300 x 32"),
        ({"hidden_size": 64}, "do not fit"),
        ({"intermediate_size": 40}, "do not fit"),
    ],
)
def test_files_and_configuration_must_belong_together(
    change: Callable[[Tensors], Tensors] | dict[str, Any], says: str, tiny: Path, prompts: Path, tmp_path: Path
) -> None:
    """The change: to the tensors, or to the configuration."""
    if isinstance(change, dict):
        model = with_config(tiny, tmp_path / "model", **change)
    else:
        model = copy_with(tiny, tmp_path / "model", change)
    assert re.search(says, one_line(ingest(model, prompts)))
    assert not (tmp_path / "wh").exists()


def test_tensors_that_no_text_prompt_reaches_may_be_there(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    """Each alone is accepted, and all together leave the rows as they are."""
    keys = (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.vision_tower.blocks.0.weight",
        "model.multi_modal_projector.weight",
        "visual.patch_embed.weight",
        "talker.model.norm.weight",
        "mtp.norm.weight",
        "v_head.weight",
    )
    for key in keys:
        assert refused(copy_with(tiny, tmp_path / "one", with_extra(key))) is None, key
    together = copy_with(tiny, tmp_path / "m", lambda tensors: {**tensors, **{key: torch.zeros(32) for key in keys}})
    assert rows(together, prompts, "more") == rows(tiny, prompts, "whole")


def test_layers_that_predict_further_ahead_may_be_there(families: dict[str, Path], tmp_path: Path) -> None:
    further = with_extra("model.layers.3.eh_proj.weight")
    whole = with_config(families["deepseek_v3"], tmp_path / "whole", num_nextn_predict_layers=0)
    model = copy_with(whole, tmp_path / "model", further)
    assert "no place for: model.layers.3.eh_proj.weight" in (refused(model) or "")
    assert refused(with_config(model, tmp_path / "further", num_nextn_predict_layers=1)) is None


def test_a_tower_that_is_missing_is_watched(tmp_path: Path) -> None:
    """It may be missing, because no prompt reaches it; one that did would end the run."""
    whole = save_family("qwen3_vl_moe with images", tmp_path / "whole")
    folder = copy_with(whole, tmp_path / "model", without(r"visual"))
    loaded = load_model(IngestOptions(model=str(folder), prompts=("demo",)))
    blocks = [module for path, module in loaded.found.others if path.endswith("visual.merger.norm")]
    mask = torch.ones(1, 4, dtype=torch.int64).numpy()
    with (
        pytest.raises(MoewhError, match="a prompt should not reach this module"),
        capture.capture_routing(loaded.found, mask, WantedVectors(frozenset(), frozenset())),
    ):
        blocks[0](torch.zeros(1, 16))


def test_a_constant_that_a_family_stores_nowhere_is_right_only_if_it_is_nowhere(tmp_path: Path) -> None:
    folder = save_family("axk1", tmp_path / "model")
    assert refused(copy_with(folder, tmp_path / "none", without("e_score_correction_bias"))) is None
    line = refused(copy_with(folder, tmp_path / "some", without(r"2\..*e_score_correction_bias")))
    assert "model.layers.2.mlp.gate.e_score_correction_bias" in (line or "")


# ------------------------------------------------------------------------------------------------------- the head


def test_generation_needs_the_head(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    model = copy_with(tiny, tmp_path / "model", dropped("lm_head.weight"))
    assert "lack weights that the forward pass uses: lm_head.weight" in one_line(
        ingest(model, prompts, "--generate", "2")
    )
    assert not (tmp_path / "wh").exists()


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_head_needs_one_of_two(stored: str, prompts: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(model / WEIGHTS)
    assert "lm_head.weight" not in tensors
    tensors[stored] = tensors.pop("model.embed_tokens.weight")
    other = shutil.copytree(model, tmp_path / "other")
    save_file(tensors, other / WEIGHTS, {"format": "pt"})
    one, two = (rows(folder, prompts, folder.name, "--generate", "2") for folder in (model, other))
    assert [row["expert"] for row in one] == [row["expert"] for row in two]
    # Tensors are elsewhere in the file, which is enough to change the last bit.
    assert [row["weight"] for row in one] == pytest.approx([row["weight"] for row in two], abs=1e-6)
    both = copy_with(model, tmp_path / "neither", dropped("model.embed_tokens.weight"))
    assert "model.embed_tokens.weight" in (refused(both) or "")


# ------------------------------------------------------------------------------------------------------ the files


def _edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / INDEX
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def _first_in_another_shard(index: dict[str, Any]) -> dict[str, Any]:
    files = index["weight_map"]
    first, last = min(files), max(files.values())
    return {**index, "weight_map": {**files, first: last}}


def _stale_copy(folder: Path) -> None:
    shards = sorted(folder.glob("model-*"))
    first, second = load_file(shards[0]), load_file(shards[1])
    key = next(iter(first))
    save_file({**second, key: first[key] + 1}, shards[1], {"format": "pt"})


def _cut(at: Callable[[int], int]) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        path = max(folder.glob("model-*"))
        path.write_bytes(path.read_bytes()[: at(path.stat().st_size)])

    return cut


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "half": (_cut(lambda size: size // 2), "damaged or was written only in part"),
    "one byte short": (_cut(lambda size: size - 1), "damaged or was written only in part"),
    "half a header": (_cut(lambda _: 100), "damaged or was written only in part"),
    "no bytes": (_cut(lambda _: 0), "damaged or was written only in part"),
    "a page of an error": (
        lambda folder: max(folder.glob("model-*")).write_text("<html>404 Not Found</html>"),
        "damaged or was written only in part",
    ),
    "no shard": (
        lambda folder: max(folder.glob("model-*")).unlink(),
        "model-00003-of-00003.safetensors, which are not",
    ),
    "another shard": (lambda folder: _edit_index(folder, _first_in_another_shard), "does not belong to these files"),
    "twice": (_stale_copy, "is in both model-00001-of-00003.safetensors and model-00002-of-00003.safetensors"),
    "no map": (lambda folder: _edit_index(folder, lambda _: {"metadata": {}}), "has no weight_map"),
    "a map to numbers": (
        lambda folder: _edit_index(folder, lambda index: {**index, "weight_map": {"a": 1}}),
        "has no weight_map",
    ),
    "an empty map": (
        lambda folder: _edit_index(folder, lambda index: {**index, "weight_map": {}}),
        "has no weight_map",
    ),
    "no metadata": (
        lambda folder: _edit_index(folder, lambda index: {"weight_map": index["weight_map"]}),
        'has no "metadata"',
    ),
    "a list": (lambda folder: _edit_index(folder, lambda index: [index]), "has no weight_map"),
    "no JSON": (lambda folder: (folder / INDEX).write_text("{oops"), "is not valid JSON"),
    "bytes": (lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe\x00"), "is not valid JSON"),
    "fewer": (
        lambda folder: _edit_index(
            folder, lambda index: {**index, "weight_map": {"lm_head.weight": "model-00001-of-00003.safetensors"}}
        ),
        "its files lack weights",
    ),
}


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sharded model, and a warehouse with its run `a`."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "p.txt").write_text("one\nand two\n")
    model = sharded(folder / "model")
    assert ingest(model, folder / "p.txt", "--run-id", "a").exit_code == 0
    return model, folder / "wh"


@pytest.mark.parametrize("fault", FILES)
@pytest.mark.parametrize("command", ["ingest", "geometry"])
def test_faulty_files_end_in_one_line(
    command: str, fault: str, ingested: tuple[Path, Path], prompts: Path, tmp_path: Path
) -> None:
    whole, warehouse = ingested
    model = shutil.copytree(whole, tmp_path / "model")
    damage, says = FILES[fault]
    damage(model)
    if command == "ingest":
        assert says in one_line(ingest(model, prompts))
        assert not (tmp_path / "wh").exists()
        return
    line = one_line(moewh("geometry", "--model", str(model), "--warehouse", str(warehouse), "--run-id", "a"))
    assert "is not of the model" in line or says in line or "cannot be read" in line


def test_shards_are_as_good_as_one_file(prompts: Path, tmp_path: Path) -> None:
    assert rows(sharded(tmp_path / "shards"), prompts, "b") == rows(save_model(tmp_path / "one"), prompts, "a")


def test_pickled_weights_pass_the_same_door(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert rows(folder, prompts, "b", "--allow-pickle") == rows(tiny, prompts, "a")
    torch.save(dropped("model.layers.1.mlp.gate.weight")(tensors), folder / "pytorch_model.bin")
    assert "model.layers.1.mlp.gate.weight" in one_line(ingest(folder, prompts, "--allow-pickle"))


def test_changed_weights_are_another_run(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    """One number of one expert differs; files and headers have the same length."""
    key = "model.layers.1.mlp.experts.5.down_proj.weight"
    other = lambda tensors: {**tensors, key: tensors[key] * (1 + (torch.arange(48) == 7) * 1e-3)}  # noqa: E731
    shutil.copytree(tiny, tmp_path / "first" / "m")
    assert ingest(tmp_path / "first" / "m", prompts, "--run-id", "a", "--segment-rows", "10").exit_code == 0
    copy_with(tiny, tmp_path / "second" / "m", other)
    assert "weights_sha256" in one_line(
        ingest(tmp_path / "second" / "m", prompts, "--run-id", "a", "--segment-rows", "10")
    )
