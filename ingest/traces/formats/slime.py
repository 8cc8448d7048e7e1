"""slime: rollouts saved with `--save-debug-rollout-data`, as `torch.save` of {rollout_id, samples}.

A sample has `tokens`, `response_length` and `rollout_routed_experts` [tokens - 1, L, K] over all hidden layers. No
weights; the order within a row means nothing.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator

from moewh.ingest.traces.arrays import as_array, load_torch
from moewh.ingest.traces.check import as_ids
from moewh.ingest.traces.trace import Sequence, TraceFile, TraceModel, each


def _read(file: TraceFile, _: TraceModel) -> Iterator[Sequence]:
    saved = load_torch(file)
    if not isinstance(saved, dict) or not isinstance(saved.get("samples"), list):
        raise file.error("has no samples: it was not saved with --save-debug-rollout-data.")
    for number, sample in enumerate(saved["samples"]):
        where = f"{file.name}, sample {number}"
        if not isinstance(sample, dict) or sample.get("rollout_routed_experts") is None:
            raise file.error(f"sample {number} has no rollout_routed_experts. Roll out with routing replay.")
        ids_T = as_ids(sample.get("tokens"), where)
        rows_RLK = as_array(sample["rollout_routed_experts"], where, file.most_values, 3)
        if len(rows_RLK) != len(ids_T) - 1:
            raise file.error(
                f"sample {number} has routing for {len(rows_RLK)} tokens, but {len(ids_T)} tokens. All but the last "
                "need routing."
            )
        response = sample.get("response_length")
        if response is not None and not isinstance(response, numbers.Integral):
            raise file.error(f"sample {number} has a response_length of {response!r}, which is not a whole number.")
        metadata = {"rollout_id": saved.get("rollout_id"), "index": sample.get("index")}
        yield Sequence(
            where,
            rows_RLK,
            vocab_ids_T=ids_T,
            generated_from=None if response is None else len(ids_T) - int(response),
            source=file.path.name,
            metadata={key: value for key, value in metadata.items() if type(value) in (int, str)},
        )


FORMAT = each(_read)
