"""Capture: exactly the indices and weights that the experts are called with, taken as the model runs.

Hooks only copy on the device and never wait for it. They drop rows of padding, so a batch gives [T, K] per layer for
its T real tokens, in the order of the attention mask.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from moewh.ingest.capture.expert_outputs import measure_outputs
from moewh.ingest.capture.vectors import WantedVectors, attach_vectors
from moewh.ingest.families.rule import NOT_CALLED, Call, MoELayer, is_measuring
from moewh.ingest.model.layers import MoELayers
from moewh.ingest.routing import NO_ROUTE, LayerRouting, VectorKey
from moewh.warehouse.errors import MoewhError, short_message
from moewh.warehouse.files import schema
from moewh.warehouse.files.schema import Table


@dataclass(frozen=True)
class _Copy:
    """Part of a batch's routing in transit from one device to the host: layers end to end, row by row."""

    layers: list[tuple[MoELayer, tuple[int, int]]]
    """(MoE layer, its [T, K])"""
    expert_ids: torch.Tensor
    weights: torch.Tensor
    arrived: torch.cuda.Event | None

    def wait(self) -> Iterator[tuple[int, LayerRouting]]:
        """Wait for the copy and yield it layer by layer. Raises MoewhError for an index that is not an expert's."""
        if self.arrived is not None:
            self.arrived.synchronize()
        ids, weights = self.expert_ids.int().numpy(), self.weights.float().numpy()
        fewest = min(moe.num_experts for moe, _ in self.layers)
        in_range = not ids.size or (ids.min() >= 0 and ids.max() < fewest)  # of all layers at once: a step has few rows
        start = 0
        for moe, (T, K) in self.layers:
            part = slice(start, start + T * K)
            if not in_range:
                _check_experts(moe, ids[part].reshape(T, K))
            yield moe.layer, LayerRouting(ids[part].reshape(T, K), weights[part].reshape(T, K))
            start += T * K


@dataclass(frozen=True)
class PendingRouting:
    """The routing of a forward pass that has been launched; any thread may wait for it."""

    copies: list[_Copy]
    vectors: dict[VectorKey, torch.Tensor]
    """On the host, and complete once the routing's copies are, which were launched later."""

    def wait(self) -> dict[int, LayerRouting]:
        """Return the routing by layer, once the device has finished."""
        return {layer: routing for copy in self.copies for layer, routing in copy.wait()}

    @property
    def arrivals(self) -> list[torch.cuda.Event]:
        """When the copies arrive from GPUs; none if there are none."""
        return [copy.arrived for copy in self.copies if copy.arrived is not None]

    def wait_for_vectors(self) -> dict[VectorKey, npt.NDArray[np.float32]]:
        """Return the opt-in vectors [T, width], once the device has finished."""
        for arrival in self.arrivals:
            arrival.synchronize()
        return {key: vectors.float().numpy() for key, vectors in self.vectors.items()}


def _check_experts(moe: MoELayer, expert_ids_TK: npt.NDArray[np.int32]) -> None:
    """Raise MoewhError unless each token has K experts of this layer, or NO_ROUTE in all slots."""
    none_TK = expert_ids_TK == NO_ROUTE
    wrong_T = ((expert_ids_TK < NO_ROUTE) | (expert_ids_TK >= moe.num_experts)).any(1) | (
        none_TK.any(1) & ~none_TK.all(1)
    )
    if wrong_T.any():
        raise MoewhError(
            f"{moe.path} ({type(moe.experts).__name__}) was called with the indices "
            f"{expert_ids_TK[wrong_T][0].tolist()} for a token, but it has experts 0 to {moe.num_experts - 1}. "
            "It is not recorded."
        )


