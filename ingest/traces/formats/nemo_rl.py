"""NeMo-RL and NeMo Gym: JSON lines whose objects hold `routed_experts` beside their token ids, at any depth.

The routing is an envelope `nrlre1:<dtype>:<S>x<L>x<K>:<base64>` or nested lists, -1 where a route is missing; the
tokens are `prompt_token_ids` and `generation_token_ids`. Each such object (one call of the model) is a sequence. No
weights; the order within a row means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from moewh.ingest.traces.arrays import as_array, decode_base64, raw_array
from moewh.ingest.traces.check import as_ids
from moewh.ingest.traces.documents import read_documents
from moewh.ingest.traces.trace import Array, Sequence, TraceFile, TraceModel, each, start_of

_ENVELOPE = re.compile(r"nrlre1:(u?int(?:8|16|32)):(\d{1,9})x(\d{1,5})x(\d{1,4}):(.*)", re.DOTALL)


def _read(file: TraceFile, _: TraceModel) -> Iterator[Sequence]:
    found = False
    for where, document in read_documents(file):
        for call, holder in enumerate(_holders(document)):
            found = True
            yield _sequence(f"{where}, call {call}", holder, file)
    if not found:
        raise file.error("has no routed_experts.")


def _holders(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects that hold routing, in order, whatever they lie in, however deep."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict) and found.get("routed_experts") is not None:
            yield found
        elif isinstance(found, dict | list):
            waiting += reversed(list(found.values()) if isinstance(found, dict) else found)


def _sequence(where: str, holder: dict[str, Any], file: TraceFile) -> Sequence:
    rows_RLK = _routing(holder["routed_experts"], where, file)
    prompt, generated = (as_ids(holder.get(name), where) for name in ("prompt_token_ids", "generation_token_ids"))
    tokens = len(prompt) + len(generated)
    if len(rows_RLK) != tokens:
        start_of(len(rows_RLK), tokens, where, 0)
    return Sequence(
        where,
        rows_RLK,
        vocab_ids_T=np.concatenate([prompt, generated]),
        generated_from=len(prompt),
        source=file.path.name,
    )


def _routing(value: Any, where: str, file: TraceFile) -> Array:
    if isinstance(value, dict):  # r3_trace.py and routed_experts_ref.v1 of NVIDIA-NeMo/RL
        raise file.error(
            f"{where}: its routed_experts are an object, not a routing: NRL_R3_TRACE writes digests alone, and the "
            "transport `ray` references. Save rollouts of the transport `inline`."
        )
    if not isinstance(value, str):
        return as_array(value, where, file.most_values, 3)
    envelope = _ENVELOPE.fullmatch(value)
    if envelope is None:
        raise file.error(f"{where}: its routed_experts are not an envelope nrlre1:<dtype>:<S>x<L>x<K>:<base64>.")
    shape = (int(envelope[2]), int(envelope[3]), int(envelope[4]))
    return raw_array(decode_base64(envelope[5], where), envelope[1], shape, where)


FORMAT = each(_read)
