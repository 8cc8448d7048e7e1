"""SGLang: responses of `/generate` or of its OpenAI endpoints with `return_routed_experts`.

The routing is base64 of little-endian int32 without a header: rows for the positions from `routed_experts_start_len`
to the last but one, over all hidden layers. `/generate` has it in `meta_info`, the OpenAI responses in `sgl_ext`, for
the first choice only. Token ids of the prompt are in the response only with `input_token_logprobs`; else they are
unknown. Ids are logical, there are no weights, and the order within a row means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from moewh.ingest.routing import NO_ENTRY
from moewh.ingest.traces.arrays import decode_base64, raw_array
from moewh.ingest.traces.check import as_ids
from moewh.ingest.traces.documents import answer_of, read_documents
from moewh.ingest.traces.trace import Array, Sequence, TraceFile, TraceModel, answer_id, each, served_by, start_of
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.schema import POSITION_BITS


def _read(file: TraceFile, model: TraceModel) -> Iterator[Sequence]:
    for where, document in read_documents(file):
        answer = answer_of(document, where, file)
        if "meta_info" in answer:
            yield _generated(where, answer, file, model)
        else:
            yield replace(_chat(where, answer, file, model), served=served_by(answer), answer=answer_id(answer))


def _generated(where: str, answer: dict[str, Any], file: TraceFile, model: TraceModel) -> Sequence:
    meta = answer["meta_info"]
    if not isinstance(meta, dict):
        raise file.error(f"{where}: its meta_info is not a JSON object.")
    rows_RLK = _routing(meta.get("routed_experts"), where, file, model)
    lengths = _lengths(meta, where)
    one = _sequence(where, rows_RLK, lengths, file.path.name, _vocab_ids(answer, meta, lengths, where))
    return replace(one, answer=answer_id(meta))


def _chat(where: str, answer: dict[str, Any], file: TraceFile, model: TraceModel) -> Sequence:
    extension, usage, choices = answer.get("sgl_ext"), answer.get("usage"), answer.get("choices")
    if not isinstance(extension, dict) or not isinstance(usage, dict) or not isinstance(choices, list):
        raise file.error(f"{where}: has neither meta_info nor sgl_ext, usage and choices: it is not SGLang's answer.")
    rows_RLK = _routing(extension.get("routed_experts"), where, file, model)
    if len(choices) > 1:  # usage counts all of them together
        metadata = {"choices": len(choices)}
        return Sequence(where, rows_RLK, source=file.path.name, metadata=metadata)
    return _sequence(where, rows_RLK, _lengths(usage, where), file.path.name, None)


def _routing(value: Any, where: str, file: TraceFile, model: TraceModel) -> Array:
    if value is None:
        raise file.error(
            f"{where} has no routed_experts. Start SGLang with "
            "--enable-return-routed-experts, and ask for return_routed_experts."
        )
    data = decode_base64(value, where)
    width = model.num_hidden_layers * model.top_k
    rows, rest = divmod(len(data), 4 * width)
    if rest:
        raise file.error(
            f"{where}: its routing has {len(data):,} bytes, not a multiple of {model.num_hidden_layers} layers times "
            f"{model.top_k} experts of {model.name}. Check --model; else the file is cut."
        )
    return raw_array(data, "int32", (rows, model.num_hidden_layers, model.top_k), where)


def _lengths(holder: dict[str, Any], where: str) -> tuple[int, int]:
    """Return how many tokens the prompt and the answer have."""
    counts = [holder.get(name) for name in ("prompt_tokens", "completion_tokens")]
    most = 1 << POSITION_BITS  # before anything of this size is made
    known = [number for number in counts if type(number) is int and 0 <= number <= most]
    if len(known) < len(counts):
        raise MoewhError(f"{where}: has {counts[0]!r} prompt_tokens and {counts[1]!r} completion_tokens.")
    return known[0], known[1]


def _vocab_ids(answer: dict[str, Any], meta: dict[str, Any], lengths: tuple[int, int], where: str) -> Array | None:
    """Return the token ids of prompt and response, as far as they are given."""
    prompt, generated = lengths
    output = answer.get("output_ids")
    if output is None:
        return None
    output_ids = as_ids(output, where)
    if len(output_ids) != generated:
        raise MoewhError(f"{where}: has {len(output_ids)} output_ids for {generated} completion_tokens.")
    given = meta.get("input_token_logprobs")
    ids_T = np.full(prompt + generated, NO_ENTRY, np.int64)
    ids_T[prompt:] = output_ids
    if isinstance(given, list) and len(given) == prompt:
        prompt_ids = [item[1] if isinstance(item, list) and len(item) > 1 else None for item in given]
        ids_T[:prompt] = as_ids(prompt_ids, where)
    return ids_T


def _sequence(
    where: str, rows_RLK: Array, lengths: tuple[int, int], source: str, vocab_ids_T: Array | None
) -> Sequence:
    prompt, generated = lengths
    return Sequence(
        where,
        rows_RLK,
        first=start_of(len(rows_RLK), prompt + generated, where, prompt),
        tokens=prompt + generated,
        vocab_ids_T=vocab_ids_T,
        generated_from=prompt,
        source=source,
    )


FORMAT = each(_read)
