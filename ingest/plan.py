"""The plan of a run: options, prompts and loaded model in; everything decided before the first batch out.

That is the tokenisation rules, the segments, the identity, and which segments are still to be written. Whatever can be
refused without running the model is refused here. Nothing is written except the time that a chat template sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from moewh.ingest.capture.vectors import WantedVectors, wanted_vectors
from moewh.ingest.identity import identify, require_same, require_same_labels
from moewh.ingest.model.expected import top_k
from moewh.ingest.model.loading import LoadedModel
from moewh.ingest.options import IngestOptions, Sampling
from moewh.ingest.processes import Process
from moewh.ingest.prompts.chats import (
    CLOCK,
    GENERATION_PROMPT,
    ChatRenderer,
    ChatRules,
    chat_arguments,
    template_variables,
)
from moewh.ingest.prompts.records import MESSAGES
from moewh.ingest.prompts.stream import PromptPlan, PromptStream, SizeRule
from moewh.ingest.prompts.template_time import fix_time, forget_time
from moewh.ingest.prompts.tokenise import TokenRules, tokenise
from moewh.ingest.record import Identity
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout

_PROMPTS_LOOKED_AT = 64
"""Prompts per tokenizer call when checking, before the run, that prompts give tokens."""


@dataclass(frozen=True)
class RunPlan:
    """Everything decided before a run's first batch."""

    identity: Identity
    prompts: PromptPlan
    """How the prompts are split into segments."""
    rules: TokenRules
    size: SizeRule
    batch_tokens: int
    sampling: Sampling | None
    wanted: WantedVectors
    recorded: bool
    """Whether the run's own files exist already."""
    missing: list[int]
    """Missing segments that this process has to write, in order."""


def plan_run(
    options: IngestOptions, layout: Layout, prompts: PromptStream, loaded: LoadedModel, process: Process
) -> RunPlan:
    """Return the plan of a run. Raises UsageError or MoewhError for a run that cannot work."""
    rules = TokenRules(
        _max_length(options, loaded), options.on_overflow, options.special_tokens, vocabulary=loaded.vocabulary_rows
    )
    size = SizeRule(
        rows_per_token=top_k(loaded.config) * len(loaded.moe_layers),
        max_length=rules.max_length,
        chunked=options.on_overflow == "chunk",
        segment_rows=options.segment_rows,
        generate=options.generate,
    )
    if options.generate:
        _check_start(loaded)
    split = prompts.plan(size)
    wanted = wanted_vectors(options, loaded.moe_layers, loaded.text_config.model_type)
    rules = replace(rules, chats=_chat_rules(options, loaded, split))
    identity = identify(loaded, options, rules, split)
    if split.chats and CLOCK in template_variables(loaded.tokenizer):
        now = _fixed_time(layout, prompts, split, identity, ChatRenderer(loaded.tokenizer, rules.chats))
        rules = replace(rules, chats=replace(rules.chats, now=now))
        identity = identify(loaded, options, rules, split)
    if recorded := require_same(layout, identity):
        require_same_labels(layout, identity.run_id, options)
    missing = process.share(missing_segments(layout, identity, split))
    if missing:
        layout.require_one_disk(identity.run_id)
    # A budget of one token puts every context into its own batch.
    separately = any(moe.family.one_context_per_batch for moe in loaded.moe_layers)
    batch_tokens = 1 if separately else options.batch_tokens
    return RunPlan(identity, split, rules, size, batch_tokens, options.sampling, wanted, recorded, missing)


def missing_segments(layout: Layout, identity: Identity, prompts: PromptPlan) -> list[int]:
    """Return the missing segments of a run, over all processes."""
    return [number for number in range(prompts.segments) if not layout.segment(identity.run_id, number).is_dir()]


def require_tokens(plan: RunPlan, prompts: PromptStream, loaded: LoadedModel) -> None:
    """Raise MoewhError if no non-empty prompt gives any token, which means the tokenizer is not the model's."""
    without: list[int] = []
    for first_prompt, table in _tables(prompts, plan.prompts):
        part = tokenise(table, first_prompt, loaded.tokenizer, plan.rules)
        without += part.without_tokens
        if len(part.without_tokens) + part.status_P.count("empty") < len(part.status_P):
            return
    if without:
        raise MoewhError(
            f"none of the {len(without):,} non-empty prompts gives any token (first: prompt {without[0]}). "
            "Check the prompts, or name the model's tokenizer with --tokenizer."
        )


def release_time(plan: RunPlan, layout: Layout, process: Process) -> None:
    """Forget the time of a run that did not begin, unless another process may be about to begin it."""
    run_id = plan.identity.run_id
    if process.world == 1 and plan.rules.chats.now is not None and not layout.run(run_id).is_dir():
        forget_time(layout, run_id)


def _fixed_time(
    layout: Layout, prompts: PromptStream, split: PromptPlan, identity: Identity, renderer: ChatRenderer
) -> datetime | None:
    """Decide the time that the chat template sees; None if it does not ask for the time."""

    def asked() -> bool:
        return _template_asks_for_time(prompts, split, renderer)

    complete = not missing_segments(layout, identity, split)
    return fix_time(layout, identity.run_id, identity.sha256, asked, complete)


def _template_asks_for_time(prompts: PromptStream, split: PromptPlan, renderer: ChatRenderer) -> bool:
    """Render chats until one makes the template ask for the time."""
    for first_prompt, table in _tables(prompts, split):
        parts = zip(table.column("form").to_pylist(), table.column("text").to_pylist(), strict=True)
        for index, (form, payload) in enumerate(parts):
            if form == MESSAGES:
                renderer.text(payload, f"prompt {first_prompt + index}")
            if renderer.saw_clock:
                return True
    return False


def _tables(prompts: PromptStream, split: PromptPlan) -> Iterator[tuple[int, Any]]:
    """Yield the run's prompts in small tables: (first prompt_id, canonical table)."""
    for number in range(split.segments):
        start, stop = split.bounds(number)
        table = prompts.read(start, stop)
        for offset in range(0, table.num_rows, _PROMPTS_LOOKED_AT):
            yield start + offset, table.slice(offset, _PROMPTS_LOOKED_AT)


def _chat_rules(options: IngestOptions, loaded: LoadedModel, plan: PromptPlan) -> ChatRules:
    """Return how to render chats. Raises UsageError for chat options that have no effect."""
    arguments = chat_arguments(options.chat_arguments)
    given = "--chat-argument" if arguments else "--chat-template" if options.chat_template else None
    if not plan.chats:
        if given:
            raise UsageError(f"{given} has no effect: no prompt consists of chat messages. Leave it out.")
        return ChatRules()
    used = template_variables(loaded.tokenizer)
    for name in arguments:
        if name not in used:
            raise UsageError(f"--chat-argument {name}: the chat template does not use {name}.")
    return ChatRules(arguments, bool(options.generate) and GENERATION_PROMPT in used)


def _check_start(loaded: LoadedModel) -> None:
    """Raise MoewhError if an encoder-decoder's decoder would start from a token outside the vocabulary."""
    start = None if loaded.generation_tokens is None else loaded.generation_tokens.used.start_id
    rows = loaded.vocabulary_rows
    if start is not None and rows is not None and not 0 <= start < rows:
        raise MoewhError(
            f"decoder_start_token_id {start} is outside the model's vocabulary ({rows:,} rows). Correct "
            "generation_config.json."
        )


def _max_length(options: IngestOptions, loaded: LoadedModel) -> int:
    """Return the longest prompt in tokens: --max-length, else the model's context less the tokens to generate.

    Raises UsageError if the context does not hold them.
    """
    most, title = loaded.max_length - options.generate, loaded.source.title
    if most < 1:
        room = loaded.max_length - 1
        raise UsageError(
            f"--generate {options.generate} leaves no room for a prompt in the context of {title}: give at most {room}."
        )
    if (options.max_length or 1) > most:
        raise UsageError(f"--max-length {options.max_length} is more than {title} takes: give at most {most}.")
    return options.max_length or most
