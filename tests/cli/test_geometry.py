"""`moewh geometry`: from a saved model and a run of it to the tables, and their use in every command."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from moewh.cli.main import main
from moewh.ingest.geometry.matrices import layer_weights
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.manifest import MANIFEST
from moewh.warehouse.files.names import SCHEMA_RUN
from moewh.warehouse.trust.verify import check, plan
from tests.support.brute_force import brute_co_routing, brute_expert_load
from tests.support.families import Family, build
from tests.support.family_geometries import assert_rows, expected, named, open_checkpoint, path_of, same
from tests.support.geometries import Row
from tests.support.models import byte_tokenizer, save_model
from tests.support.opened import viewed
from tests.support.saved_queries import answer
from tests.support.synthetic import Run, random_warehouse

TABLES = (schema.EXPERT_GEOMETRY, schema.ROUTER_SIMILARITY, schema.EXPERT_SIMILARITY)
SHAPES = ("olmoe", "mixtral", "gpt_oss", "deepseek_v3")


def moewh(layout: Layout, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--warehouse", str(layout.root)])


def ingest(model: Path, layout: Layout, run_id: str = "a-run", *more: str) -> None:
    prompts = layout.root.parent / "prompts.txt"
    prompts.write_text("the cat sat on the mat\nthen on me\n")
    done = moewh(layout, "ingest", "--model", str(model), "--prompts", str(prompts), "--run-id", run_id, *more)
    assert done.exit_code == 0, done.stderr


def save_family(name: str, folder: Path) -> Any:
    model = build(named(name))
    model.save_pretrained(folder, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(folder)
    return model


def rows_of(layout: Layout, table: schema.Table, layer: int, run_id: str = "a-run") -> list[Row]:
    """The rows of a layer through the view, in order."""
    keys = "expert" if table is schema.EXPERT_GEOMETRY else "expert_a, expert_b"
    with viewed(layout) as connection:
        rows = connection.execute(
            f"select * from {table.name} where run_id = ? and layer = ? order by {keys}", [run_id, layer]
        )
        names = [column[0] for column in rows.description or ()]
        return [dict(zip(names, row, strict=True)) for row in rows.fetchall()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A warehouse with a run `a-run` of the model `tiny` beside it, and its geometry."""
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "tiny")
    layout = Layout(folder / "wh")
    ingest(folder / "tiny", layout)
    done = moewh(layout, "geometry", "--model", str(folder / "tiny"))
    assert done.exit_code == 0, done.stderr
    assert done.stderr == "geometry of run a-run: 3 layers, 24 experts, 84 pairs, subspaces of rank 2\n"
    return layout


@pytest.fixture
def copied(made: Layout, tmp_path: Path) -> Layout:
    """A copy to change, with the model beside it."""
    shutil.copytree(made.root.parent, tmp_path, dirs_exist_ok=True, symlinks=True)
    return Layout(tmp_path / "wh")


