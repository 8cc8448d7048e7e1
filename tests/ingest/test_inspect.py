"""`moewh inspect` on every family: it reports what an ingest stores, quickly and without any weights."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from torch.utils._python_dispatch import TorchDispatchMode

from moewh.cli.main import main
from moewh.ingest.inspect import inspect_model
from tests.support.families import FAMILIES, WRAPPERS, Family, configuration, present
from tests.support.models import byte_tokenizer, save_model
from tests.support.observed_families import observed

BY_NAME = {family.name: family for family in (*FAMILIES, *WRAPPERS)}
LARGEST = 4_096
"""Elements: more than any position buffer that a tiny model makes, fewer than any relevant weight."""


class _Allocations(TorchDispatchMode):
    """Records the size of every tensor that is made with data in it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.device.type != "meta":
            self.largest = max(self.largest, made.numel())
        return made


def bare(family: Family, folder: Path) -> Path:
    """Only a configuration, as in a model folder."""
    config = configuration(family)
    config.architectures = [family.model]
    config.save_pretrained(folder)
    return folder


def inspect(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["inspect", *arguments])


@pytest.mark.parametrize("family", [*FAMILIES, *WRAPPERS], ids=lambda family: family.name)
def test_inspect_says_what_is_stored(family: Family, tmp_path: Path) -> None:
    if not present(family):
        pytest.skip(f"transformers {transformers.__version__} has no {family.name}")
    folder = bare(family, tmp_path)
    began = time.process_time()
    with _Allocations() as allocations:
        found = inspect_model(str(folder))
    assert time.process_time() - began < 3
    assert allocations.largest < LARGEST
    if family.refused:
        assert found.status == "refused"
        assert found.reason is not None
        assert family.refused in found.reason
        return
    run = observed(family)
    assert found.status == "captured"
    stored = [row for row in run.layers if row["stack"] == "encoder"] or run.layers
    layers = [layer for layer in found.layers if layer.stack == stored[0]["stack"]]
    for layer, row in zip(layers, stored, strict=True):
        for name in ("layer", "stack", "module", "router_class", "num_experts", "num_shared_experts", "top_k"):
            assert getattr(layer, name) == row[name], name
        assert layer.num_identity_experts == run.kinds[row["layer"]].count("identity")
        assert layer.expert_weights
        assert layer.router_weights
    assert (found.scoring, found.renormalized) == (family.scoring, family.renormalized)
    assert found.routing_rows_per_token == sum(layer.top_k for layer in found.layers)
    assert found.router_logits_bytes_per_token == 4 * sum(layer.num_experts for layer in found.layers)
    assert found.hidden_states_bytes_per_token == 4 * len(found.layers) * (found.hidden_size or 0)


def test_inspect_prints_json_and_lines(tmp_path: Path) -> None:
    folder = bare(BY_NAME["mixtral"], tmp_path)
    for place in (folder, folder / "config.json"):
        parsed = json.loads(inspect(str(place), "--format", "json").stdout)
        assert parsed["model_type"] == "mixtral"
        assert parsed["layers"][1]["router"] == "model.layers.1.mlp.gate"
        assert parsed["layers"][1]["router_weights"] == {"weight": [8, 32]}
        assert parsed["layers"][1]["expert_weights"] == {"gate_up_proj": [8, 48, 32], "down_proj": [8, 32, 24]}
    lines = inspect(str(folder)).stdout.splitlines()
    assert "recorded            yes" in lines
    assert "decoder layers      0-3" in lines
    assert "module              model.layers.{layer}.mlp.experts (MixtralExperts)" in lines
    assert "rows per token      8, about 16 bytes" in lines


@pytest.mark.parametrize(
    ("model", "says"),
    [("no/such-model", "cannot load the model no/such-model"), ("strange", "does not know this kind of model")],
)
def test_inspect_of_nothing_is_one_line(model: str, says: str, tmp_path: Path) -> None:
    if model == "strange":
        (tmp_path / "config.json").write_text('{"model_type": "not_invented_yet"}')
        model = str(tmp_path)
    result = inspect(model)
    assert result.exit_code == 1
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_inspect_of_a_dense_model_says_so(tmp_path: Path) -> None:
    found = inspect_model(str(save_model(tmp_path, "qwen3-dense")))
    assert (found.status, found.num_moe_layers) == ("refused", 0)
    assert "dense model" in (found.reason or "")


def test_a_model_of_several_stages_is_read_by_the_one_that_reads_text(tmp_path: Path) -> None:
    if not hasattr(transformers, "Qwen3OmniMoeForConditionalGeneration"):
        pytest.skip(f"transformers {transformers.__version__} has no qwen3_omni_moe")
    thinker = configuration(BY_NAME["qwen3_omni_moe with images and sound"])
    config = transformers.Qwen3OmniMoeConfig(thinker_config=thinker.to_dict(), enable_audio_output=False)
    transformers.Qwen3OmniMoeForConditionalGeneration(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    found = inspect_model(str(tmp_path))
    assert found.model_class == "Qwen3OmniMoeThinkerForConditionalGeneration"
    assert [layer.layer for layer in found.layers] == [0, 1, 2, 3]
