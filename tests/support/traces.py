"""Traces of other programs, written from their documented formats, and the rows that importing them must give.

A trace is described as sequences of choices at the MoE layers; each `write_<format>` puts the same sequences into files
as that program does. No package of those programs is needed: torch, numpy and pyarrow write what they write.
"""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file

from moewh.warehouse.files.layout import Layout
from tests.support.opened import viewed

Ints = npt.NDArray[np.int64]
HIDDEN, MOE, EXPERTS, TOP_K, VOCABULARY = 3, (1, 2), 8, 2, 200
Row = tuple[int, int, int, int | None, int, float | None]
"""(prompt, position, layer, rank, expert, weight)"""


@dataclass(frozen=True)
class Traced:
    """One sequence: its tokens, where the answer begins, and its choices [T - 1, MoE layers, K]; the last has none."""

    ids_T: Ints
    prompt: int
    experts_RLK: Ints

    @property
    def hidden_RLK(self) -> Ints:
        """Over all hidden layers: zeros at the dense one."""
        whole = np.zeros((len(self.experts_RLK), HIDDEN, TOP_K), np.int64)
        whole[:, list(MOE)] = self.experts_RLK
        return whole


def config(folder: Path, **changes: Any) -> Path:
    """A DeepSeek-V3 whose first layer is dense, as a configuration alone."""
    fields = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": HIDDEN,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def traced(seed: int = 0, sequences: int = 4) -> list[Traced]:
    """Random sequences; no row is [0, 0], some hold expert 0, and no choice is of the last expert."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(sequences):
        tokens, prompt = int(rng.integers(4, 12)), int(rng.integers(1, 4))
        keys = rng.random((tokens - 1, len(MOE), EXPERTS - 1))
        made.append(Traced(rng.integers(1, VOCABULARY, tokens), prompt, np.argsort(keys, -1)[..., :TOP_K]))
    return made


def expected(trace: list[Traced]) -> list[Row]:
    """The rows of a trace without ranks and weights."""
    return sorted(
        (prompt, position, layer, None, int(expert), None)
        for prompt, one in enumerate(trace)
        for position, at_LK in enumerate(one.experts_RLK)
        for layer, chosen_K in zip(MOE, at_LK, strict=True)
        for expert in chosen_K
    )


def rows_of(layout: Layout) -> list[Row]:
    """What the warehouse holds, as `expected` has it."""
    sql = "select token_id >> 24, token_id % (1 << 24), layer, rank, expert, weight from routing order by all"
    with viewed(layout) as connection:
        return sorted(connection.execute(sql).fetchall(), key=lambda row: (*row[:3], row[4]))


# ------------------------------------------------------------------------------------------ writers


def npy(array: npt.NDArray[Any]) -> str:
    """An array as vLLM's server sends it: a .npy file in base64."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def lines(path: Path, documents: list[Any]) -> list[Path]:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return [path]


def vllm_answer(one: Traced) -> dict[str, Any]:
    """What /v1/completions answers with `return_token_ids`."""
    choice = {
        "index": 0,
        "text": "…",
        "finish_reason": "length",
        "prompt_token_ids": one.ids_T[: one.prompt].tolist(),
        "token_ids": one.ids_T[one.prompt :].tolist(),
        "routed_experts": npy(one.hidden_RLK.astype(np.uint8)),
    }
    return {"id": "cmpl-1", "object": "text_completion", "choices": [choice]}


def write_vllm(folder: Path, trace: list[Traced]) -> list[Path]:
    return lines(folder / "vllm.jsonl", [vllm_answer(one) for one in trace])


def write_vllm_npz(folder: Path, trace: list[Traced]) -> list[Path]:
    arrays: dict[str, Any] = {}
    for number, one in enumerate(trace):
        arrays[f"{number}/routed_experts"] = one.hidden_RLK.astype(np.uint8)
        arrays[f"{number}/prompt_token_ids"] = one.ids_T[: one.prompt]
        arrays[f"{number}/token_ids"] = one.ids_T[one.prompt :]
    np.savez(folder / "outputs.npz", **arrays)
    return [folder / "outputs.npz"]


