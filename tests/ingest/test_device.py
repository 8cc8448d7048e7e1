"""Where a model is loaded: directly onto its device if accelerate places tensors, else via the host."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from moewh.ingest.model import loading
from moewh.ingest.model.loading import device_arguments, load_model
from moewh.ingest.options import IngestOptions
from tests.support.models import save_model

CUDA, CPU, META = torch.device("cuda", 3), torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize(
    ("device", "accelerate", "arguments"),
    [
        (CUDA, True, {"device_map": {"": CUDA}}),
        (torch.device("mps"), True, {"device_map": {"": torch.device("mps")}}),
        (CUDA, False, {}),
        (CPU, True, {}),
        (None, True, {"device_map": "auto"}),
    ],
)
def test_device_arguments(
    device: torch.device | None, accelerate: bool, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec("torch") if accelerate else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "accelerate" else None)
    assert device_arguments(device) == arguments


@pytest.mark.parametrize("kind", ["olmoe", "mixtral"])
def test_every_tensor_comes_from_the_files_onto_its_device(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device replaces a GPU: it shows where tensors are placed, although it holds no data."""
    pytest.importorskip("accelerate")
    real, seen = loading._from_files, []

    def from_files(*arguments: Any) -> Any:
        model, info = real(*arguments)
        seen.append({tensor.device for tensor in model.state_dict().values()})
        return model, info

    monkeypatch.setattr(loading, "_from_files", from_files)
    monkeypatch.setattr(loading, "choose_device", lambda *_: META)
    options = IngestOptions(model=str(save_model(tmp_path / "model", kind)), prompts=("p",))
    assert len(load_model(options).moe_layers) == 3
    assert seen == [{META}]


def test_device_that_cannot_be_placed_on_is_reached_by_way_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = loading._from_files, []
    monkeypatch.setattr(loading, "device_arguments", lambda _: {})

    def from_files(*arguments: Any) -> Any:
        model, info = real(*arguments)
        seen.append({tensor.device for tensor in model.state_dict().values()})
        return model, info

    monkeypatch.setattr(loading, "_from_files", from_files)
    monkeypatch.setattr(loading, "choose_device", lambda *_: META)
    loaded = load_model(IngestOptions(model=str(save_model(tmp_path / "model")), prompts=("p",)))
    assert seen == [{CPU}]
    assert {tensor.device for tensor in loaded.model.state_dict().values()} == {META}
