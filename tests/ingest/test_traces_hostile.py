"""Traces that are bad, cut, mixed or hostile: one line with the file and position, and nothing written."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from moewh.cli.main import main
from tests.support.traces import (
    EXPERTS,
    HIDDEN,
    MOE,
    TOP_K,
    WRITERS,
    config,
    gguf,
    lines,
    npy,
    recorder_dump,
    sglang_answer,
    traced,
    vllm_answer,
    write_flame,
    write_llama_imatrix,
    write_sglang_stat,
    write_tensorrt_llm,
)

Make = Callable[[Path], list[Path]]


def plain(**fields: Any) -> Make:
    """A good sequence, and one with some fields changed."""
    good = {"expert_ids": [[[1, 2], [3, 4]], [[5, 6], [0, 1]]], "token_ids": [1, 2, 3]}
    return lambda folder: lines(folder / "t.jsonl", [good, {**good, **fields}])


def vllm(change: Callable[[dict[str, Any]], None]) -> Make:
    """A good answer, and one that is changed."""

    def make(folder: Path) -> list[Path]:
        good, bad = (vllm_answer(one) for one in traced(sequences=2))
        change(bad["choices"][0])
        return lines(folder / "t.jsonl", [good, bad])

    return make


def raw(content: bytes, name: str = "t.jsonl") -> Make:
    def make(folder: Path) -> list[Path]:
        (folder / name).write_bytes(content)
        return [folder / name]

    return make


def sglang(change: Callable[[dict[str, Any]], None]) -> Make:
    """A good answer, and one that is changed."""

    def make(folder: Path) -> list[Path]:
        good, bad = (sglang_answer(one) for one in traced(sequences=2))
        change(bad)
        return lines(folder / "t.jsonl", [good, bad])

    return make


def as_npy(folder: Path) -> list[Path]:
    np.save(folder / "t.npy", np.ones((3, HIDDEN, TOP_K), np.uint8))
    return [folder / "t.npy"]


def as_arrow(folder: Path) -> list[Path]:
    table = pa.table({"routed_experts": [1, 2, 3]})
    with pa.ipc.new_file(folder / "t.arrow", table.schema) as file:
        file.write_table(table)
    return [folder / "t.arrow"]


def other_zip(folder: Path) -> list[Path]:
    np.savez(folder / "t.npz", routed_experts=np.ones((3, HIDDEN, TOP_K), np.uint8))
    return [folder / "t.npz"]


def saved(value: Any) -> Make:
    """A file of torch.save."""

    def make(folder: Path) -> list[Path]:
        torch.save(value, folder / "t.pt")
        return [folder / "t.pt"]

    return make


def cut(write: Callable[..., list[Path]], *arguments: Any, keep: float = 0.6) -> Make:
    """The last file that a writer makes, cut off."""

    def make(folder: Path) -> list[Path]:
        paths = write(folder, *arguments)
        last = max(paths[-1].glob("rank1.*")) if paths[-1].is_dir() else paths[-1]
        content = last.read_bytes()
        last.write_bytes(content[: int(len(content) * keep)])
        return paths

    return make


def packed(pack: Callable[[bytes], bytes]) -> Make:
    """A good trace, as a packer leaves it."""

    def make(folder: Path) -> list[Path]:
        return raw(pack(plain()(folder)[0].read_bytes()), "t.json")(folder)

    return make


def copied(folder: Path) -> list[Path]:
    """A good trace, and a copy of it under another name."""
    (path,) = plain()(folder)
    (folder / "a copy.jsonl").write_bytes(path.read_bytes())
    return [folder / "a copy.jsonl", path]


def ranks_of_one_pass(folder: Path) -> list[Path]:
    """The dumps of two processes that hold parts of the same experts: they differ in their rank alone."""
    paths = []
    for rank in range(2):
        dump = recorder_dump(traced())
        dump["records"][0]["rank"] = rank
        paths.append(folder / f"rank{rank}.pt")
        torch.save(dump, paths[-1])
    return paths


def lines_of_one_pass(folder: Path) -> list[Path]:
    """The lines of two processes that route the same tokens."""
    (path,) = WRITERS["megatron"][1](folder, traced())
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        *lines(folder / "rank0.jsonl", found),
        *lines(folder / "rank1.jsonl", [{**line, "rank": 1} for line in found]),
    ]


def slime(change: Callable[[dict[str, Any]], Any]) -> Make:
    """Rollouts of slime, the first of which is changed."""

    def make(folder: Path) -> list[Path]:
        (path,) = WRITERS["slime"][1](folder, traced())
        rollouts = torch.load(path, weights_only=False)
        change(rollouts["samples"][0])
        return saved(rollouts)(folder)

    return make


def verl(change: Callable[[dict[str, Any]], Any]) -> Make:
    """A batch of verl, with other tensors."""

    def make(folder: Path) -> list[Path]:
        (path,) = WRITERS["verl"][1](folder, traced())
        batch = torch.load(path)
        change(batch)
        return saved(batch)(folder)

    return make


def outputs(change: Callable[[dict[str, Any]], Any]) -> Make:
    """Outputs of vLLM as `.npz`, with other arrays."""

    def make(folder: Path) -> list[Path]:
        (path,) = WRITERS["vllm, npz"][1](folder, traced())
        with np.load(path) as found:
            arrays = dict(found)
        change(arrays)
        np.savez(path, **arrays)
        return [path]

    return make


def damaged_npz(folder: Path) -> list[Path]:
    """Compressed arrays, of which the packed bytes of one are no longer such."""
    (path,) = WRITERS["vllm, npz"][1](folder, traced())
    with np.load(path) as arrays:
        np.savez_compressed(path, **{name: arrays[name] for name in arrays})
    content = bytearray(path.read_bytes())
    begin = content.index(b"routed_experts.npy") + len(b"routed_experts.npy") + 20
    content[begin : begin + 8] = b"\xff" * 8
    path.write_bytes(content)
    return [path]


class Code:
    """What a hostile pickle holds: a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/tmp/moewh-was-here").touch, ())


