"""Observe the forward passes that a user's code makes: hooks on a model in, one `Pass` per forward pass out.

A pass's cache shows which sequences it continues: an object that was seen before, with exactly as many positions as
were recorded. Cases that cannot be decided are refused by name. No hook waits for the device.
"""

from __future__ import annotations

import inspect
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from moewh.ingest.capture.hooks import Capture, PendingRouting, text_base, to_host
from moewh.ingest.families.rule import Call, MoELayer
from moewh.ingest.model.loading import LoadedModel
from moewh.ingest.recorder.endings import GenerateObserver
from moewh.ingest.recorder.one_thread import OneThread
from moewh.ingest.recorder.sequences import Block, Labels
from moewh.warehouse.errors import MoewhError

_CACHES = ("cache", "past_key_values")
"""transformers' names for a cache, as an argument and as an output; the second until 5.2x."""
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")
"""Arguments that give the starts of sequences that share a row."""
_READ = ("input_ids", "attention_mask", "position_ids", *_CACHES, *_PACKED)
"""Arguments of a pass that a recording reads."""
_REORDERING = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")
"""Methods of a cache that reorder its rows."""


@dataclass(frozen=True)
class Pass:
    """One forward pass of B sequences over S positions, on its way to the host."""

    block: Block
    first: bool
    """Whether the block begins with this pass."""
    generated: bool
    ids_BS: torch.Tensor
    mask_BS: torch.Tensor | None
    positions_BS: torch.Tensor | None
    """Position ids, where they may show that sequences share a row."""
    after_end_BS: torch.Tensor | None
    """How far a token lies behind the end of its sequence in `generate`; None where none has ended."""
    routing: PendingRouting


@dataclass
class _Running:
    """A pass in progress: its arguments."""

    given: dict[str, Any]
    block: Block
    cache: Any
    length: int
    """Positions after the pass, padding included."""
    make: Callable[[PendingRouting], Pass]
    capture: Capture


@dataclass
class _Growing:
    """A block that a cache can continue."""

    cache: weakref.ref[Any]
    block: Block
    length: int
    rows: int
    """B, the sequences side by side."""
    broken: bool = False
    """True if it cannot be continued: a pass failed midway, or was refused."""