def sglang_answer(one: Traced) -> dict[str, Any]:
    """What /generate answers with `return_routed_experts` and `return_logprob` from the first token."""
    meta = {
        "prompt_tokens": one.prompt,
        "completion_tokens": len(one.ids_T) - one.prompt,
        "routed_experts": base64.b64encode(one.hidden_RLK.astype("<i4").tobytes()).decode(),
        "input_token_logprobs": [[None, int(token), None] for token in one.ids_T[: one.prompt]],
    }
    return {"text": "…", "output_ids": one.ids_T[one.prompt :].tolist(), "meta_info": meta}


def write_sglang(folder: Path, trace: list[Traced]) -> list[Path]:
    (folder / "sglang.json").write_text(json.dumps([sglang_answer(one) for one in trace], indent=1))
    return [folder / "sglang.json"]


def write_sglang_openai(folder: Path, trace: list[Traced]) -> list[Path]:
    return lines(
        folder / "chat.jsonl",
        [
            {
                "choices": [{"index": 0, "message": {"role": "assistant", "content": "…"}}],
                "usage": {"prompt_tokens": one.prompt, "completion_tokens": len(one.ids_T) - one.prompt},
                "sgl_ext": {"routed_experts": sglang_answer(one)["meta_info"]["routed_experts"]},
            }
            for one in trace
        ],
    )


def recorder_dump(trace: list[Traced]) -> dict[str, Any]:
    """A prefill pass over all sequences, under a placement that reverses the experts of each layer."""
    tokens = np.concatenate([one.ids_T[:-1] for one in trace])
    logical_TLK = np.concatenate([one.hidden_RLK for one in trace])
    physical_LTK = np.full((HIDDEN, len(tokens), 8), -1, np.int32)
    physical_LTK[:, :, :TOP_K] = (EXPERTS - 1 - logical_TLK).transpose(1, 0, 2)
    physical_LTK[0] = -1  # a dense layer records nothing
    record = {
        "forward_pass_id": 7,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": tokens.tolist(),
        "positions": [place for one in trace for place in range(len(one.ids_T) - 1)],
        "extend_seq_lens": [len(one.ids_T) - 1 for one in trace],
        "forward_mode": 1,
        "topk_ids_of_layer": torch.tensor(physical_LTK),
        "global_physical_count": torch.zeros(HIDDEN, EXPERTS, dtype=torch.int32),
        "misc_objects": [],
    }
    reverse = torch.arange(EXPERTS - 1, -1, -1).expand(HIDDEN, EXPERTS)
    return {"records": [record], "last_physical_to_logical_map": reverse.contiguous()}


def write_sglang_recorder(folder: Path, trace: list[Traced]) -> list[Path]:
    torch.save(recorder_dump(trace), folder / "expert_distribution_recorder_1_0.pt")
    return [folder / "expert_distribution_recorder_1_0.pt"]


def write_megatron(folder: Path, trace: list[Traced]) -> list[Path]:
    """A step for each sequence; ids ascending, as nonzero() gives them; layers in the order that they ran."""
    documents = []
    for step, one in enumerate(trace):
        for place, layer in enumerate(MOE):
            documents.append(
                {
                    "step": step,
                    "stage": "pre_dispatch",
                    "block": "decoder",
                    "layer": layer,
                    "rank": 0,
                    "num_tokens": len(one.experts_RLK),
                    "topk": TOP_K,
                    "top_indices": np.sort(one.experts_RLK[:, place], axis=1).tolist(),
                }
            )
        documents.append({**documents[-1], "block": "mtp", "mtp_idx": 0, "layer": 0})
    return lines(folder / "router_trace_rank0.jsonl", documents)


