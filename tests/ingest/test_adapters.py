"""Adapters: a folder with adapter_config.json is recorded as base and adapter together, or refused in one line."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from moewh.cli.main import main
from moewh.ingest.model.peft_adapter import SUPPORTED_TYPES
from moewh.ingest.options import IngestOptions
from moewh.ingest.run import ingest
from moewh.warehouse.files.layout import Layout
from tests.support.families import FAMILIES, build
from tests.support.lora import Routes, merged_with, routed, save_adapter
from tests.support.models import DEVICE, byte_tokenizer
from tests.support.opened import viewed

BY_NAME = {family.name: family for family in FAMILIES}
IDS = [[5, 9, 200, 3], [7, 7, 30], [1, 2, 3, 4, 5, 6]]
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
ROUTER: dict[str, Any] = {"target_modules": [], "target_parameters": ["gate.weight"]}
EXPERTS: dict[str, Any] = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}


def save_base(folder: Path, name: str = "olmoe", dtype: torch.dtype = torch.float32) -> Path:
    build(BY_NAME[name]).to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read by tests that change nothing in it."""
    return save_base(tmp_path_factory.mktemp("bases") / "base")


def lora(**changes: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 12, **changes})


def adapt(base: Path, folder: Path, config: peft.PeftConfig, name: str = "olmoe", seed: int = 0) -> Path:
    return save_adapter(build(BY_NAME[name]), folder, base, config, seed)


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in IDS))
    return path


def record(warehouse: Path, model: Path, ids: Path, **options: Any) -> Routes:
    """Each prompt is a separate batch, so that sums agree to the last bit."""
    ingest(IngestOptions(model=str(model), prompts=(str(ids),), batch_tokens=1, **options), Layout(warehouse))
    rows = viewed(Layout(warehouse)).execute(
        "select prompt_id, position, layer, expert, weight from routes order by all"
    )
    found: Routes = {}
    for prompt, position, layer, expert, weight in rows.fetchall():
        found.setdefault((prompt, position, layer), {})[expert] = weight
    return found


def assert_alike(real: Routes, expected: Routes) -> None:
    """The same experts, with weights that differ by rounding: merged matrices round differently from their parts."""
    assert real.keys() == expected.keys()
    for key, pairs in real.items():
        assert pairs.keys() == expected[key].keys(), key
        assert all(abs(weight - expected[key][expert]) <= 1e-5 for expert, weight in pairs.items())


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refusal(warehouse: Path, model: Path, ids: Path, *options: str) -> str:
    """Return the one line with which a command ends, after checking that nothing is written."""
    result = run("ingest", "--model", model, "--prompts", ids, "--warehouse", warehouse, *options)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert not warehouse.exists()
    return result.stderr


@pytest.mark.parametrize("where", [ATTENTION, ROUTER, EXPERTS], ids=["attention", "router", "experts"])
@pytest.mark.parametrize("name", ["olmoe", "mixtral", "qwen3_moe"])
def test_rows_are_those_of_base_plus_scaled_b_a(name: str, where: dict[str, Any], tmp_path: Path, ids: Path) -> None:
    base = save_base(tmp_path / "base", name)
    adapter = adapt(base, tmp_path / "adapter", lora(**where), name)
    model = build(BY_NAME[name])
    before = routed(model, IDS)
    model.load_state_dict(merged_with(model.state_dict(), adapter, scaling=12 / 4))
    expected = routed(model, IDS)
    real = record(tmp_path / "wh", adapter, ids, router_logits=True, hidden_states="all")
    assert [list(pairs) for pairs in before.values()] != [list(pairs) for pairs in expected.values()]
    assert_alike(real, expected)
    layers = viewed(Layout(tmp_path / "wh")).execute(
        "select distinct regexp_replace(module, '[0-9]+', 'N'), router_class, num_experts from layers"
    )
    own = type(model.model.layers[-1].mlp.gate).__name__
    assert layers.fetchall() == [("model.layers.N.mlp.experts", own, 8)]


_SMALL: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, "init_r": 4, "target_r": 2},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LORA": {"r": 4, "use_rslora": True, "modules_to_save": ["gate"]},
    "OFT": {"oft_block_size": 4},
    "RANDLORA": {"r": 4},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [5, 7, 30]},
}
"""Settings that a type needs besides its target modules."""


@pytest.mark.parametrize("kind", sorted(kind.value for kind in peft.PeftType))
def test_each_type_of_adapter_is_peft_s_own_pass_or_is_refused(
    kind: str, tmp_path: Path, base: Path, ids: Path
) -> None:
    if kind not in SUPPORTED_TYPES:
        adapter = adapt(base, tmp_path / "adapter", lora(**ATTENTION))
        settings = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": kind}))
        assert f"is an adapter of type {kind}, which is not recorded" in refusal(tmp_path / "wh", adapter, ids)
        return
    config_class = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    adapter = adapt(base, tmp_path / "adapter", config_class(**{**ATTENTION, **_SMALL.get(kind, {})}))
    plain = build(BY_NAME["olmoe"]).to(DEVICE).eval()
    adapted: Any = peft.PeftModel.from_pretrained(build(BY_NAME["olmoe"]), str(adapter)).to(DEVICE).eval()
    expected = routed(adapted.get_base_model(), IDS, call=adapted)
    assert expected != routed(plain, IDS)
    assert record(tmp_path / "wh", adapter, ids) == expected


def test_sixteen_bit_rows_are_peft_s_own(tmp_path: Path, ids: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = adapt(base, tmp_path / "adapter", lora(**ATTENTION))
    plain: Any = type(build(BY_NAME["olmoe"])).from_pretrained(base)
    adapted: Any = peft.PeftModel.from_pretrained(plain, str(adapter)).to(DEVICE).eval()
    assert record(tmp_path / "wh", adapter, ids) == routed(adapted.get_base_model(), IDS, call=adapted)


@pytest.mark.parametrize("module", ["gate", "experts", "mlp"])
def test_modules_saved_whole_are_the_ones_that_run(module: str, tmp_path: Path, base: Path, ids: Path) -> None:
    adapter = adapt(base, tmp_path / "adapter", lora(target_modules=["q_proj"], modules_to_save=[module]))
    model = build(BY_NAME["olmoe"])
    state = merged_with(model.state_dict(), adapter, scaling=12 / 4)
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        if "lora" not in name:
            state[name.removeprefix("base_model.model.")] = tensor
    model.load_state_dict(state)
    expected, real = routed(model, IDS), record(tmp_path / "wh", adapter, ids)
    assert_alike(real, expected)


def test_base_beside_the_adapter_gives_the_rows_of_the_adapter_alone(tmp_path: Path, base: Path, ids: Path) -> None:
    alone = adapt(base, tmp_path / "alone", lora(**ATTENTION))
    beside = shutil.copytree(base, tmp_path / "beside")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(alone / file, beside / file)
    rows = record(tmp_path / "a", alone, ids)
    assert record(tmp_path / "b", beside, ids) == rows
    assert record(tmp_path / "c", base, ids) != rows


def test_base_and_adapters_never_pass_for_one_another(tmp_path: Path, base: Path, ids: Path) -> None:
    """Other weights, another scaling, another base: each is a separate run, and none can reuse another's run id."""
    first = adapt(base, tmp_path / "first" / "m", lora(**ATTENTION))
    second = adapt(base, tmp_path / "second" / "m", lora(**ATTENTION), seed=1)
    scaled = shutil.copytree(first, tmp_path / "scaled" / "m")
    settings = json.loads((first / "adapter_config.json").read_text())
    (scaled / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 13}))
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    on_other = shutil.copytree(first, tmp_path / "on_other" / "m")
    (on_other / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(other)}))
    folders = [base, first, second, scaled, on_other]
    for folder in folders:
        record(tmp_path / "wh", folder, ids)
    rows = viewed(Layout(tmp_path / "wh")).execute("select model, identity, series from runs").fetchall()
    assert {model for model, _, _ in rows} == {str(folder) for folder in folders}
    assert len({identity for _, identity, _ in rows}) == len({series for _, _, series in rows}) == len(folders)
    connection = viewed(Layout(tmp_path / "wh"))
    ((run_id,),) = connection.execute("select run_id from runs where model = ?", [str(first)]).fetchall()
    arguments = ("ingest", "--prompts", ids, "--warehouse", tmp_path / "wh", "--run-id", run_id)
    for folder in folders:
        result = run(*arguments, "--model", folder)
        assert (result.exit_code == 0) == (folder == first), result.output


def test_a_moved_base_is_the_same_model(tmp_path: Path, ids: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", lora(**ATTENTION))
    record(tmp_path / "wh", adapter, ids)
    base.rename(tmp_path / "moved")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "moved")})
    )
    result = run("ingest", "--model", adapter, "--prompts", ids, "--warehouse", tmp_path / "wh", "--batch-tokens", 1)
    assert result.exit_code == 0
    assert "complete already" in result.stderr


def test_generation_is_the_adapted_model_s(tmp_path: Path, base: Path, ids: Path) -> None:
    adapter = adapt(base, tmp_path / "adapter", lora(**EXPERTS))
    record(tmp_path / "wh", adapter, ids, generate=5)
    said = viewed(Layout(tmp_path / "wh")).execute(
        "select prompt_id, list(vocab_id order by position) from tokens group by prompt_id order by prompt_id"
    )
    adapted: Any = peft.PeftModel.from_pretrained(build(BY_NAME["olmoe"]), str(adapter)).to(DEVICE).eval()
    for prompt, tokens in said.fetchall():
        expected = list(IDS[prompt])
        while len(expected) < len(IDS[prompt]) + 5 and expected[-1] != 0:
            with torch.inference_mode():
                expected.append(int(adapted(input_ids=torch.tensor([expected], device=DEVICE)).logits[0, -1].argmax()))
        assert tokens == expected