class PassObserver:
    """Observes every pass of a model between `attach` and `detach`.

    `done` is called with each pass, and with the blocks that no later pass can continue.
    """

    def __init__(
        self, loaded: LoadedModel, labels: Callable[[], Labels], done: Callable[[Pass, list[Block]], None]
    ) -> None:
        self._loaded, self._labels, self._done = loaded, labels, done
        self._stack = text_base(loaded.model)
        self._stated = _stated(loaded.model)
        self._thread = OneThread()
        self._generate = GenerateObserver(loaded.model, self._thread)
        self._parameters = list(inspect.signature(type(self._stack).forward).parameters)[1:]
        self._growing: dict[int, _Growing] = {}
        self._left: deque[Block] = deque()
        """Blocks whose cache is gone; filled whenever Python collects one."""
        self._running: _Running | None = None
        self._handles: list[RemovableHandle] = []
        self._layer_handles: list[RemovableHandle] = []
        """Those of the MoE layers, which must see what the user's hooks leave."""

    def attach(self) -> None:
        """Hook the model."""
        self._handles = [
            self._stack.register_forward_pre_hook(self._before, with_kwargs=True),
            self._stack.register_forward_hook(self._after, with_kwargs=True),
            self._stack.register_forward_hook(self._leave, always_call=True),
        ]
        self._layer_handles = [
            handle for moe in self._loaded.moe_layers for handle in moe.family.attach(moe, self._record)
        ]
        self._generate.attach()
        for name, refuse in _REFUSED.items():
            setattr(self._loaded.model, name, refuse)

    def removed(self) -> MoewhError | None:
        """Return an error if someone else removed a hook, as by clearing those of a module, or replaced the stack."""
        if text_base(self._loaded.model) is not self._stack:
            return MoewhError(
                f"the model's {type(self._stack).__name__} was replaced within the block, so passes are missing. "
                "Replace it before the block."
            )
        handles = (*self._handles, *self._layer_handles)
        if all(handle.id in (handle.hooks_dict_ref() or ()) for handle in handles):
            return None
        return MoewhError(
            "moewh's hooks were removed from the model within the block, so passes are missing. Remove only your own "
            "hooks, by their handles."
        )

    def wait_for_others(self) -> None:
        """Wait until no other thread runs the model: a streamer's loop ends just before `generate` does."""
        self._thread.wait_for_others()

    def detach(self) -> None:
        """Remove every hook."""
        for handle in (*self._handles, *self._layer_handles):
            handle.remove()
        self._generate.detach()
        for name in _REFUSED:
            vars(self._loaded.model).pop(name, None)
        growing, self._growing = list(self._growing.values()), {}
        for one in growing:
            if (cache := one.cache()) is not None:
                for name in _REORDERING:
                    vars(cache).pop(name, None)

    def _before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _in_backward():
            return  # a recomputed checkpoint, whose pass was recorded already
        if torch.compiler.is_compiling():
            raise MoewhError("the model is being compiled, and a compiled graph cannot be observed. Run it uncompiled.")
        self._thread.enter()
        self._forget_failed()
        if (error := self.removed()) is not None:
            raise error
        for handle in self._layer_handles:  # behind hooks that were registered within the block
            if (hooks := handle.hooks_dict_ref()) is not None:
                hooks.move_to_end(handle.id)
        self._require_as_stated()
        given = self._given(args, kwargs)
        ids_BS = self._token_ids(given)
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        growing = self._continued_block(cache, len(ids_BS))
        past = 0 if growing is None else growing.length
        mask_BS = _mask(given.get("attention_mask"), tuple(ids_BS.shape), past)
        positions = given.get("position_ids") if past == 0 else None
        block = Block(self._labels()) if growing is None else growing.block
        first, generated = growing is None, growing is not None and ids_BS.shape[1] == 1
        endings = self._generate.endings
        after_end = None if endings is None else endings.after_end(ids_BS, continues=growing is not None)
        copies = [
            None if tensor is None else to_host(tensor.detach().clone())
            for tensor in (ids_BS, mask_BS, positions, after_end)
        ]
        assert copies[0] is not None
        ids, mask, given_positions, behind = copies[0], *copies[1:]
        self._running = _Running(
            given,
            block,
            cache,
            past + ids_BS.shape[1],
            lambda routing: Pass(block, first, generated, ids, mask, given_positions, behind, routing),
            Capture(self._loaded.moe_layers, np.ones(tuple(ids_BS.shape), np.int64)),
        )

    def _record(self, moe: MoELayer, call: Call) -> None:
        if _in_backward():
            return
        if self._running is None:
            raise self.removed() or MoewhError(
                f"{moe.path} was called outside of a forward pass of {type(self._stack).__name__}. moewh cannot tell "
                "which tokens these are. Call the whole model."
            )
        self._running.capture.record(moe, call)

    def _after(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if _in_backward() or (running := self._running) is None:
            return
        given = self._given(args, kwargs)
        if changed := [name for name in _READ if given.get(name) is not running.given.get(name)]:
            raise MoewhError(
                f"a hook that was registered on {type(self._stack).__name__} within the block changes its "
                f"{changed[0]}, after moewh read it. Register such a hook before the block."
            )
        made = running.make(running.capture.take())
        cache = running.cache if running.cache is not None else _cache_of(output)
        closed = [] if cache is not None else [running.block]
        while self._left:
            closed.append(self._left.popleft())
        self._done(made, closed)
        if cache is not None:  # not before: a pass that is refused or interrupted must not be continued
            self._keep(cache, running)
        self._running = None

    def _leave(self, *_: Any) -> None:
        """End a pass, also one that failed."""
        if not _in_backward():
            self._thread.leave()

    def _require_as_stated(self) -> None:
        """Raise MoewhError if the model is no longer what the run's own columns say."""
        for name, now in _stated(self._loaded.model).items():
            if now != (before := self._stated[name]):
                raise MoewhError(
                    f"the model's {name} is {now}, and was {before} when the block was entered. Use one block for each."
                )

    # ------------------------------------------------------------------------------------ arguments of a pass

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self._parameters, args, strict=False)), **kwargs}

    def _token_ids(self, given: dict[str, Any]) -> torch.Tensor:
        ids = given.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            raise MoewhError(
                f"{type(self._stack).__name__} was called without input_ids [sequences, positions] (inputs_embeds have "
                "no token ids). moewh cannot tell the tokens."
            )
        packed = next((name for name in _PACKED if given.get(name) is not None), None)
        if packed is not None:
            raise MoewhError(
                f"sequences are packed into one row ({packed}), and moewh cannot tell them apart. Give each a "
                "row, with an attention_mask."
            )
        return ids

    def _continued_block(self, cache: Any, rows: int) -> _Growing | None:
        """Return the block that this pass continues; None for new sequences. Raises MoewhError if undecidable."""
        held = _length(cache)
        known = self._growing.get(id(cache)) if cache is not None else None
        if known is not None and known.cache() is not cache:
            known = None
        if held == 0 and known is not None and known.length:  # it was reset
            self._drop(id(cache))
            return None
        if known is None:
            if held or (held is None and _has_state(cache)):
                raise MoewhError(
                    f"the cache holds {held or 'some'} positions that were not recorded (a copy, or filled before). "
                    "moewh cannot tell which tokens they are. Begin the sequence within the recording."
                )
            return None
        if known.broken:
            raise MoewhError(
                "an earlier pass with this cache was refused or failed, so its sequences cannot be continued. Begin "
                "them again, with a new cache."
            )
        if known.rows != rows or (held is not None and held != known.length):
            raise MoewhError(
                f"the cache holds {held} positions of {rows} sequences, and {known.length} of {known.rows} were "
                "recorded: it was shortened or rebuilt (assisted decoding). Only plain decoding is recorded."
            )
        return known

    # ------------------------------------------------------------------------------------ continued blocks

    def _keep(self, cache: Any, running: _Running) -> None:
        """Remember the block that a cache can continue, until the cache is gone."""
        key = id(cache)
        known = self._growing.get(key)
        if known is not None and known.block is running.block:
            known.length = running.length
            return
        if known is not None:
            self._drop(key)
        rows = running.capture.shape[0]
        reference = weakref.ref(cache, lambda _: self._drop(key))
        self._growing[key] = _Growing(reference, running.block, running.length, rows)
        for name in _REORDERING:
            if hasattr(cache, name):
                setattr(cache, name, _refuse_reordering)

    def _drop(self, key: int) -> None:
        """Close the block of a cache that is gone. Called whenever Python collects it."""
        growing = self._growing.pop(key, None)
        if growing is not None:
            self._left.append(growing.block)

    def _forget_failed(self) -> None:
        """Drop a last pass that did not finish, or was refused: its cache cannot be continued."""
        failed, self._running = self._running, None
        if failed is not None and failed.cache is not None and id(failed.cache) in self._growing:
            self._growing[id(failed.cache)].broken = True