def write_verl(folder: Path, trace: list[Traced]) -> list[Path]:
    """One batch: prompts padded on the left, answers on the right, zeros where there is no route."""
    left = max(one.prompt for one in trace)
    width = left + max(len(one.ids_T) - one.prompt for one in trace)
    ids, mask = (np.zeros((len(trace), width), np.int64) for _ in range(2))
    routed = np.zeros((len(trace), width, HIDDEN, TOP_K), np.int16)
    for number, one in enumerate(trace):
        start = left - one.prompt
        ids[number, start : start + len(one.ids_T)] = one.ids_T
        mask[number, start : start + len(one.ids_T)] = 1
        routed[number, start : start + len(one.experts_RLK)] = one.hidden_RLK
    batch = {"input_ids": ids, "attention_mask": mask, "routed_experts": routed, "prompts": ids[:, :left].copy()}
    torch.save({name: torch.tensor(array) for name, array in batch.items()}, folder / "verl.pt")
    return [folder / "verl.pt"]


def write_slime(folder: Path, trace: list[Traced]) -> list[Path]:
    samples = [
        {
            "index": number,
            "prompt": "…",
            "tokens": one.ids_T.tolist(),
            "response_length": len(one.ids_T) - one.prompt,
            "reward": 1.0,
            "rollout_routed_experts": one.hidden_RLK.astype(np.int32),
        }
        for number, one in enumerate(trace)
    ]
    torch.save({"rollout_id": 3, "samples": samples}, folder / "rollout_3.pt")
    return [folder / "rollout_3.pt"]


def nemo_envelope(ids_SLK: npt.NDArray[Any]) -> str:
    """Routing as NeMo-RL puts it on the wire."""
    shape = "x".join(map(str, ids_SLK.shape))
    return f"nrlre1:int16:{shape}:{base64.b64encode(ids_SLK.astype('<i2').tobytes()).decode()}"


def write_nemo_rl(folder: Path, trace: list[Traced]) -> list[Path]:
    """The last token's route is -1: missing."""
    documents = []
    for one in trace:
        whole = np.concatenate([one.experts_RLK, np.full((1, len(MOE), TOP_K), -1)])
        call = {
            "prompt_token_ids": one.ids_T[: one.prompt].tolist(),
            "generation_token_ids": one.ids_T[one.prompt :].tolist(),
            "routed_experts": nemo_envelope(whole),
        }
        documents.append({"response": {"output": [{"type": "message", **call}]}})
    return lines(folder / "rollouts.jsonl", documents)


def write_plain(folder: Path, trace: list[Traced]) -> list[Path]:
    return lines(
        folder / "plain.jsonl",
        [
            {
                "expert_ids": one.experts_RLK.tolist(),
                "token_ids": one.ids_T.tolist(),
                "generated_from": one.prompt,
                "metadata": {"n": number},
            }
            for number, one in enumerate(trace)
        ],
    )


def write_plain_parquet(folder: Path, trace: list[Traced]) -> list[Path]:
    table = pa.table(
        {
            "expert_ids": pa.array(
                [one.experts_RLK.tolist() for one in trace], pa.list_(pa.list_(pa.list_(pa.int16(), TOP_K)))
            ),
            "token_ids": pa.array([one.ids_T.tolist() for one in trace], pa.list_(pa.int32())),
            "generated_from": [one.prompt for one in trace],
        }
    )
    pq.write_table(table, folder / "plain.parquet")
    return [folder / "plain.parquet"]


WRITERS: dict[str, tuple[str, Callable[[Path, list[Traced]], list[Path]]]] = {
    "vllm": ("vllm", write_vllm),
    "vllm, npz": ("vllm", write_vllm_npz),
    "sglang": ("sglang", write_sglang),
    "sglang, OpenAI": ("sglang", write_sglang_openai),
    "sglang-recorder": ("sglang-recorder", write_sglang_recorder),
    "megatron": ("megatron", write_megatron),
    "verl": ("verl", write_verl),
    "slime": ("slime", write_slime),
    "nemo-rl": ("nemo-rl", write_nemo_rl),
    "plain": ("plain", write_plain),
    "plain, Parquet": ("plain", write_plain_parquet),
}
"""Case → the format's name, and its writer. FLAME-MoE has weights, and is written by `write_flame`."""


