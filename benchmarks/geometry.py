"""`moewh geometry` on a random model: seconds per layer, and peak memory next to the bytes of a layer and the model.

    python -m benchmarks.geometry [--layers N] [--experts E] [--hidden H] [--inner I] [--rank R] [--dtype NAME]

The model is OLMoE-shaped, and its checkpoint is stored as on the hub, with a tensor per expert matrix. Memory is the
peak resident memory of a separate process, less its memory with torch and transformers imported and no weights read.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import OlmoeConfig

_MEASURED = """
import json, resource, sys, time
import torch
from moewh.ingest.model.architecture import read_config
from moewh.ingest.geometry.matrices import layer_weights
from moewh.ingest.geometry.subspaces import layer_geometry
from moewh.ingest.model.loading import find_source
from moewh.ingest.geometry.checkpoint import Checkpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

source = find_source(sys.argv[1], None)
checkpoint = Checkpoint(source, read_config(source.location), None)
torch.linalg.eigh(torch.eye(8, dtype=torch.float64))
held, seconds, peaks = peak(), [], []
for moe in checkpoint.moe_layers:
    began = time.monotonic()
    with checkpoint.layer(moe):
        layer_geometry(layer_weights(moe), moe.layer, moe.num_experts, int(sys.argv[2]), torch.device("cpu"))
    seconds.append(time.monotonic() - began)
    peaks.append(peak() - held)
print(json.dumps({"layer": checkpoint.bytes_of(checkpoint.moe_layers[0]), "seconds": seconds, "peaks": peaks}))
"""


def save_model(folder: Path, arguments: argparse.Namespace) -> int:
    """Write a random checkpoint one layer at a time, with a file per layer; return its bytes."""
    hidden, inner, experts = arguments.hidden, arguments.inner, arguments.experts
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_experts": experts}
    config = OlmoeConfig(**shape, num_hidden_layers=arguments.layers, vocab_size=256, eos_token_id=0)
    config.architectures = ["OlmoeForCausalLM"]
    config.save_pretrained(folder)
    dtype = getattr(torch, arguments.dtype)
    index: dict[str, str] = {}
    for layer in range(arguments.layers):
        block = f"model.layers.{layer}.mlp"
        shapes = {f"{block}.gate.weight": (experts, hidden)}
        for expert in range(experts):
            shapes |= {f"{block}.experts.{expert}.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
            shapes[f"{block}.experts.{expert}.down_proj.weight"] = (hidden, inner)
        tensors = {name: (0.02 * torch.randn(shape)).to(dtype) for name, shape in shapes.items()}
        file = f"model-{layer:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    """Print the machine, the model's size, and the time and memory of each layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("experts", 64), ("hidden", 512), ("inner", 256), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the checkpoint (default: bfloat16)")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        size = save_model(Path(folder), arguments)
        command = [sys.executable, "-c", _MEASURED, folder, str(arguments.rank)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    layer = found["layer"]
    print(f"{arguments.layers} layers of {arguments.experts} experts, {arguments.hidden} x {arguments.inner}")
    print(f"the model {size / 2**20:,.0f} MiB, a layer {layer / 2**20:,.0f} MiB")
    for number, (seconds, peak) in enumerate(zip(found["seconds"], found["peaks"], strict=True)):
        print(f"layer {number}: {seconds:.1f} s, peak {peak / 2**20:,.0f} MiB = {peak / layer:.2f} layers")


if __name__ == "__main__":
    main()