class Capture:
    """The routing of one forward pass over B contexts of S positions; `capture_routing` feeds it."""

    def __init__(
        self, moe_layers: Sequence[MoELayer], mask_BS: npt.NDArray[np.int64], *, expert_outputs: bool = False
    ) -> None:
        self._moe_layers = moe_layers
        self._expert_outputs = expert_outputs
        self.shape = mask_BS.shape
        self._rows = None if mask_BS.all() else np.flatnonzero(mask_BS)
        self._rows_on: dict[torch.device, torch.Tensor] = {}
        self._ids: dict[int, torch.Tensor] = {}
        self._weights: dict[int, torch.Tensor] = {}
        self._vectors: dict[VectorKey, torch.Tensor] = {}
        self._calls: Counter[tuple[str, int]] = Counter()
        """Calls so far, by callee ("experts", or a table for its router) and layer: a looping block has many."""

    def record(self, moe: MoELayer, call: Call) -> None:
        """Record one block's call: [B*S, K] indices and weights; for expert outputs, also run its experts alone."""
        B, S = self.shape
        hidden_TH, ids_TK, weights_TK = call
        if is_measuring() or not self._is_visit(moe, "experts"):
            return
        if ids_TK.is_floating_point() or ids_TK.dtype == torch.bool or not weights_TK.is_floating_point():
            raise MoewhError(
                f"{moe.path} ({type(moe.experts).__name__}) was called with indices of {ids_TK.dtype} and weights of "
                f"{weights_TK.dtype}. moewh reads integers and floats, so it is not recorded."
            )
        if ids_TK.dim() != 2 or len(ids_TK) != B * S or weights_TK.shape != ids_TK.shape:
            raise MoewhError(
                f"{moe.path} was called with indices {list(ids_TK.shape)} and weights {list(weights_TK.shape)} "
                f"for a batch of {B} x {S} tokens. moewh cannot tell which row is which token."
            )
        # int16 halves what travels.
        smallest = torch.int16 if moe.num_experts <= torch.iinfo(torch.int16).max else torch.int32
        self._ids[moe.layer] = self._real(ids_TK, smallest)
        self._weights[moe.layer] = self._real(weights_TK)
        if self._expert_outputs:
            real = Call(*map(self._real, (hidden_TH.reshape(B * S, -1), ids_TK, weights_TK)))
            self._vectors[schema.EXPERT_OUTPUTS, moe.layer] = measure_outputs(moe, real)

    def keep(self, table: Table, moe: MoELayer, vectors: Any) -> None:
        """Record one router's logits or input: [B*S, width] (or [B, S, width])."""
        if not self._is_visit(moe, table.name):
            return
        B, S = self.shape
        flat = vectors.detach().reshape(-1, vectors.shape[-1])
        if len(flat) != B * S:
            raise MoewhError(
                f"{table.name}: the router of {moe.path} gives {list(vectors.shape)} for a batch of {B} x {S} tokens, "
                "which is not one row per token. Leave the option out."
            )
        self._vectors[table, moe.layer] = self._real(flat)

    def _is_visit(self, moe: MoELayer, called: str) -> bool:
        """Count a call, and return whether it is this layer's. Raises MoewhError for one too many."""
        call = self._calls[called, moe.layer]
        self._calls[called, moe.layer] += 1
        if call >= moe.visits:
            times = "twice" if moe.visits == 1 else f"{call + 1} times, not {moe.visits},"
            raise MoewhError(f"{moe.path} was called {times} in one forward pass. moewh cannot tell which call counts.")
        return call == moe.visit

    def _real(self, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a copy of the rows that are not padding: modules that run later may overwrite their inputs.

        This and its callers run at every layer of every step, so they call as few torch operations as possible.
        """
        if rows.requires_grad:
            rows = rows.detach()
        if self._rows is None:
            return rows.clone() if dtype is None or dtype is rows.dtype else rows.to(dtype)
        if rows.device not in self._rows_on:
            self._rows_on[rows.device] = to_device(self._rows, rows.device)
        return rows.index_select(0, self._rows_on[rows.device]).to(dtype or rows.dtype)

    def take(self) -> PendingRouting:
        """Launch the copy of everything captured to the host, without waiting for the device.

        Raises MoewhError with the containers that were not called.
        """
        missing = list(dict.fromkeys(moe.path for moe in self._moe_layers if moe.layer not in self._ids))
        if missing:
            raise MoewhError(
                f"{', '.join(missing[:3])} {'was' if len(missing) == 1 else 'were'} not called in a forward pass "
                f"of the model: {NOT_CALLED}"
            )
        by_device: dict[torch.device, list[int]] = {}
        for layer, ids in self._ids.items():
            by_device.setdefault(ids.device, []).append(layer)
        vectors = {key: to_host(tensor) for key, tensor in self._vectors.items()}
        return PendingRouting([self._copy(device, sorted(layers)) for device, layers in by_device.items()], vectors)

    def _copy(self, device: torch.device, layers: list[int]) -> _Copy:
        moe_layers = {moe.layer: moe for moe in self._moe_layers}
        shapes = [(moe_layers[layer], (self._ids[layer].shape[0], self._ids[layer].shape[1])) for layer in layers]
        ids, weights = (_end_to_end([kept[layer] for layer in layers]) for kept in (self._ids, self._weights))
        copied = _Copy(shapes, to_host(ids), to_host(weights), torch.cuda.Event() if device.type == "cuda" else None)
        if copied.arrived is not None:
            copied.arrived.record(torch.cuda.current_stream(device))
        return copied


def _end_to_end(rows: list[torch.Tensor]) -> torch.Tensor:
    """Return the numbers of all layers' rows, [T, K] each, as one flat tensor."""
    if len({part.shape[1] for part in rows}) == 1:
        return torch.cat(rows).flatten()
    return torch.cat([part.flatten() for part in rows])


def to_device(array: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Copy to the device; to a GPU from pinned memory, because any other copy waits for all launched work."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to the host; from a GPU into pinned memory, without waiting. A tensor already on the host is not copied."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


@contextmanager
def capture_routing(moe_layers: MoELayers, mask_BS: npt.NDArray[np.int64], wanted: WantedVectors) -> Iterator[Capture]:
    """Observe every block during one forward pass; the hooks are always removed afterwards.

    `mask_BS` is the attention mask on the host, so that finding the real rows does not wait for the device. Raises
    MoewhError if experts elsewhere are called.
    """
    capture = Capture(moe_layers.moe_layers, mask_BS, expert_outputs=wanted.expert_outputs)
    handles = [handle for moe in moe_layers.moe_layers for handle in moe.family.attach(moe, capture.record)]
    handles += [handle for moe in moe_layers.moe_layers for handle in attach_vectors(moe, wanted, capture.keep)]
    handles += [module.register_forward_pre_hook(_refuse_call(path)) for path, module in moe_layers.others]
    try:
        yield capture
    finally:
        for handle in handles:
            handle.remove()


def _refuse_call(path: str) -> Any:
    def hook(*_: Any) -> None:
        raise MoewhError(f"{path} was called, but a prompt should not reach this module. It is not recorded.")

    return hook


def run_stack(
    model: Any, input_ids_BS: torch.Tensor, attention_mask_BS: torch.Tensor, *, run_decoder: bool = False
) -> None:
    """Run every layer that sees a prompt over a right-padded batch, without cache and without the LM head.

    An encoder-decoder's prompt goes only through its encoder; with `run_decoder`, for a run that generates, the same
    tokens also go through its decoder. Any other model runs its `text_base`, with `logits_to_keep=1` if that has a head
    and accepts the argument.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids_BS, "attention_mask": attention_mask_BS}
    if model.config.is_encoder_decoder and not run_decoder:
        with failures_named(model):
            model.get_encoder()(**inputs)
        return
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = input_ids_BS
    base = text_base(model)
    if "logits_to_keep" in inspect.signature(type(base).forward).parameters:
        inputs["logits_to_keep"] = 1
    with failures_named(model):
        base(use_cache=False, **inputs)


def text_base(model: Any) -> Any:
    """Return the module that runs every layer which sees a prompt, without a head if possible.

    That is `model.base_model` if it is another module, else its `language_model` (Llama4ForConditionalGeneration has no
    other base, and fails to assemble its own output in transformers 5.24), else the model itself.
    """
    base = getattr(model, "base_model", model)
    return base if base is not model else getattr(model, "language_model", model)


@contextmanager
def failures_named(model: Any) -> Iterator[None]:
    """Turn a failure in a model's own code into a MoewhError that names it; out-of-memory errors pass unchanged."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {short_message(error)}"
        raise MoewhError(
            f"{type(model).__name__} fails in its own forward pass, in transformers {transformers.__version__} with "
            f"torch {torch.__version__}: {reason}. Try another version of transformers, or another --dtype or --device."
        ) from error
