"""Checkpoints as they go wrong: one tensor of a model's files dropped, renamed, reshaped or stored otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.models import save_model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


def copy_with(model: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a model folder whose tensors are what `change` makes of them."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    tensors = change(load_file(model / WEIGHTS))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def dropped(*keys: str) -> Callable[[Tensors], Tensors]:
    """All tensors but some."""
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key not in keys}


def with_config(model: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a model folder with other values in its configuration; what is None there stays null."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def sharded(folder: Path, **changes: Any) -> Path:
    """A tiny model whose tensors are in three or more files and an index."""
    save_model(folder, **changes)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    keys = sorted(tensors)
    shards = {f"model-{number + 1:05}-of-00003.safetensors": keys[number::3] for number in range(3)}
    for name, part in shards.items():
        save_file({key: tensors[key] for key in part}, folder / name, {"format": "pt"})
    files = {key: name for name, part in shards.items() for key in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder
