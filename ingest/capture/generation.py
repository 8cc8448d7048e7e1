"""Generation: the routing of prompts and of the tokens that the model generates after them.

The hooks fire once for the prompt and once per step. Prompts of equal length share a batch, so that nothing is padded
and every position is exact. The last token of a sequence is never fed to the model, so it has no rows; neither does
anything after a sequence's end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from moewh.ingest.capture.hooks import Capture, PendingRouting, failures_named
from moewh.ingest.capture.vectors import WantedVectors, attach_vectors
from moewh.ingest.families.rule import Call, MoELayer
from moewh.ingest.model.loading import LoadedModel
from moewh.ingest.options import Sampling
from moewh.ingest.routing import RoutingBuffer, TokenisedSegment, VectorKey
from moewh.warehouse.files.schema import Table

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GeneratedBatch:
    """One batch after generation: B contexts of S tokens, and the tokens that followed each."""

    contexts: Ints
    prompt_length: int
    generated: list[list[int]]
    """Per context, the new tokens, including the end token but not the padding after it.

    In an encoder-decoder they begin with the decoder's start token.
    """
    starts: int
    """How many of them the model did not generate: 1 for an encoder-decoder, else 0."""
    passes: list[PendingRouting]
    """The routing of the prompt [B*S rows], then of each token in `generated` that was fed to the model [B rows]."""


def plan_equal_batches(length_C: Ints, batch_tokens: int, generate: int) -> list[Ints]:
    """Group contexts of equal length, longest first, so that B * (S + generate) ≤ batch_tokens."""
    batches = []
    for length in np.unique(length_C)[::-1]:
        same = np.flatnonzero(length_C == length)
        size = max(1, batch_tokens // (int(length) + generate))
        batches += [same[start : start + size] for start in range(0, len(same), size)]
    return batches


@torch.inference_mode()
def generate_batch(
    loaded: LoadedModel,
    segment: TokenisedSegment,
    contexts: Ints,
    sampling: Sampling,
    wanted: WantedVectors,
) -> GeneratedBatch:
    """Generate after contexts of equal length, and capture the routing of every forward pass."""
    S = int(segment.length_C[contexts[0]])
    ids_BS = segment.vocab_id_T[segment.start_C[contexts][:, None] + np.arange(S)].astype(np.int64)
    prompt_ids = segment.prompt_T[segment.start_C[contexts]]
    input_ids = torch.from_numpy(ids_BS).to(loaded.model.device)
    assert loaded.generation_tokens is not None
    tokens = loaded.generation_tokens.used
    # `generate` takes unset values from the model's own settings, which `load_model` has left empty.
    config = GenerationConfig(
        max_new_tokens=sampling.tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(tokens.end_ids) or None,
        pad_token_id=loaded.pad_id,
        decoder_start_token_id=tokens.start_id,
    )
    choose = [_SeededSampling(sampling, prompt_ids)] if sampling.temperature else []
    with _capture_passes(loaded, wanted) as passes, failures_named(loaded.model):
        sequences = loaded.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            logits_processor=LogitsProcessorList(choose),
        )
    starts = int(loaded.config.is_encoder_decoder)
    new = sequences.tolist() if starts else sequences[:, S:].tolist()
    generated = [ids[:starts] + _until_end(ids[starts:], tokens.end_ids) for ids in new]
    return GeneratedBatch(contexts, S, generated, starts, [one.take() for one in passes])


def _until_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens


class _SeededSampling(LogitsProcessor):
    """Turns greedy choice into sampling from softmax(scores / temperature), with separate Gumbel noise per prompt.

    The argmax of scores / temperature + Gumbel noise is such a sample (Gumbel 1954; Maddison et al. 2014). The noise
    comes from a generator seeded with (seed, prompt_id), so a prompt's sample does not depend on its batch.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Ints) -> None:
        self._temperature = sampling.temperature
        self._generators = [np.random.default_rng([sampling.seed, int(prompt)]) for prompt in prompt_ids]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the perturbed scores [B, V]."""
        del input_ids
        noise = np.stack([generator.gumbel(size=scores.shape[1]) for generator in self._generators])
        return scores.float() / self._temperature + torch.from_numpy(noise).float().to(scores.device)


@contextmanager
def _capture_passes(loaded: LoadedModel, wanted: WantedVectors) -> Iterator[list[Capture]]:
    """Capture every forward pass of the text stack within the block, in a list with one capture per pass."""
    passes: list[Capture] = []
    model, moe_layers = loaded.model, loaded.found.moe_layers

    def begin(seeing: list[MoELayer]) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = kwargs.get("input_ids", args[0] if args else None)
            if given is None:
                given = kwargs["inputs_embeds"][..., 0]
            whole_BS = np.ones(tuple(given.shape), np.int64)
            passes.append(Capture(seeing, whole_BS, expert_outputs=wanted.expert_outputs))

        return hook

    def record(moe: MoELayer, call: Call) -> None:
        passes[-1].record(moe, call)

    def keep(table: Table, moe: MoELayer, vectors: Any) -> None:
        passes[-1].keep(table, moe, vectors)

    stacks = [(model.base_model, moe_layers)]
    if model.config.is_encoder_decoder:
        parts = (("encoder", model.get_encoder()), ("decoder", model.get_decoder()))
        stacks = [(module, [moe for moe in moe_layers if moe.stack == name]) for name, module in parts]
    handles = [module.register_forward_pre_hook(begin(seeing), with_kwargs=True) for module, seeing in stacks]
    for moe in moe_layers:
        handles += moe.family.attach(moe, record) + attach_vectors(moe, wanted, keep)
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def with_generated(
    segment: TokenisedSegment, batches: Sequence[GeneratedBatch], routing: RoutingBuffer
) -> TokenisedSegment:
    """Append the generated tokens to each prompt's, and put all routing into the buffer of the longer segment.

    `routing` must be made for `generated_size(segment, batches)` tokens.
    """
    generated_C: list[list[int]] = [[] for _ in segment.start_C]
    for batch in batches:
        for context, tokens in zip(batch.contexts, batch.generated, strict=True):
            generated_C[int(context)] = tokens
    longer = _longer(segment, generated_C, max((batch.starts for batch in batches), default=0))
    for batch in batches:
        _add_passes(longer, batch, routing)
    return longer


def generated_size(segment: TokenisedSegment, batches: Sequence[GeneratedBatch]) -> int:
    """Return the number of tokens in the segment, generated ones included."""
    return len(segment.vocab_id_T) + sum(len(tokens) for batch in batches for tokens in batch.generated)


def _longer(segment: TokenisedSegment, generated_C: list[list[int]], starts: int) -> TokenisedSegment:
    """Return the segment with `generated_C` appended to each context; every prompt has at most one context.

    The first `starts` tokens of each are special: the model did not generate them.
    """
    more_C = np.array([len(tokens) for tokens in generated_C], np.int64)
    length_C = segment.length_C + more_C
    start_C = np.cumsum(length_C) - length_C
    total = int(length_C.sum())
    generated_T = np.zeros(total, np.bool_)
    vocab_id_T, special_T = np.zeros(total, np.int32), np.zeros(total, np.bool_)
    for start, length, old, tokens in zip(start_C, segment.length_C, segment.start_C, generated_C, strict=True):
        vocab_id_T[start : start + length] = segment.vocab_id_T[old : old + length]
        special_T[start : start + length] = segment.special_T[old : old + length]
        vocab_id_T[start + length : start + length + len(tokens)] = tokens
        first_generated = start + length + starts
        special_T[start + length : first_generated] = True
        generated_T[first_generated : start + length + len(tokens)] = True
    prompt_C = segment.prompt_T[segment.start_C]
    num_tokens_P = segment.num_tokens_P.copy()
    num_tokens_P[prompt_C - segment.first_prompt] += more_C
    return replace(
        segment,
        num_tokens_P=num_tokens_P,
        prompt_T=np.repeat(prompt_C, length_C),
        position_T=(np.arange(total) - np.repeat(start_C, length_C)).astype(np.int32),
        context_T=np.zeros(total, np.int32),
        vocab_id_T=vocab_id_T,
        special_T=special_T,
        generated_T=generated_T,
        start_C=start_C,
        length_C=length_C,
    )


def _add_passes(longer: TokenisedSegment, batch: GeneratedBatch, routing: RoutingBuffer) -> None:
    """Add the rows of the prompt, then those of each step, for the sequences that continued after it."""
    start_B = longer.start_C[batch.contexts]
    new_B = np.array([len(tokens) for tokens in batch.generated])
    prompt, *steps = batch.passes
    rows = (start_B[:, None] + np.arange(batch.prompt_length)).reshape(-1)
    _add(routing, rows, prompt, np.arange(len(rows)))
    for step, pending in enumerate(steps):
        # This pass was fed generated token number `step`, which is not the last if another followed it.
        unfinished = np.flatnonzero(step + 1 < new_B)
        if len(unfinished):
            _add(routing, start_B[unfinished] + batch.prompt_length + step, pending, unfinished)


def _add(routing: RoutingBuffer, rows_T: Ints, pending: PendingRouting, chosen: Ints) -> None:
    routing.add(rows_T, {layer: part.take(chosen) for layer, part in pending.wait().items()})
    if routing.vectors is not None:
        vectors: dict[VectorKey, Any] = {key: part[chosen] for key, part in pending.wait_for_vectors().items()}
        routing.vectors.add(rows_T, vectors)