def test_without_peft_it_is_refused_and_says_what_to_install(
    tmp_path: Path, base: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapt(base, tmp_path / "adapter", lora(**ATTENTION))
    beside = shutil.copytree(base, tmp_path / "beside")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / file, beside / file)
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for folder in (beside, adapter):
        assert "Install it: pip install 'moewh[peft]'." in refusal(tmp_path / "wh", folder, ids)
        assert "pip install 'moewh[peft]'" in run("inspect", folder).stdout


def break_settings(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))

    return change


def break_weights(change: Any) -> Any:
    def changed(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return changed


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()


def without_last(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(sorted(tensors.items())[:-1])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "but no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json is not valid JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "adapter_config.json is not a JSON object"),
        (cut, "the adapter does not fit its base: SafetensorError"),
        (pickled, "give --allow-pickle"),
        (break_weights(without_last), "The file lacks base_model.model.model.layers"),
        (break_weights(lambda _: {}), "The file lacks base_model.model.model.layers"),
        (
            break_weights(lambda tensors: {**tensors, "base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}),
            "holds, unused, base_model.model.lm_head.lora_A",
        ),
        (
            break_weights(
                lambda tensors: {k: v[:, :2].clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
            ),
            "size mismatch",
        ),
        (break_settings(r=2), "size mismatch"),
        (break_settings(target_modules=["nowhere"]), "not found in the base model"),
        (break_settings(target_modules=["q_proj"]), "holds, unused,"),
        (break_settings(modules_to_save=["norm"]), "does not fit its base"),
        (break_settings(base_model_name_or_path=None), "names no base model"),
        (break_settings(base_model_name_or_path="/nowhere/at/all"), "its base model /nowhere/at/all is not there"),
        (break_settings(peft_type=None), "is an adapter of type None"),
        (break_settings(alora_invocation_tokens=[1]), "(aLoRA) is not recorded"),
        (break_settings(layer_replication=[[0, 2]]), "repeats layers of its base"),
        (break_settings(r="four"), "does not fit its base"),
    ],
)
def test_an_adapter_that_is_not_applied_whole_is_refused(
    damage: Any, says: str, tmp_path: Path, base: Path, ids: Path
) -> None:
    adapter = adapt(base, tmp_path / "adapter", lora(**ATTENTION))
    damage(adapter)
    assert says in refusal(tmp_path / "wh", adapter, ids)


@pytest.mark.parametrize("where", [ROUTER, EXPERTS], ids=["router", "experts"])
def test_each_tensor_of_an_adapter_of_parameters_counts(
    where: dict[str, Any], tmp_path: Path, base: Path, ids: Path
) -> None:
    adapter = adapt(base, tmp_path / "adapter", lora(**where))
    whole = load_file(adapter / "adapter_model.safetensors")
    for name in sorted(whole)[:4]:
        rest = {other: tensor for other, tensor in whole.items() if other != name}
        save_file(rest, adapter / "adapter_model.safetensors")
        assert "the adapter does not fit its base" in refusal(tmp_path / "wh", adapter, ids)


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "qwen3_moe"])
def test_an_adapter_of_each_expert_s_own_matrices_is_put_on_the_fused_ones(
    name: str, tmp_path: Path, ids: Path
) -> None:
    """The form of experts in transformers 4, still used by old adapters with a dropout."""
    base = save_base(tmp_path / "base", name)
    model = build(BY_NAME[name])
    state = model.state_dict()
    parts = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    adapter = adapt(base, tmp_path / "adapter", lora(target_modules=["q_proj"]), name)
    torch.manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for path in [path for path in state if path.endswith("experts.gate_up_proj")]:
        container = path.removesuffix(".gate_up_proj")
        block = container.replace("mlp", "block_sparse_moe") if name == "mixtral" else container
        I = state[path].shape[1] // 2  # noqa: E741 - the length of an expert's inner layer
        for expert in range(8):
            rows = (state[path][expert][:I], state[path][expert][I:], state[f"{container}.down_proj"][expert])
            for part, weight in zip(parts, rows, strict=True):
                A, B = torch.randn(4, weight.shape[1]) / 4, torch.randn(len(weight), 4) / 4
                key = f"base_model.model.{block}.{expert}.{part}"
                tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
                weight.add_(B @ A, alpha=12 / 4)
    save_file(tensors, adapter / "adapter_model.safetensors")
    break_settings(target_modules=list(parts), lora_dropout=0.1)(adapter)
    model.load_state_dict(state)
    expected, real = routed(model, IDS), record(tmp_path / "wh", adapter, ids)
    assert_alike(real, expected)
    assert real != record(tmp_path / "base_rows", base, ids)
    for lacking in list(tensors)[:3]:
        rest = {other: tensor for other, tensor in tensors.items() if other != lacking}
        save_file(rest, adapter / "adapter_model.safetensors")
        assert "the adapter does not fit its base" in refusal(tmp_path / "none", adapter, ids)


def test_pickled_adapters_are_read_when_allowed(tmp_path: Path, base: Path, ids: Path) -> None:
    adapter = adapt(base, tmp_path / "adapter", lora(**ATTENTION))
    rows = record(tmp_path / "a", adapter, ids)
    pickled(adapter)
    assert record(tmp_path / "b", adapter, ids, allow_pickle=True) == rows


def test_an_adapter_of_an_adapter_is_refused(tmp_path: Path, ids: Path) -> None:
    adapter = adapt(save_base(tmp_path / "base"), tmp_path / "adapter", lora(**ATTENTION))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / file, tmp_path / "base" / file)
    assert "has an adapter too. Only one is applied" in refusal(tmp_path / "wh", adapter, ids)