def _stated(model: Any) -> dict[str, str]:
    """Return what `runs` states of every pass, and a user can change: `generate` itself changes only the experts'."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attention": str(getattr(model.config, "_attn_implementation", None)),
    }


def _in_backward() -> bool:
    """Return whether autograd runs this, as when it recomputes a checkpointed forward."""
    return bool(torch._C._current_graph_task_id() != -1)


def _mask(mask: Any, shape: tuple[int, ...], past: int) -> torch.Tensor | None:
    """Return this pass's part of an attention mask. Raises MoewhError if it is not a mask of tokens."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or tuple(mask.shape) != (shape[0], past + shape[1]):
        what = f"of shape {list(mask.shape)}" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        raise MoewhError(
            f"attention_mask is {what}, not [{shape[0]} sequences, {past + shape[1]} positions]. moewh cannot tell "
            "padding from tokens (a static cache makes such masks; use a dynamic one)."
        )
    return mask[:, past:]


def _length(cache: Any) -> int | None:
    """Return the positions that a cache holds; None if unknown. Raises MoewhError if it is not a cache."""
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        raise MoewhError(
            f"the cache is a {type(cache).__name__}, which does not report its length. Use one of transformers "
            "(DynamicCache)."
        )
    try:
        return int(cache.get_seq_length())
    except ValueError:  # a cache with only linear attention
        return None


def _has_state(cache: Any) -> bool:
    """Return whether a cache of linear attention was filled."""
    has_state = getattr(cache, "has_previous_state", None)
    return has_state is not None and bool(has_state())


def _cache_of(output: Any) -> Any:
    """Return the cache in a pass's output, which a later pass may continue."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return next((found for name in _CACHES if (found := output.get(name)) is not None), None)


def _refuse_compiling(*_: Any, **__: Any) -> Any:
    raise MoewhError(
        "`generate` would compile the model (a static cache), and a compiled graph cannot be observed. Use a dynamic "
        "cache, or disable_compile=True."
    )


def _refuse_assisting(*_: Any, **__: Any) -> Any:
    raise MoewhError(
        "`generate` would use assisted decoding, whose passes hold guesses, and only plain decoding is recorded. Leave "
        "out assistant_model, prompt_lookup_num_tokens and the like."
    )


def _refuse_copying(*_: Any, **__: Any) -> Any:
    raise MoewhError(
        "the model's passes are being recorded, and a copy of it would hold the recording's hooks. Copy or pickle it "
        "before or after the block; save_pretrained and state_dict work within it."
    )


_REFUSED = {
    "get_compiled_call": _refuse_compiling,
    "_get_candidate_generator": _refuse_assisting,
    **dict.fromkeys(("__deepcopy__", "__reduce_ex__"), _refuse_copying),
}
"""Methods of the model that `generate`, copy and pickle call for what is refused, and what is called instead."""


def _refuse_reordering(*_: Any, **__: Any) -> Any:
    raise MoewhError(
        "the sequences in a cache are put in another order (beam search), and moewh records plain decoding only. Use "
        "num_beams=1, or generate outside of the recording."
    )
