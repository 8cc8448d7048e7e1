"""Models that moewh must not record: each refused by name, with a reason and a remedy, before anything is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

from moewh.cli.main import main
from moewh.ingest.capture import hooks as capture
from moewh.ingest.capture.vectors import WantedVectors
from moewh.ingest.families import nllb_moe
from moewh.ingest.families import rule as blocks
from moewh.ingest.model import architecture
from moewh.ingest.model.layers import MoELayers, find_moe_layers
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
from tests.support.families import FAMILIES, build
from tests.support.models import byte_tokenizer, save_model, tiny_model
from tests.support.opened import viewed

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.txt"
    path.write_text("one\nand two\n")
    return path


def refusal(model: Path, prompts: Path) -> str:
    """Ingest and return the one line of the refusal; nothing may be left behind."""
    warehouse = prompts.parent / "wh"
    arguments = ["ingest", "--model", str(model), "--prompts", str(prompts), "--warehouse", str(warehouse)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert not warehouse.exists()
    return result.stderr


def test_nllb_moe_is_refused_by_name(prompts: Path) -> None:
    folder = prompts.parent / "model"
    build(BY_NAME["nllb_moe"]).save_pretrained(folder)
    assert "nllb-moe is not recorded: transformers computes it wrongly" in refusal(folder, prompts)


def test_a_wrong_capture_is_refused_before_anything_is_written(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = blocks.FamilyAdapter.rows
    wrong = lambda self, ids, weights: ((right(self, ids, weights)[0] + 1) % 8, right(self, ids, weights)[1])  # noqa: E731
    monkeypatch.setattr(blocks.FamilyAdapter, "rows", wrong)
    line = refusal(save_model(prompts.parent / "model", "mixtral"), prompts)
    assert "model.layers.0.mlp.experts (MixtralExperts): its output is not the sum of weight times expert" in line


def test_the_guard_alone_would_refuse_nllb_moe(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nllb_moe, "FAMILY", _Intended())
    folder = prompts.parent / "model"
    build(BY_NAME["nllb_moe"]).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    assert "its output is not the sum of weight times expert" in refusal(folder, prompts)


class _Intended(blocks.FamilyAdapter):
    """Reads nllb_moe as intended: two experts per token, each a module, weighted by the router's probabilities."""

    fixed_top_k = 2

    def rows(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The container is called with the router's weights for all experts, zero except at the two chosen."""
        del ids
        top = weights.reshape(-1, weights.shape[-1]).topk(2, dim=-1)
        return top.indices, top.values

    def run_experts(self, moe: blocks.MoELayer, hidden_MH: torch.Tensor, expert_ids_M: torch.Tensor) -> torch.Tensor:
        """Call each row's expert."""
        rows = zip(hidden_MH, expert_ids_M.tolist(), strict=True)
        return torch.stack([moe.experts.get_submodule(f"expert_{expert}")(row) for row, expert in rows])


def test_a_list_of_experts_is_refused_by_its_class() -> None:
    class HandMadeExpert(nn.Linear):
        """Run one expert of a list."""

    model = tiny_model("qwen3-dense")
    model.model.layers[0].mlp.experts = nn.ModuleList(HandMadeExpert(32, 32) for _ in range(4))
    with pytest.raises(MoewhError, match="list of HandMadeExpert"):
        find_moe_layers(model, model.config)


def test_containers_in_other_layers_than_promised_are_refused() -> None:
    model = tiny_model("mixtral")
    model.config.mlp_only_layers = [1]
    with pytest.raises(MoewhError, match=r"in layers \[0, 2\], but containers were found in layers \[0, 1, 2\]"):
        find_moe_layers(model, model.config)


def test_experts_elsewhere_that_are_called_are_an_error() -> None:
    model = tiny_model("mixtral")
    found = find_moe_layers(model, model.config)
    last = found.moe_layers[-1]
    fewer = MoELayers(found.moe_layers[:-1], [(last.path, last.experts)])
    input_ids = torch.arange(4)[None]
    mask = torch.ones_like(input_ids)
    with (
        pytest.raises(MoewhError, match=r"model\.layers\.2\.mlp\.experts was called, but"),
        capture.capture_routing(fewer, mask.numpy(), WantedVectors(frozenset(), frozenset())),
    ):
        capture.run_stack(model, input_ids, mask)


def test_spread_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class DTensor(nn.Parameter):
        """Has the name of torch's class for a tensor spread over processes."""

    model = tiny_model("mixtral")
    monkeypatch.setattr(model, "named_parameters", lambda: iter([("experts.down_proj", DTensor(torch.ones(1)))]))
    with pytest.raises(MoewhError, match=r"experts\.down_proj is spread over several processes"):
        architecture.check_parallel(model)


def test_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moewh.ingest.model.architecture.transformers.__version__", "4.57.1")
    with pytest.raises(MoewhError, match=r"transformers 4\.57\.1 is too old"):
        architecture.check_versions()


def test_remote_code_needs_the_flag(tmp_path: Path) -> None:
    settings = {"model_type": "made_up", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert "give --trust-remote-code" in result.stderr


def test_native_mxfp4_is_loaded_dequantised(prompts: Path) -> None:
    folder = prompts.parent / "model"
    family = dataclasses.replace(BY_NAME["gpt_oss"], changes={"intermediate_size": 32})
    build(family).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        E, size, out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (E, out, size // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 122, (E, out, size // 32), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(config))

    warehouse = prompts.parent / "wh"
    arguments = ["ingest", "--model", str(folder), "--prompts", str(prompts), "--warehouse", str(warehouse)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    counts = viewed(Layout(warehouse)).execute("select dtype, tokens from runs").fetchall()
    assert counts == [("bfloat16", 12)]


@pytest.mark.parametrize("name", ["embed_tokens", "layers.1.mlp.gate", "layers.1.mlp.experts.3.up_proj"])
def test_weights_that_are_no_numbers_are_named(name: str, prompts: Path) -> None:
    """Where no token of the first batch gives numbers: a run that diverged, or half precision that overflows."""
    folder = save_model(prompts.parent / "tiny", num_experts_per_tok=8)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.{name}.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    layer = 0 if name == "embed_tokens" else 1
    says = f"model.layers.{layer}.mlp.experts: its output is NaN or infinity for every token"
    assert says in refusal(folder, prompts)