def test_the_tokenizer_is_the_adapter_s_own_if_it_has_one(tmp_path: Path, base: Path) -> None:
    adapter = adapt(base, tmp_path / "adapter", lora(**ATTENTION))
    own = shutil.copytree(adapter, tmp_path / "own")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["a"]})
    tokenizer.save_pretrained(own)
    (tmp_path / "p.txt").write_text("banana\n")
    texts = []
    for folder in (adapter, own):
        ingest(
            IngestOptions(model=str(folder), prompts=(str(tmp_path / "p.txt"),)), Layout(tmp_path / folder.name / "w")
        )
        found = (
            viewed(Layout(tmp_path / folder.name / "w"))
            .execute(
                "select tokenizer_sha256 from (select options ->> 'tokenizer_sha256' as tokenizer_sha256 from runs)"
            )
            .fetchall()
        )
        texts += found
    assert len(set(texts)) == 2


def test_an_adapter_that_cannot_run_is_refused(tmp_path: Path, ids: Path) -> None:
    base = save_base(tmp_path / "base", "llama4")
    adapter = adapt(base, tmp_path / "adapter", lora(target_modules=["router"]), "llama4")
    assert "the model does not run with this adapter" in refusal(tmp_path / "wh", adapter, ids)


def test_inspect_describes_the_base_and_says_what_is_applied(tmp_path: Path, base: Path) -> None:
    adapter = adapt(base, tmp_path / "adapter", lora(**ATTENTION))
    shown = run("inspect", adapter)
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[1].split(None, 1) == ["adapter", f"LORA on {base}"]
    assert lines[:1] + lines[2:] == run("inspect", base).stdout.splitlines()
    break_settings(peft_type="PREFIX_TUNING")(adapter)
    assert "no: " in run("inspect", adapter).stdout
    (adapter / "adapter_config.json").write_text("{")
    assert run("inspect", adapter).exit_code == 1


def test_geometry_is_never_the_base_s_for_an_adapted_run(tmp_path: Path, base: Path, ids: Path) -> None:
    adapter = adapt(base, tmp_path / "adapter", lora(**ATTENTION))
    record(tmp_path / "wh", adapter, ids, run_id="adapted")
    warehouse = ("--warehouse", tmp_path / "wh")
    refused = run("geometry", "--model", adapter, *warehouse)
    assert refused.exit_code == 1
    assert "is an adapter" in refused.stderr
    assert run("geometry", "--model", base, "--run-id", "adapted", *warehouse).exit_code == 1
    assert "no run in" in run("geometry", "--model", base, *warehouse).stderr


@pytest.mark.parametrize("base_on_hub", [False, True])
def test_an_adapter_on_the_hub_is_recorded_with_its_commit(
    base_on_hub: bool, tmp_path: Path, base: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from the hub's cache, offline; the base may be there too."""
    local = adapt(base, tmp_path / "adapter", lora(**ATTENTION))
    expected = record(tmp_path / "local", local, ids)
    if base_on_hub:
        break_settings(base_model_name_or_path="someone/base")(local)
    for name, folder, commit in (("base", base, "b" * 40), ("adapter", local, "a" * 40)):
        home = tmp_path / "hub" / f"models--someone--{name}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(commit)
        shutil.copytree(folder, home / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert record(tmp_path / "wh", Path("someone/adapter"), ids) == expected
    runs = viewed(Layout(tmp_path / "wh")).execute("select model, commit_hash, series from runs").fetchall()
    assert runs == [("someone/adapter", "a" * 40, "someone/adapter")]