def npy_of(header: str, data: bytes = b"") -> str:
    """A .npy whose header says anything, in base64."""
    text = header.encode().ljust(118) + b"\n"
    return base64.b64encode(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data).decode()


def object_npy() -> str:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Code()], dtype=object), allow_pickle=True)
    return base64.b64encode(buffer.getvalue()).decode()


def bomb(folder: Path) -> list[Path]:
    """An .npz of a few kilobytes that unfolds to 4 GB."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 3, 2), }".ljust(117) + b"\n"
    with (
        zipfile.ZipFile(folder / "t.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("0/routed_experts.npy", "w", force_zip64=True) as stream,
    ):
        stream.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
        stream.write(b"\0" * (64 << 20))
    return [folder / "t.npz"]


def compressed_torch(folder: Path) -> list[Path]:
    torch.save({"samples": []}, folder / "whole.pt")
    with (
        zipfile.ZipFile(folder / "whole.pt") as whole,
        zipfile.ZipFile(folder / "t.pt", "w", zipfile.ZIP_DEFLATED) as z,
    ):
        for entry in whole.infolist():
            z.writestr(entry.filename, whole.read(entry))
    return [folder / "t.pt"]


def recorder(change: Callable[[dict[str, Any]], Any]) -> Make:
    def make(folder: Path) -> list[Path]:
        dump = recorder_dump(traced())
        change(dump)
        return saved(dump)(folder)

    return make


def stretched(folder: Path) -> list[Path]:
    """A tensor of four bytes that says that it has as many numbers as no memory holds."""
    many = torch.zeros(1, dtype=torch.int32).expand(1 << 40, HIDDEN, TOP_K)
    return saved({"samples": [{"tokens": [1, 2], "rollout_routed_experts": many}]})(folder)


def megatron(*documents: dict[str, Any]) -> Make:
    line = {"step": 0, "block": "decoder", "layer": 1, "num_tokens": 1, "topk": 2, "top_indices": [[1, 2]]}
    return lambda folder: lines(folder / "t.jsonl", [{**line, **document} for document in documents])


def flame(change: Callable[[list[Path]], list[Path]]) -> Make:
    def make(folder: Path) -> list[Path]:
        rng = np.random.default_rng(0)
        ids, experts = rng.integers(0, 200, 30), np.argsort(rng.random((30, 2, EXPERTS)), -1)[..., :TOP_K]
        return change(write_flame(folder, ids, experts, rng.random((30, 2, TOP_K)).astype(np.float16)))

    return make


def shortened(paths: list[Path]) -> list[Path]:
    pq.write_table(pq.read_table(paths[-1]).slice(0, 20), paths[-1])
    return paths


def with_nan(paths: list[Path]) -> list[Path]:
    table = pq.read_table(paths[-1])
    scores = pa.FixedSizeListArray.from_arrays(pa.array(np.full(60, np.nan, np.float16)), TOP_K)
    pq.write_table(table.set_column(0, "scores", scores), paths[-1])
    return paths


def other_meta(folder: Path) -> list[Path]:
    (place,) = write_tensorrt_llm(folder, COUNTS)
    (place / "meta_info.json").write_text(json.dumps({"num_experts": 64, "num_experts_per_token": 6}))
    return [place]


COUNTS = np.arange(len(MOE) * EXPERTS).reshape(len(MOE), EXPERTS)
IMATRIX = {"general.type": "imatrix"}
NAMES = [f"blk.{layer}.ffn_gate_exps.weight.counts" for layer in MOE]

BINARY: dict[str, Make] = {
    "t.npy": as_npy,
    "t.arrow": as_arrow,
    "t.pt": saved({"samples": []}),
    "t.gguf": raw(b"GGUF\3\0\0\0" + bytes(range(256)), "t.gguf"),
}
OF_TORCH = ("verl", "slime", "sglang-recorder", "sglang-stat")


def statistics(dtype: torch.dtype) -> Make:
    """TensorRT-LLM's statistics in a dtype that numpy may not have."""

    def write(folder: Path) -> list[Path]:
        (place,) = write_tensorrt_llm(folder, COUNTS)
        path = (place if place.is_dir() else place.parent) / "rank0.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
        return [place]

    return write


