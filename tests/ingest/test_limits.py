"""Models with impossible configurations: a value that works, or one line; never a traceback, never a hang."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from moewh.cli.main import main
from moewh.ingest.model.expected import max_positions, top_k
from moewh.ingest.model.loading import load_model
from moewh.ingest.options import IngestOptions
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.schema import POSITION_BITS
from tests.support.checkpoints import with_config
from tests.support.families import FAMILIES, configuration
from tests.support.models import MAX_LENGTH, save_model, tiny_model

BY_NAME = {family.name: family for family in FAMILIES}
HOSTILE: list[Any] = [10**30, 2**31, None, -1, 0, 128.0, "128", float("nan"), float("inf"), True, [1], [], "x", {}]
"""Values for a number in a configuration."""
ATTRIBUTES = {
    "mixtral": (
        "max_position_embeddings vocab_size num_hidden_layers num_experts_per_tok num_local_experts hidden_size "
        "num_attention_heads num_key_value_heads pad_token_id sliding_window model_type architectures dtype "
        "is_encoder_decoder quantization_config auto_map rope_parameters"
    ),
    "deepseek_v3": "first_k_dense_replace mlp_layer_types n_routed_experts n_shared_experts n_group topk_group",
    "qwen3_moe": "decoder_sparse_step mlp_only_layers norm_topk_prob",
    "lfm2_moe": "num_dense_layers layer_types",
    "llama4": "moe_layers interleave_moe_layer_step",
    "dbrx": "ffn_config n_layers max_seq_len",
    "longcat_flash": "num_layers zero_expert_num moe_topk",
    "switch_transformers": "encoder_sparse_step num_layers num_decoder_layers num_sparse_decoder_layers num_experts",
    "jamba": "layers_block_type expert_layer_period expert_layer_offset",
}
"""Fields of a configuration that moewh or transformers reads to find the layers, their experts and the length."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "tiny", "mixtral")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.txt"
    path.write_text("one\nand two\n")
    return path