# ------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("name", SHAPES)
def test_command_equals_numpy(name: str, tmp_path: Path) -> None:
    """Through the command, from a checkpoint in several files, to the views."""
    model = save_family(name, tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    layout = Layout(tmp_path / "wh")
    ingest(tmp_path / "model", layout)
    done = moewh(layout, "geometry", "--model", str(tmp_path / "model"), "--rank", "5")
    assert done.exit_code == 0, done.stderr
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.moe_layers
    for moe in checkpoint.moe_layers:
        wanted = expected(named(name), model, moe, path_of(checkpoint, moe.router), 5)
        for table, rows in zip(TABLES, wanted, strict=True):
            assert_rows(rows_of(layout, table, moe.layer), rows)
    assert moewh(layout, "verify").exit_code == 0


HUB_KEYS: dict[str, dict[str, str]] = {
    "mixtral": {"": "block_sparse_moe", "gate": "w1", "up": "w3", "down": "w2"},
    "olmoe": {"": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    "deepseek_v3": {"": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}
"""Names of the block and of each expert's matrices in the hub's checkpoints of these families."""


@pytest.mark.parametrize("name", HUB_KEYS)
def test_checkpoint_with_a_tensor_for_each_expert(name: str, tmp_path: Path) -> None:
    """The hub's layout, written here tensor by tensor from the fused parameters."""
    model = build(named(name))
    words = HUB_KEYS[name]
    stored = {}
    for key, tensor in model.state_dict().items():
        block, found, last = key.rpartition(".mlp.experts.")
        parts = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(last, ())
        for expert in range(len(tensor)) if found else ():
            for part, matrix in zip(parts, tensor[expert].chunk(len(parts)), strict=True):
                stored[f"{block}.{words['']}.experts.{expert}.{words[part]}.weight"] = matrix.contiguous()
        if not found:
            stored[key.replace(".mlp.gate.", f".{words['']}.gate.")] = tensor.contiguous()
    model.config.save_pretrained(tmp_path)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    for moe in checkpoint.moe_layers:
        container = model.get_submodule(moe.path)
        with checkpoint.layer(moe):
            for parameter in ("gate_up_proj", "down_proj"):
                assert torch.equal(getattr(moe.experts, parameter), getattr(container, parameter))
            rows = layer_weights(moe).router_EH
            assert rows is not None
            assert torch.equal(rows, model.get_parameter(f"{path_of(checkpoint, moe.router)}.weight"))


def test_fp8_is_turned_into_numbers(tmp_path: Path) -> None:
    """DeepSeek-V3 as on the hub: eight-bit floats, and a scale for each block of a matrix."""
    model = build(named("deepseek_v3"))
    config = json.loads(model.config.to_json_string())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    stored, numbers = {}, {}
    generator = torch.Generator().manual_seed(0)
    for layer in (1, 2, 3):
        block = f"model.layers.{layer}.mlp"
        stored[f"{block}.gate.weight"] = model.get_parameter(f"{block}.gate.weight").detach().contiguous()
        for expert, name in product(range(8), ("gate_proj", "up_proj", "down_proj")):
            shape = (32, 16) if name == "down_proj" else (16, 32)
            eight_bits = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
            scales = torch.rand(shape[0] // 16, shape[1] // 16, generator=generator)
            key = f"{block}.experts.{expert}.{name}"
            stored |= {f"{key}.weight": eight_bits, f"{key}.weight_scale_inv": scales}
            numbers[key] = eight_bits.double() * scales.double().repeat_interleave(16, 0).repeat_interleave(16, 1)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    for moe in checkpoint.moe_layers:
        with checkpoint.layer(moe):
            weights = layer_weights(moe)
            assert weights.gate is not None
            for name, matrices in (("gate_proj", weights.gate), ("up_proj", weights.up), ("down_proj", weights.down)):
                for expert, matrix in enumerate(matrices):
                    wanted = numbers[f"{moe.path}.{expert}.{name}"]
                    assert torch.allclose(matrix.double(), wanted, rtol=1e-6, atol=0)


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The values of E2M1, by their four bits (OCP Microscaling Formats 1.0)."""


def test_mxfp4_is_turned_into_numbers(tmp_path: Path) -> None:
    """gpt-oss as on the hub: four-bit numbers [E, out, blocks, 16 bytes], and a power of two for every 32 of them."""
    model = build(named("gpt_oss"))
    config = json.loads(model.config.to_json_string())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "intermediate_size": 32}))
    rng = np.random.default_rng(0)
    stored, numbers = {}, {}
    for key, tensor in model.state_dict().items():
        _, found, last = key.rpartition(".mlp.experts.")
        if not found:
            stored[key] = tensor.contiguous()
        elif not last.endswith("bias"):
            out = 64 if last == "gate_up_proj" else 32
            blocks, scales = rng.integers(0, 256, (8, out, 1, 16)), rng.integers(120, 130, (8, out, 1))
            halves = np.stack([FP4[blocks & 15], FP4[blocks >> 4]], -1).reshape(8, out, 32)
            numbers[key] = halves * 2.0 ** (scales - 127)
            stored[f"{key}_blocks"] = torch.tensor(blocks, dtype=torch.uint8)
            stored[f"{key}_scales"] = torch.tensor(scales, dtype=torch.uint8)
            stored[f"{key}_bias"] = torch.zeros(8, out)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    for moe in checkpoint.moe_layers:
        with checkpoint.layer(moe):
            for name in ("gate_up_proj", "down_proj"):
                found = getattr(moe.experts, name).detach().double().numpy()
                assert np.array_equal(found.swapaxes(1, 2), numbers[f"{moe.path}.{name}"])


# ------------------------------------------------------------------------------------------ memory

_PEAKS = """
import json, resource, sys
import torch
from tests.support.family_geometries import open_checkpoint
from moewh.ingest.geometry.matrices import layer_weights
from moewh.ingest.geometry.subspaces import layer_geometry
from pathlib import Path

torch.set_num_threads(1)
peaks = []
for folder in sys.argv[1:]:
    checkpoint = open_checkpoint(Path(folder))
    for moe in checkpoint.moe_layers:
        with checkpoint.layer(moe):
            layer_geometry(layer_weights(moe), moe.layer, moe.num_experts, 4, torch.device("cpu"))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
print(json.dumps([checkpoint.bytes_of(checkpoint.moe_layers[0]), *peaks]))
"""


def test_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    """Peak resident memory with two layers and then, in the same process, with five: less than one layer more."""
    for layers in (2, 5):
        shape = {"hidden_size": 32, "intermediate_size": 1024, "num_hidden_layers": layers}  # long and so soon reduced
        shape |= {"num_experts": 64, "num_local_experts": 64}
        build(Family("large", "OlmoeForCausalLM", shape)).save_pretrained(tmp_path / str(layers))
    done = subprocess.run(
        [sys.executable, "-c", _PEAKS, str(tmp_path / "2"), str(tmp_path / "5")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    layer, small, large = json.loads(done.stdout.splitlines()[-1])
    assert layer == 4 * 64 * (3 * 32 * 1024 + 32)
    assert large - small < layer, f"{(large - small) / layer:.2f} layers more"


# ------------------------------------------------------------------------------------------ the command


def test_again_writes_nothing(copied: Layout) -> None:
    before = {path: path.read_bytes() for path in copied.geometry("a-run").iterdir()}
    model = str(copied.root.parent / "tiny")
    done = moewh(copied, "geometry", "--model", model, "--run-id", "a-run")
    assert done.stderr == "the geometry of run a-run is complete already; nothing was written.\n"
    assert {path: path.read_bytes() for path in copied.geometry("a-run").iterdir()} == before
    done = moewh(copied, "geometry", "--model", model, "--rank", "3")
    assert (done.exit_code, done.stderr) == (
        1,
        "moewh: the geometry of run a-run has rank 2, not 3. Add --overwrite to replace it.\n",
    )
    assert moewh(copied, "geometry", "--model", model, "--rank", "3", "--overwrite").exit_code == 0
    assert {row["subspace_rank"] for row in rows_of(copied, schema.EXPERT_GEOMETRY, 1)} == {3}
    assert moewh(copied, "verify").exit_code == 0
    assert not list(copied.staging.glob("*.part"))


def without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def without_a_matrix(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".layers.1.mlp.gate." not in k}, model / "model.safetensors")


def other_numbers(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"})


def other_configuration(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 2}))


def quantised(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))


REFUSALS: list[tuple[Callable[[Path], None] | None, list[str], int, str]] = [
    (None, ["--run-id", "other"], 1, r"there is no run 'other' in \S+. Runs: a-run\."),
    (None, ["--run-id", "~schema"], 2, r"run id '~schema' is not allowed"),
    (None, ["--revision", "main"], 2, r"--revision main goes with a hub id"),
    (None, ["--rank", "0"], 2, r"'--rank': 0 is not in the range"),
    (None, ["--rank", "33"], 2, r"--rank 33 is more than the experts' matrices have: give at most 32\."),
    (None, ["--device", "auto"], 2, r"--device auto spreads a whole model"),
    (None, ["--device", "nowhere"], 2, r"--device nowhere cannot be used"),
    (other_numbers, ["--run-id", "a-run"], 1, r"run 'a-run' is not of the model \S+: weights_sha256 was \w+, is \w+\."),
    (other_numbers, [], 1, r"no run in \S+ is of the model \S+ as it is now"),
    (other_configuration, ["--run-id", "a-run"], 1, r"not of the model \S+: config_sha256 was \w+, is \w+\."),
    (without_weights, [], 1, r"tiny has no safetensors weights, and `moewh geometry` reads no others"),
    (quantised, ["--overwrite"], 1, r"its weights are quantised \(awq\)\. `moewh geometry` reads unquantised weights"),
]


@pytest.mark.parametrize(("change", "arguments", "code", "says"), REFUSALS)
def test_refusal(
    change: Callable[[Path], None] | None, arguments: list[str], code: int, says: str, copied: Layout
) -> None:
    model = copied.root.parent / "tiny"
    if change:
        change(model)
    done = moewh(copied, "geometry", "--model", str(model), *arguments)
    assert done.exit_code == code, done.stderr
    assert re.search(says, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert moewh(copied, "verify").exit_code == 0


def test_refusal_of_models_and_warehouses(made: Layout, tmp_path: Path) -> None:
    model = made.root.parent / "tiny"
    nowhere, fresh = Layout(tmp_path / "none"), Layout(tmp_path / "fresh")
    fresh.create()
    dense = save_model(tmp_path / "dense", "qwen3-dense")
    save_family("doge", tmp_path / "doge")
    for layout, name, says in (
        (nowhere, model, "there is no warehouse at"),
        (fresh, model, "no run in"),
        (made, dense, "no run in"),
        (made, tmp_path / "nothing", "there is no folder"),
    ):
        done = moewh(layout, "geometry", "--model", str(name))
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.stderr
        assert says in done.stderr
    with pytest.raises(MoewhError, match=r"dense model"):
        open_checkpoint(dense)
    ingest(tmp_path / "doge", fresh)
    done = moewh(fresh, "geometry", "--model", str(tmp_path / "doge"))
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "model.layers.0.mlp (DogeCDMoE) keeps its experts' weights in a layout" in done.stderr


def test_several_runs_need_a_name(copied: Layout) -> None:
    model = copied.root.parent / "tiny"
    ingest(model, copied, "second", "--limit", "1")
    done = moewh(copied, "geometry", "--model", str(model))
    assert (done.exit_code, "2 runs are of this model: a-run, second. Choose one with --run-id." in done.stderr) == (
        2,
        True,
    )
    assert moewh(copied, "geometry", "--model", str(model), "--run-id", "second").exit_code == 0
    assert rows_of(copied, schema.ROUTER_SIMILARITY, 2, "second") != []


@pytest.mark.parametrize("change", [without_a_matrix], ids=lambda change: change.__name__)
def test_missing_weights_are_named(change: Callable[[Path], None], made: Layout, tmp_path: Path) -> None:
    model = shutil.copytree(made.root.parent / "tiny", tmp_path / "model")
    change(model)
    checkpoint = open_checkpoint(model)
    with (
        pytest.raises(MoewhError, match=r"model\.layers\.1\.mlp\.gate\.weight cannot be read"),
        checkpoint.layer(checkpoint.moe_layers[1]),
    ):
        pass


# ------------------------------------------------------------------------------------------ the warehouse


@pytest.mark.parametrize("bad", [table.file for table in TABLES] + [MANIFEST])
def test_damage_is_found_and_the_command_that_repair_names_writes_it_again(bad: str, copied: Layout) -> None:
    folder = copied.geometry("a-run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    data = bytearray((folder / bad).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / bad).write_bytes(data)
    found = moewh(copied, "verify", "--repair")
    assert found.exit_code == 1
    assert found.stdout.startswith("geometry/run_id=a-run/")
    assert bad == MANIFEST or f"geometry/run_id=a-run/{bad}: does not match its sha256\n" in found.stdout
    assert "moved to quarantine/geometry/run_id=a-run\n" in found.stdout
    (line,) = (line for line in found.stdout.splitlines() if line.startswith("  moewh "))
    words = shlex.split(line)[1:]
    assert words[0] == "geometry"
    words[words.index("--model") + 1] = str(copied.root.parent / "tiny")  # the fixture's folder was copied
    assert rows_of(copied, schema.EXPERT_GEOMETRY, 0) == []
    assert CliRunner().invoke(main, words).exit_code == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert moewh(copied, "verify").exit_code == 0


def test_geometry_of_another_run_is_a_fault(copied: Layout) -> None:
    ingest(copied.root.parent / "tiny", copied, "second", "--limit", "1")
    shutil.copytree(copied.geometry("a-run"), copied.geometry("second"))
    (fault,) = check(plan(copied))
    assert (fault.folder, fault.file, fault.why) == (copied.geometry("second"), MANIFEST, "belongs to another folder")


def test_deleting_a_run_deletes_its_geometry(copied: Layout) -> None:
    assert moewh(copied, "runs", "--delete", "a-run", "--yes").exit_code == 0
    assert not copied.geometry("a-run").exists()
    assert check(plan(copied)) == []
    shutil.copytree(copied.geometry(SCHEMA_RUN), copied.geometry("left"))  # as a kill in between would leave it
    assert moewh(copied, "runs", "--delete", "left", "--yes").exit_code == 0
    assert not copied.geometry("left").exists()


def test_a_warehouse_from_before_answers_with_no_rows(copied: Layout) -> None:
    """Without the folder and without its zero-row files, in `moewh` and in the published file of then and now."""
    for layout in (copied, Layout(copied.empty)):
        shutil.rmtree(layout.root / "geometry")
    assert check(plan(copied)) == []
    for table in TABLES:
        done = moewh(copied, "query", table.name, "--format", "csv")
        assert (done.exit_code, done.stdout.count("\n")) == (0, 1), done.stderr
        assert done.stdout.startswith("run_id,layer,expert")
    assert moewh(copied, "query", "geometry_predicts_co_routing").exit_code == 0
    assert not (copied.root / "geometry").exists()
    assert moewh(copied, "geometry", "--model", str(copied.root.parent / "tiny")).exit_code == 0
    assert len(rows_of(copied, schema.EXPERT_GEOMETRY, 0)) == 8
    assert check(plan(copied)) == []


# ------------------------------------------------------------------------------------------ the saved query


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, list[Run]]:
    layout, runs = random_warehouse(tmp_path_factory.mktemp("random") / "wh")
    return layout, [run for run in runs if layout.geometry(run.run_id).is_dir()]


def mean_ranks(values: list[float]) -> list[float]:
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


def spearman(a: list[float], b: list[float]) -> float | None:
    first, second = np.array(mean_ranks(a)), np.array(mean_ranks(b))
    return None if np.ptp(first) == 0 or np.ptp(second) == 0 else float(np.corrcoef(first, second)[0, 1])


def test_geometry_predicts_co_routing_equals_brute_force(random: tuple[Layout, list[Run]]) -> None:
    layout, runs = random
    wanted = []
    measures = ("router_cosine", "input_cosine", "output_cosine", "input_overlap", "output_overlap")
    for run in sorted(runs, key=lambda run: run.run_id):
        lifts = {row[1:4]: row[7] for row in brute_co_routing(run)}
        chosen = {row[1:3] for row in brute_expert_load(run) if row[3]}
        for layer, (experts, _) in sorted(run.layers.items()):
            alike = {
                (row["expert_a"], row["expert_b"]): row
                for row in rows_of(layout, schema.EXPERT_SIMILARITY, layer, run.run_id)
            }
            for row in rows_of(layout, schema.ROUTER_SIMILARITY, layer, run.run_id):
                alike[row["expert_a"], row["expert_b"]]["router_cosine"] = row["cosine"]
            pairs = [pair for pair in combinations(range(experts), 2) if all((layer, e) in chosen for e in pair)]
            numbers: list[float | None] = []
            for measure in measures:
                known = [pair for pair in pairs if alike[pair][measure] is not None]
                likeness = [alike[pair][measure] for pair in known]
                numbers.append(spearman(likeness, [lifts.get((layer, *pair), 0.0) for pair in known]))
            wanted.append((run.run_id, layer, len(pairs), *numbers))
    got = answer(layout, "geometry_predicts_co_routing", {})
    assert [row[:3] for row in got] == [row[:3] for row in wanted]
    for found, target in zip(got, wanted, strict=True):
        assert all(same(value, number) for value, number in zip(found[3:], target[3:], strict=True)), (found, target)
    assert any(number is None for row in wanted for number in row[3:]), "a top-1 layer must be among them"
    assert answer(layout, "geometry_predicts_co_routing", {"run": "mixed"}) == [row for row in got if row[0] == "mixed"]