def parquet_twice(name: str) -> Make:
    """A Parquet file with a column twice, as a join writes it."""

    def write(folder: Path) -> list[Path]:
        ids, text = pa.array([[[[1, 2], [3, 4]]]]), pa.array(["a"])
        names = ["expert_ids", "text", name]
        pq.write_table(
            pa.Table.from_arrays([ids, text, ids if name == "expert_ids" else text], names), folder / "t.parquet"
        )
        return [folder / "t.parquet"]

    return write


def parquet_struct(folder: Path) -> list[Path]:
    pq.write_table(pa.table({"expert_ids": pa.array([{"layer": 1}])}), folder / "t.parquet")
    return [folder / "t.parquet"]


def npz_twice(folder: Path) -> list[Path]:
    stream = io.BytesIO()
    np.save(stream, np.array([[[1, 2], [3, 4]]]))
    with zipfile.ZipFile(folder / "t.npz", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr("0/routed_experts.npy", stream.getvalue())
    return [folder / "t.npz"]


def flame_twice(paths: list[Path]) -> list[Path]:
    layer = next(path for path in paths if path.name.startswith("layer_"))
    table = pq.read_table(layer)
    pq.write_table(table.append_column("scores", table["scores"]), layer)
    return paths


CASES: dict[str, tuple[str, Make, str]] = {
    # ---- JSON
    "empty file": ("vllm", raw(b""), "t.jsonl: is empty"),
    "no JSON": ("vllm", raw(b"hello\n"), "t.jsonl: its document is not JSON"),
    "no UTF-8": ("plain", raw(b'{"text": "\xff\xfe"}\n{}\n'), "t.jsonl: its line 1 is not UTF-8"),
    **{
        f"{kind} as {name}": (name, write, f"{kind}: is a binary file, not JSON")
        for name in ("plain", "sglang", "vllm", "nemo-rl", "megatron")
        for kind, write in BINARY.items()
    },
    "cut JSON line": (
        "plain",
        raw(b'{"expert_ids": [[[1, 2], [3, 4]]]}\n{"expert_ids": [[[1'),
        "its line 2 is not JSON",
    ),
    "deep JSON": ("plain", raw(b"[" * 100_000), "nested too deeply"),
    "no object": ("plain", raw(b"[1, 2]"), "its item 0 is not a JSON object"),
    "huge number": ("plain", plain(token_ids=[1, 2, 10**30]), "line 2"),
    # ---- the shape of a sequence
    "no experts": ("plain", plain(expert_ids=None), "line 2 has no expert_ids"),
    "ragged lists": ("plain", plain(expert_ids=[[[1, 2], [3]]]), "line 2, expert_ids: its lists are not of one length"),
    "fractions": ("plain", plain(expert_ids=[[[1.5, 2.0], [3.0, 4.0]]]), "line 2: its experts are float64"),
    "other top-k": ("plain", plain(expert_ids=[[[1, 2, 3], [3, 4, 5]]]), "line 2: has 3 experts per token, but"),
    "other layers": ("plain", plain(expert_ids=[[[1, 2]]]), "line 2: has 1 layers, but"),
    "routing at a dense layer": (
        "plain",
        plain(expert_ids=[[[1, 2], [1, 2], [3, 4]]]),
        "line 2, token 0, layer 0: has routing, and tiny-v3 has no experts there",
    ),
    "expert beyond": ("plain", plain(expert_ids=[[[1, 2], [3, 8]]]), "line 2, token 0, layer 2: expert 8 is none of"),
    "expert below": ("plain", plain(expert_ids=[[[1, 2], [3, -2]]]), "line 2, token 0, layer 2: expert -2 is none of"),
    "expert twice": ("plain", plain(expert_ids=[[[1, 2], [3, 3]]]), "line 2, token 0, layer 2: names an expert twice"),
    "part of a row": ("plain", plain(expert_ids=[[[1, 2], [3, -1]]]), "line 2, token 0, layer 2: has 1 of 2 experts"),
    "more rows than tokens": ("plain", plain(token_ids=[1]), "line 2: has routing for 2 tokens from position 0, but 1"),
    "first beyond": ("plain", plain(first=5), "line 2: has routing for 2 tokens from position 5"),
    "token id beyond": ("plain", plain(token_ids=[1, 2, 200]), "line 2, token 2: token id 200 is outside"),
    "token id below": ("plain", plain(token_ids=[1, -7, 2]), "line 2, token 1: token id -7 is outside"),
    "weights of another shape": ("plain", plain(weights=[[[0.5, 0.5]]]), "line 2: its weights are float64 of shape"),
    "NaN": ("plain", plain(weights=[[[0.5, float("nan")], [0.5, 0.5]]] * 2), "line 2, token 0, layer 1: has a weight"),
    "weights of some": (
        "plain",
        plain(weights=[[[0.5, 0.4], [0.5, 0.4]]] * 2),
        "line 2: has weights, what came before does not",
    ),
    "order of some": ("plain", plain(ordered=True), "line 2: has ordered experts, what came before does not"),
    "unknown field": ("plain", plain(experts=[1]), "line 2 has a field 'experts'. Known: expert_ids, "),
    "wrong type": ("plain", plain(domain=3), "line 2: its domain is 3, not str"),
    # ---- vLLM
    "UTF-16 lines": ("plain", raw('{"expert_ids": []}\n{}\n'.encode("utf-16")), "t.jsonl: is UTF-16"),
    "a copy": ("plain", copied, "t.jsonl: is a copy of "),
    "the same ranks": ("sglang-recorder", ranks_of_one_pass, "rank1.pt: holds the tokens of "),
    "the same lines of two ranks": ("megatron", lines_of_one_pass, "rank1.jsonl: holds the tokens of "),
    "lengths of no tokens": (
        "sglang-recorder",
        recorder(lambda d: d["records"][0].update(extend_seq_lens=torch.tensor([0, 31]))),
        "record 0: its extend_seq_lens are [0, ",
    ),
    "answer of no length": (
        "slime",
        slime(lambda sample: sample.update(response_length=2.0)),
        "sample 0 has a response_length of 2.0, which is not a whole number",
    ),
    "prompts of another batch": (
        "verl",
        verl(lambda batch: batch.update(prompts=batch["prompts"] + 1)),
        "its prompts are not the beginning of its input_ids",
    ),
    "no choice": ("vllm", raw(b'{"choices": []}\n{}\n'), "line 1 has no choice. Leave it out."),
    "half of the token ids": (
        "vllm",
        vllm(lambda c: c.pop("prompt_token_ids")),
        "line 2, choice 0 has token_ids and no prompt_token_ids",
    ),
    "half of an output's ids": (
        "vllm",
        outputs(lambda arrays: arrays.pop("1/token_ids")),
        "outputs.npz, output 1 has 1/prompt_token_ids and no 1/token_ids",
    ),
    "an array of another name": (
        "vllm",
        outputs(lambda arrays: arrays.update({"0/prompt_ids": arrays.pop("0/prompt_token_ids")})),
        "outputs.npz: has an array '0/prompt_ids'. Known: N/routed_experts, ",
    ),
    "an output without routing": (
        "vllm",
        outputs(lambda arrays: arrays.update({"9/token_ids": np.array([1])})),
        "outputs.npz: has an array '9/token_ids'.",
    ),
    "no choices": ("vllm", raw(b'{"error": "overloaded"}'), "has no list of choices"),
    "not captured": ("vllm", vllm(lambda c: c.update(routed_experts=None)), "line 2, choice 0 has no routed_experts"),
    "cut base64": (
        "vllm",
        vllm(lambda c: c.update(routed_experts=c["routed_experts"][:-7])),
        "line 2, choice 0: its routed experts are not complete base64 text",
    ),
    "cut npy": (
        "vllm",
        vllm(lambda c: c.update(routed_experts=c["routed_experts"][:-16])),
        "line 2, choice 0: promises numbers of shape",
    ),
    "pickled npy": ("vllm", vllm(lambda c: c.update(routed_experts=object_npy())), "line 2, choice 0: holds object"),
    "huge npy": (
        "vllm",
        vllm(
            lambda c: c.update(
                routed_experts=npy_of(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({1 << 50}, 3, 2), }}")
            )
        ),
        "line 2, choice 0: has 6,755,399,441,055,744 numbers, and a segment takes",
    ),
    "negative shape": (
        "vllm",
        vllm(
            lambda c: c.update(routed_experts=npy_of("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 3, 2), }"))
        ),
        "line 2, choice 0: ",
    ),
    "code in a header": (
        "vllm",
        vllm(lambda c: c.update(routed_experts=npy_of("__import__('os').abort()"))),
        "line 2, choice 0: is not a .npy array",
    ),
    "fewer rows": (
        "vllm",
        vllm(lambda c: c.update(routed_experts=npy(np.ones((1, 3, 2), np.uint8)))),
        "line 2, choice 0: has routing for 1 tokens, but 10 tokens. Rows are missing",
    ),
    "an answer with more rows": (
        "sglang",
        sglang(lambda a: a["meta_info"].update(prompt_tokens=0)),
        "Tokens are missing",
    ),
    "no token ids": ("vllm", vllm(lambda c: c.update(token_ids=[])), "Tokens are missing"),
    "zip bomb": ("vllm", bomb, "t.npz, 0/routed_experts: has 6,000,000,000 numbers, and a segment takes"),
    "damaged deflate": ("vllm", damaged_npz, "outputs.npz: cannot be read as .npz"),
    "packed by gzip": ("vllm", packed(gzip.compress), "t.json: is compressed (gzip). Decompress it first"),
    "packed by zstd": ("plain", packed(lambda data: pa.compress(data, "zstd", asbytes=True)), "is compressed (zstd)"),
    "packed by bzip2": ("sglang", packed(bz2.compress), "is compressed (bz2)"),
    "packed by xz": ("flame-moe", packed(lzma.compress), "is compressed (xz)"),
    "no zip": ("vllm", raw(b"PK, but no more", "t.npz"), "t.npz: cannot be read as .npz"),
    "cut zip": ("vllm", cut(WRITERS["vllm, npz"][1], traced()), "outputs.npz: cannot be read as .npz"),
    "nothing captured": (
        "vllm",
        lambda folder: lines(
            folder / "t.jsonl", [{"choices": [{"routed_experts": npy(np.zeros((4, HIDDEN, TOP_K), np.uint8))}]}]
        ),
        "t.jsonl: no row was captured",
    ),
    # ---- SGLang
    "bytes of another model": (
        "sglang",
        lambda folder: lines(
            folder / "t.jsonl",
            [
                {
                    "meta_info": {
                        "routed_experts": base64.b64encode(bytes(44)).decode(),
                        "prompt_tokens": 2,
                        "completion_tokens": 1,
                    }
                }
            ],
        ),
        "its routing has 44 bytes, not a multiple of 3 layers times 2 experts",
    ),
    "no counts of tokens": (
        "sglang",
        lambda folder: lines(
            folder / "t.jsonl", [{"meta_info": {**sglang_answer(traced()[0])["meta_info"], "prompt_tokens": None}}]
        ),
        "has None prompt_tokens and",
    ),
    "no answer": ("sglang", raw(b'{"detail": "not found"}'), "has neither meta_info nor sgl_ext"),
    # ---- torch
    "pickle with code": ("slime", saved({"samples": [Code()]}), "t.pt: cannot be read with weights alone"),
    "bare pickle": ("slime", raw(pickle.dumps({"samples": []}), "t.pt"), "t.pt: is not a complete file of torch.save"),
    "cut torch file": (
        "slime",
        cut(WRITERS["slime"][1], traced()),
        "rollout_3.pt: is not a complete file of torch.save",
    ),
    "compressed records": ("slime", compressed_torch, "t.pt: holds compressed records"),
    **{f"another zip as {name}": (name, other_zip, "is a zip file, but not one of torch.save") for name in OF_TORCH},
    "stretched tensor": ("slime", stretched, "sample 0: has 6,597,069,766,656 numbers"),
    "other keys": ("verl", saved({"input_ids": torch.zeros(1, 2)}), "t.pt: is not a dictionary with input_ids"),
    "padding between": (
        "verl",
        saved(
            {
                "input_ids": torch.ones(1, 4, dtype=torch.int64),
                "attention_mask": torch.tensor([[1, 0, 1, 1]]),
                "routed_experts": torch.ones(1, 4, 3, 2, dtype=torch.int16),
            }
        ),
        "sequence 0 has padding between its tokens",
    ),
    "fewer rows of a sample": (
        "slime",
        saved({"samples": [{"tokens": [1, 2, 3], "rollout_routed_experts": np.ones((1, 3, 2), np.int32)}]}),
        "sample 0 has routing for 1 tokens, but 3 tokens",
    ),
    "no map": (
        "sglang-recorder",
        recorder(lambda d: d.pop("last_physical_to_logical_map")),
        "and its ids are physical",
    ),
    "physical expert beyond the map": (
        "sglang-recorder",
        recorder(lambda d: d.update(last_physical_to_logical_map=torch.zeros(HIDDEN, 4, dtype=torch.int64))),
        "record 0: has the physical expert 7, and its map has 4",
    ),
    "map onto one expert": (
        "sglang-recorder",
        recorder(lambda d: d.update(last_physical_to_logical_map=torch.ones(HIDDEN, 8, dtype=torch.int64))),
        "names an expert twice",
    ),
    "lengths that do not add up": (
        "sglang-recorder",
        recorder(lambda d: d["records"][0].update(extend_seq_lens=[1])),
        "its extend_seq_lens are [1], for",
    ),
    # ---- others
    "a layer is missing": ("megatron", megatron({}), "step 0, pass 0: has the layers 1, but tiny-v3 has experts in"),
    "layers of other lengths": (
        "megatron",
        megatron({}, {"layer": 2, "num_tokens": 2, "top_indices": [[1, 2]] * 2}),
        "step 0, pass 0: its layers have routing of shapes",
    ),
    "wrong number of tokens": ("megatron", megatron({"num_tokens": 3}), "its top_indices have shape (1, 2)"),
    "no trace": ("megatron", raw(b'{"loss": 1}\n'), "its step is None"),
    "envelope of other size": (
        "nemo-rl",
        raw(b'{"routed_experts": "nrlre1:int16:9x2x2:AAAA", "prompt_token_ids": [1], "generation_token_ids": [1]}'),
        "has 3 bytes for int16 numbers of shape (9, 2, 2)",
    ),
    "debug trace of digests": (
        "nemo-rl",
        raw(
            b'{"event": "rollout_payload_sample", "routed_experts": {"full_shape": [1, 9, 2, 2], '
            b'"valid_shape": [9, 2, 2], "valid_sha256": "00", "valid_preview": [1, 2]}, "valid_length": 9}\n'
        ),
        "t.jsonl, call 0: its routed_experts are an object, not a routing: NRL_R3_TRACE writes digests alone",
    ),
    "no envelope": (
        "nemo-rl",
        raw(b'{"routed_experts": "hello", "prompt_token_ids": [1], "generation_token_ids": [1]}'),
        "are not an envelope",
    ),
    "fewer rows than tokens": (
        "flame-moe",
        flame(shortened),
        "layer_03.parquet: tokens from 0: has 20 rows for 30 tokens",
    ),
    "a layer's file is missing": ("flame-moe", flame(lambda paths: paths[:-1]), "has the layers 2, but tiny-v3 has"),
    "no layer's file": ("flame-moe", flame(lambda paths: paths[:2]), "nothing in the trace has the name of a layer"),
    "samples are missing": ("flame-moe", flame(lambda paths: paths[2:]), "give the samples, and the layers"),
    "more rows than samples": ("flame-moe", flame(lambda paths: paths[1:]), "has 30 rows"),
    "NaN scores": ("flame-moe", flame(with_nan), "token 0, layer 2: has a weight"),
    "no Parquet": ("plain", raw(b"PAR1 and no more", "t.parquet"), "t.parquet: cannot be read as Parquet"),
    # ---- counts
    **{
        f"statistics as {dtype}": ("tensorrt-llm", statistics(dtype), f"is {name}, or has less than 0")
        for dtype, name in (
            (torch.bfloat16, "BF16"),
            (torch.float8_e4m3fn, "F8_E4M3"),
            (torch.float32, "F32"),
            (torch.bool, "BOOL"),
        )
    },
    "Parquet with experts twice": ("plain", parquet_twice("expert_ids"), "has the column expert_ids twice"),
    "Parquet with a text twice": ("plain", parquet_twice("text"), "has the column text twice"),
    "Parquet with experts as a struct": ("plain", parquet_struct, "struct<layer: int64>, where numbers must be"),
    "output twice": ("vllm", npz_twice, "has the array 0/routed_experts twice"),
    "layer with scores twice": ("flame-moe", flame(flame_twice), "has the column scores twice"),
    "counts of another model": ("tensorrt-llm", other_meta, "is of a model with 64 experts, 6 per token"),
    "cut safetensors": (
        "tensorrt-llm",
        cut(write_tensorrt_llm, COUNTS),
        "rank1.safetensors: cannot be read as safetensors",
    ),
    "other dump": ("sglang-stat", saved({"records": []}), "has no logical_count"),
    "counts of other layers": (
        "sglang-stat",
        saved({"logical_count": torch.ones(2, 5, EXPERTS, dtype=torch.int32)}),
        "has 5 layers, but tiny-v3 has 3 layers",
    ),
    "counts at a dense layer": (
        "sglang-stat",
        saved({"logical_count": torch.ones(2, HIDDEN, EXPERTS, dtype=torch.int32)}),
        "has counts at layer 0, where tiny-v3 has no experts",
    ),
    "counts below zero": (
        "sglang-stat",
        saved({"logical_count": -torch.ones(2, HIDDEN, EXPERTS, dtype=torch.int32)}),
        "its counts are not whole numbers from 0",
    ),
    "no counts": (
        "sglang-stat",
        saved({"logical_count": torch.zeros(2, HIDDEN, EXPERTS, dtype=torch.int32)}),
        "every count is 0",
    ),
    "cut stat": ("sglang-stat", cut(write_sglang_stat, COUNTS), "is not a complete file of torch.save"),
    "no GGUF": ("llama-imatrix", raw(b"\x05\0\0\0blk.0", "imatrix.dat"), "imatrix.dat: is not a GGUF file"),
    "cut GGUF": ("llama-imatrix", cut(write_llama_imatrix, COUNTS, keep=0.9), "imatrix.gguf: ends within"),
    "cut header": ("llama-imatrix", cut(write_llama_imatrix, COUNTS, keep=0.2), "imatrix.gguf: ends within its header"),
    "GGUF of a model": ("llama-imatrix", raw(gguf({"general.type": "model"}, {}), "t.gguf"), "not of an imatrix"),
    "endless GGUF": (
        "llama-imatrix",
        raw(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1), "t.gguf"),
        "says that it holds 1,152,921,504,606,846,976 entries",
    ),
    "endless text": (
        "llama-imatrix",
        raw(b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1 << 60), "t.gguf"),
        "says that it holds a text of",
    ),
    "other experts": (
        "llama-imatrix",
        raw(gguf(IMATRIX, dict.fromkeys(NAMES, np.ones(16))), "t.gguf"),
        "not float32 counts of 8 experts",
    ),
    "NaN counts": (
        "llama-imatrix",
        raw(gguf(IMATRIX, dict.fromkeys(NAMES, np.full(8, np.nan))), "t.gguf"),
        "holds other numbers than counts",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return config(tmp_path_factory.mktemp("models") / "tiny-v3")


@pytest.mark.parametrize("case", CASES)
def test_bad_trace_is_one_line_and_leaves_nothing(case: str, model: Path, tmp_path: Path) -> None:
    form, make, said = CASES[case]
    files = [str(path) for path in make(tmp_path)]
    words = ["import", form, *files, "--model", str(model), "--warehouse", str(tmp_path / "wh")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1, result.output
    assert len(result.output.splitlines()) == 1
    assert said in result.output
    assert str(tmp_path) in result.output, "it names the file"
    assert not (tmp_path / "wh").exists()
    assert not Path("/tmp/moewh-was-here").exists()


def test_bad_trace_leaves_a_warehouse_as_it_was(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "wh"
    words = ["--model", str(model), "--warehouse", str(root)]
    good = WRITERS["vllm"][1](tmp_path, traced())
    assert CliRunner().invoke(main, ["import", "vllm", *map(str, good), *words]).exit_code == 0
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    bad = CASES["cut base64"][1](tmp_path)
    assert CliRunner().invoke(main, ["import", "vllm", *map(str, bad), *words]).exit_code == 1
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["import", "vlm", "FILE"], "'vlm' is not a trace format. Known: flame-moe, "),
        (["import", "vllm", "nowhere.json"], "there is no file nowhere.json"),
        (["import", "vllm"], "FILE"),
        (["import", "vllm", "FILE", "--segment-rows", "0"], "--segment-rows"),
        (["import", "vllm", "FILE", "--run-id", "a/b"], "run id 'a/b' is not allowed"),
    ],
)
def test_wrong_use_is_reported(words: list[str], said: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    words = [str(tmp_path / "t.json") if word == "FILE" else word for word in words]
    result = CliRunner().invoke(main, [*words, "--model", str(model), "--warehouse", str(tmp_path / "wh")])
    assert result.exit_code == 2, result.output
    assert said in result.output


def test_sequence_longer_than_a_segment(model: Path, tmp_path: Path) -> None:
    files = plain()(tmp_path)
    words = ["import", "plain", str(files[0]), "--model", str(model), "--warehouse", str(tmp_path / "wh")]
    result = CliRunner().invoke(main, [*words, "--segment-rows", "8"])
    assert result.exit_code == 1
    assert "line 1: has 3 tokens, and a segment takes 2 of this model. Raise --segment-rows." in result.output
    result = CliRunner().invoke(main, [*words, "--segment-rows", "4"])
    assert "line 1, expert_ids: has 8 numbers, and a segment takes 6. Raise --segment-rows." in result.output


def test_dense_layers_take_no_room_in_a_segment(model: Path, tmp_path: Path) -> None:
    """A sequence that fills a segment exactly fits it, also when its trace has the dense layers too."""
    trace = traced(sequences=2)
    rows = max(len(one.ids_T) for one in trace) * len(MOE) * TOP_K
    files = WRITERS["vllm"][1](tmp_path, trace)
    words = ["import", "vllm", *map(str, files), "--model", str(model), "--warehouse", str(tmp_path / "wh")]
    result = CliRunner().invoke(main, [*words, "--segment-rows", str(rows)])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(main, [*words, "--segment-rows", str(rows - 1)]).exit_code == 1


def test_dense_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    files = plain()(tmp_path)
    words = ["import", "plain", str(files[0]), "--model", str(tmp_path), "--warehouse", str(tmp_path / "wh")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "has no routed experts" in result.output