def moewh(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def commands(model: Path, prompts: Path) -> list[list[str]]:
    warehouse = ["--warehouse", str(prompts.parent / "wh")]
    named = ["--model", str(model), *warehouse]
    return [["ingest", "--prompts", str(prompts), *named], ["inspect", str(model), *warehouse], ["geometry", *named]]


def is_one_line(done: Result) -> bool:
    """Return whether a command failed as it should."""
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code == 1 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("moewh: ")


@pytest.mark.parametrize(
    ("name", "attribute"), [(name, attribute) for name, listed in ATTRIBUTES.items() for attribute in listed.split()]
)
def test_every_hostile_value_is_described_or_refused(name: str, attribute: str, tmp_path: Path) -> None:
    config = configuration(BY_NAME[name])
    config.architectures = [BY_NAME[name].model]
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for value in HOSTILE:
        (tmp_path / "config.json").write_text(json.dumps({**written, attribute: value}))
        done = moewh("inspect", str(tmp_path), "--format", "json")
        assert done.exit_code == 0 or is_one_line(done), (value, done.stderr)


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
@pytest.mark.parametrize("attribute", ["max_position_embeddings", "num_experts_per_tok", "num_hidden_layers"])
def test_every_hostile_value_is_ingested_or_refused(
    attribute: str, value: Any, tiny: Path, prompts: Path, tmp_path: Path
) -> None:
    model = with_config(tiny, tmp_path / "model", **{attribute: value})
    done = moewh(*commands(model, prompts)[0])
    assert done.exit_code == 0 or is_one_line(done), done.stderr
    assert (done.exit_code == 0) == (attribute == "max_position_embeddings" and value in (10**30, 2**31, -1, 0))
    assert (tmp_path / "wh").exists() == (done.exit_code == 0)


@pytest.mark.parametrize(
    ("stated", "length"),
    [(10**30, 1 << POSITION_BITS), (2**31, 1 << POSITION_BITS), (1 << POSITION_BITS, 1 << POSITION_BITS), (64, 64)],
)
def test_the_longest_context_is_one_that_positions_can_count(
    stated: int, length: int, tiny: Path, tmp_path: Path
) -> None:
    model = with_config(tiny, tmp_path / "model", max_position_embeddings=stated)
    assert load_model(IngestOptions(model=str(model), prompts=("demo",))).max_length == length


@pytest.mark.parametrize("value", ["128", True, {}, 1.5, float("nan"), float("inf")], ids=repr)
def test_a_number_that_is_none_is_refused(value: Any) -> None:
    """transformers checks its own configurations, but not those of a model's own code."""
    config = tiny_model("mixtral").config
    object.__setattr__(config, "max_position_embeddings", value)
    with pytest.raises(MoewhError, match=r"max_position_embeddings = .* not a whole number"):
        max_positions(config)
    object.__setattr__(config, "num_experts_per_tok", value)
    with pytest.raises(MoewhError, match="not a whole number"):
        top_k(config)


def test_lengths_that_are_numbers_are_taken() -> None:
    config = tiny_model("mixtral").config
    assert max_positions(config) == MAX_LENGTH
    for value, length in ((128.0, 128), (None, None), (-1, None), (0, None)):
        object.__setattr__(config, "max_position_embeddings", value)
        assert max_positions(config) == length


@pytest.mark.parametrize("chosen", [0, -1, 9, 10**30])
def test_a_token_gets_some_of_the_experts(chosen: int, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    model = with_config(tiny, tmp_path / "model", num_experts_per_tok=chosen)
    ingested, inspected, _ = (moewh(*command) for command in commands(model, prompts))
    assert is_one_line(ingested)
    assert f"states {chosen} of 8 experts per token" in ingested.stderr
    assert f"states {chosen} of 8 experts per token" in inspected.stdout


@pytest.mark.parametrize("text", ["{oops", "[]", "3", "null", '"mixtral"', "{}", '{"model_type": 5}', "", "\x00"])
def test_a_configuration_that_is_none_is_one_line(text: str, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    model = with_config(tiny, tmp_path / "model")
    (model / "config.json").write_text(text)
    for command in commands(model, prompts):
        assert is_one_line(moewh(*command)) or command[0] == "geometry"  # which looks for the warehouse first


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["float3", "int8", "bool", "nn", "", 16, ["bfloat16"]], ids=repr)
def test_an_unknown_dtype_is_one_line(name: str, value: Any, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    model = with_config(tiny, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    (model / "config.json").write_text(json.dumps({**config, name: value}))
    done = moewh(*commands(model, prompts)[0])
    assert is_one_line(done), (done.exit_code, done.stderr)


@pytest.mark.parametrize(
    ("named", "works"),
    [(["NoSuchForCausalLM"], True), (["pipeline"], True), (["nn"], True), ("MixtralForCausalLM", True), ([], True)],
)
def test_an_unknown_architecture_is_that_of_the_model_type(
    named: Any, works: bool, tiny: Path, prompts: Path, tmp_path: Path
) -> None:
    model = with_config(tiny, tmp_path / "model", architectures=named)
    assert (moewh(*commands(model, prompts)[0]).exit_code == 0) == works


@pytest.mark.parametrize("named", [["LlamaForCausalLM"], ["Qwen3MoeForCausalLM"], [5], 5])
def test_another_architecture_is_one_line(named: Any, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    model = with_config(tiny, tmp_path / "model", architectures=named)
    assert is_one_line(moewh(*commands(model, prompts)[0]))


@pytest.mark.parametrize(
    "name", ["model.gguf", "model.safetensors", "pytorch_model.bin", "model.pt", "model.ckpt", "notes"]
)
def test_a_file_is_no_model(name: str, prompts: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    torch.save({"a": torch.zeros(1)}, path)
    for command in commands(path, prompts):
        done = moewh(*command)
        assert is_one_line(done)
        assert f"cannot load the model {path}: it is a" in done.stderr or command[0] == "geometry"
    assert ("GGUF" in moewh("inspect", str(path)).stderr) == name.endswith(".gguf")


def test_folders_without_a_model_are_distinguished(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    several = tmp_path / "several"
    with_config(tiny, several / "checkpoint-500")
    with_config(tiny, several / "checkpoint-1000")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "read.me").touch()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes((tiny / "config.json").read_bytes())
    for folder, says in (
        ("several", "its sub-folders are checkpoints: checkpoint-1000, checkpoint-500. Give one of them."),
        ("empty", "the folder is empty"),
        ("notes", "it holds read.me and no config.json"),
        ("config", "has no safetensors weights"),
    ):
        done = moewh(*commands(tmp_path / folder, prompts)[0])
        assert is_one_line(done)
        assert says in done.stderr
    assert moewh("inspect", str(tmp_path / "config")).exit_code == 0