def write_flame(
    folder: Path, ids_N: Ints, experts_NLK: Ints, scores_NLK: npt.NDArray[np.float16], *, row_group_size: int = 7
) -> list[Path]:
    """The token ids in two files of samples, and a file for each MoE layer, numbered from 1."""
    half = len(ids_N) // 3
    paths = []
    for number, part in enumerate((ids_N[:half], ids_N[half:])):
        paths.append(folder / f"{number:03}.parquet")
        pq.write_table(pa.table({"token_id": part.astype(np.int32)}), paths[-1])
    for place, layer in enumerate(MOE):
        columns = {
            "scores": pa.FixedSizeListArray.from_arrays(pa.array(scores_NLK[:, place].ravel()), TOP_K),
            "indices": pa.FixedSizeListArray.from_arrays(
                pa.array(experts_NLK[:, place].ravel().astype(np.int16)), TOP_K
            ),
        }
        paths.append(folder / f"layer_{layer + 1:02}.parquet")
        pq.write_table(pa.table(columns), paths[-1], row_group_size=row_group_size)
    return paths


# ------------------------------------------------------------------------------------------ counts


def write_sglang_stat(folder: Path, counts_LE: Ints) -> list[Path]:
    """Two steps that add up to the counts, in a buffer of four."""
    steps = np.zeros((4, HIDDEN, EXPERTS), np.int32)
    steps[0, list(MOE)] = counts_LE // 2
    steps[1, list(MOE)] = counts_LE - counts_LE // 2
    saved = {"rank": 0, "logical_count": torch.tensor(steps), "average_utilization_rate_over_window": None}
    torch.save(saved, folder / "expert_distribution_recorder_1.pt")
    return [folder / "expert_distribution_recorder_1.pt"]


def write_tensorrt_llm(folder: Path, counts_LE: Ints) -> list[Path]:
    """Two ranks, each with some iterations."""
    place = folder / "expert_statistic"
    place.mkdir()
    (place / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": TOP_K}))
    for rank, part in enumerate((counts_LE // 3, counts_LE - counts_LE // 3)):
        keys = {f"{100 + rank}_{layer}": np.ascontiguousarray(part[n]) for n, layer in enumerate(MOE)}
        save_file(keys, place / f"rank{rank}.safetensors")
    save_file({"100_1": np.zeros((3, TOP_K), np.int32)}, place / "rank0_raw.safetensors")
    return [place]


def write_llama_imatrix(folder: Path, counts_LE: Ints) -> list[Path]:
    """GGUF as its specification has it: header, pairs, tensors' names and shapes, data."""
    tensors = {f"blk.{layer}.ffn_gate_exps.weight.counts": counts_LE[n] for n, layer in enumerate(MOE)}
    tensors["blk.1.attn_q.weight.counts"] = np.array([5])
    (folder / "imatrix.gguf").write_bytes(gguf({"general.type": "imatrix", "imatrix.chunk_count": 3}, tensors))
    return [folder / "imatrix.gguf"]


def gguf(pairs: Mapping[str, str | int], tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """A GGUF file of texts, unsigned numbers and float32 tensors [1, n]."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    for name, value in pairs.items():
        head += text(name)
        head += struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value)
    data = b""
    for name, values in tensors.items():
        head += text(name) + struct.pack("<IQQIQ", 2, 1, len(values), 0, len(data))
        data += values.astype("<f4").tobytes().ljust(-(-4 * len(values) // 32) * 32, b"\0")
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + data


COUNT_WRITERS: dict[str, Callable[[Path, Ints], list[Path]]] = {
    "sglang-stat": write_sglang_stat,
    "tensorrt-llm": write_tensorrt_llm,
    "llama-imatrix": write_llama_imatrix,
}
