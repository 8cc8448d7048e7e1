"""verl: a batch of rollouts, saved as `torch.save` of a dictionary of tensors.

`input_ids` and `attention_mask` [B, S], `routed_experts` [B, S, L, K] (all hidden layers, or the MoE layers), and
`prompts` [B, P], where the first P positions are the prompt's. The mask excludes padding on either side; the last token
of a sequence has no row: zeros there are those of an empty buffer. No weights; the order within a row means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moewh.ingest.traces.arrays import as_array, load_torch
from moewh.ingest.traces.trace import Sequence, TraceFile, TraceModel, each


def _read(file: TraceFile, _: TraceModel) -> Iterator[Sequence]:
    batch = load_torch(file)
    names = ("input_ids", "attention_mask", "routed_experts")
    if not isinstance(batch, dict) or any(name not in batch for name in names):
        raise file.error(f"is not a dictionary with {', '.join(names)}.")
    # a batch may hold more than a segment; the limit applies to each of its sequences
    ids_BS, mask_BS, routed_BSLK = (
        as_array(batch[name], f"{file.name}, {name}", 1 << 40, dimensions)
        for name, dimensions in zip(names, (2, 2, 4), strict=True)
    )
    if mask_BS.shape != ids_BS.shape or routed_BSLK.shape[:2] != ids_BS.shape:
        shapes = ", ".join(
            f"{name} {array.shape}" for name, array in zip(names, (ids_BS, mask_BS, routed_BSLK), strict=True)
        )
        raise file.error(f"its arrays are not of one batch: {shapes}.")
    if ((mask_BS != 0) & (mask_BS != 1)).any():
        raise file.error(
            "its attention_mask holds values other than 0 and 1. Sequences that share a row must be split."
        )
    prompt_width = None
    if "prompts" in batch:
        prompts_BP = as_array(batch["prompts"], f"{file.name}, prompts", 1 << 40, 2)
        prompt_width = prompts_BP.shape[1]
        if not np.array_equal(prompts_BP, ids_BS[:, :prompt_width]):
            raise file.error("its prompts are not the beginning of its input_ids: they are of another batch.")
    for number, mask_S in enumerate(mask_BS):
        where = f"{file.name}, sequence {number}"
        real = np.flatnonzero(mask_S)
        if not len(real):
            continue
        if len(real) != real[-1] - real[0] + 1:
            raise file.error(f"sequence {number} has padding between its tokens.")
        routed = real if routed_BSLK[number, real[-1]].any() else real[:-1]
        if not len(routed):
            raise file.error(f"sequence {number} has one token, and the last has no routing.")
        yield Sequence(
            where,
            routed_BSLK[number, routed],
            vocab_ids_T=ids_BS[number, real],
            generated_from=None if prompt_width is None else max(0, prompt_width - int(real[0])),
            source=file.path.name,
            metadata={"sequence": number},
        )


FORMAT = each(_read)
