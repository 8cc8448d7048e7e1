"""One MoE layer of a model, and the rule for reading its calls, which fits almost every family.

An MoE block in transformers 5 passes the chosen experts and their weights to a container of experts, whose forward has
parameters with these names. moewh records exactly the tensors in that call. The rule goes by the parameter names, never
by class names. A family that differs is a subclass in its own file, named after its model type, which
`moewh.ingest.families.find` finds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moewh.ingest.families import configuration, layouts
from moewh.ingest.families.configuration import Stack, text_config
from moewh.ingest.families.source import scoring_function
from moewh.ingest.routing import NO_ROUTE
from moewh.warehouse.errors import MoewhError, UsageError

INDEX_NAMES = frozenset({"top_k_index", "router_indices", "selected_experts", "router_mask"})
WEIGHT_NAMES = frozenset({"top_k_weights", "routing_weights", "router_probs"})
_ROUTER_NAMES = ("gate", "router")
_SCORING_NAMES = ("scoring_func", "expert_selection_fn")
_COUNT_NAMES = ("total_experts", "num_experts", "num_local_experts")


class Call(NamedTuple):
    """The arguments of one call of a block's experts, one row per token of the batch, padding included."""

    hidden_TH: torch.Tensor
    expert_ids_TK: torch.Tensor
    weights_TK: torch.Tensor


Record = Callable[["MoELayer", Call], None]
NOT_CALLED = "the layer is skipped, or something replaces the experts' forward (kernels, compilation). Turn that off."
"""Why experts may not have been called."""

_MEASURING: ContextVar[bool] = ContextVar("experts are run for measurement", default=False)


@contextmanager
def measuring_experts() -> Iterator[None]:
    """Mark that experts are run for measurement within a pass of the model, so that hooks ignore these calls."""
    token = _MEASURING.set(True)
    try:
        yield
    finally:
        _MEASURING.reset(token)


def is_measuring() -> bool:
    """Return whether experts are being run for measurement: see `measuring_experts`."""
    return _MEASURING.get()


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer: its modules, and how its calls are read."""

    layer: int
    stack: Stack
    path: str
    experts: nn.Module
    """The container of experts, which the model has at `path`, without an adapter's wrappers."""
    outermost: nn.Module
    """The module that the block calls: the outermost adapter wrapper around the container, or the container itself."""
    router: nn.Module | None
    """The router as the block calls it, with an adapter's wrappers."""
    block: Any
    """The module that holds the router and the experts."""
    whole_layer: nn.Module
    """The transformer layer that contains the block."""
    family: FamilyAdapter
    visit: int = 0
    """The index, from 0, of this layer's call among the block's calls in a forward pass."""
    visits: int = 1
    """Calls of the block in a forward pass: more than one where a model loops over its layers."""

    @cached_property
    def num_experts(self) -> int:
        """E: the routed experts of this layer, identity experts included; looked up once, since every call needs it."""
        return self.family.num_experts(self)

    @property
    def kinds(self) -> list[str]:
        """The kind of each of the E experts: mlp or identity."""
        identity = self.family.identity_experts(self)
        return ["mlp"] * (self.num_experts - identity) + ["identity"] * identity


class FamilyAdapter:
    """Finds and reads a family's MoE layers; this class is the rule, its subclasses are the adapters.

    The first line of a subclass's docstring explains why the family differs: `moewh inspect` prints it.
    """

    refused: str | None = None
    """Why the family is refused, whatever its weights are; None for one that is recorded."""
    block_is_container = False
    """True where the block holds the experts' matrices itself, without a container."""
    shared_experts = 0
    """Number of shared experts, where no module is named after them."""
    one_context_per_batch = False
    """True where a token's routing depends on the rest of its batch, so that prompts must not share one."""
    returns_probabilities = False
    """True where the router returns probabilities instead of logits."""
    measurable = True
    """False where the weights are not a function of what the router's forward returns."""
    renormalized: bool | None = None
    """Whether a token's K weights are divided by their sum; None: by the configuration, which defaults to True."""
    fixed_top_k: int | None = None
    """Experts per token, where no configuration states it."""
    no_outputs: str | None = None
    """Why experts have no output before their weight; None where they have one."""

    def require_outputs(self, model_type: str) -> None:
        """Raise UsageError if the family's experts have no output before their weight, for `--expert-outputs`."""
        if self.no_outputs is not None:
            raise UsageError(f"--expert-outputs: {model_type} cannot give them: {self.no_outputs}. Leave it out.")

    # ------------------------------------------------------------------------------------ reading a configuration

    def routed_layers(self, config: Any) -> list[int]:
        """Return the layers that should hold routed experts, with the model's own numbers."""
        return configuration.routed_layers(config, self.first_sparse)

    def first_sparse(self, step: int) -> int:
        """Return each stack's first layer with routed experts, in an encoder-decoder with one every `step` layers."""
        return step - 1

    def top_k(self, config: Any) -> int:
        """Return experts per token K; the largest where layers differ."""
        return configuration.top_k(config) if self.fixed_top_k is None else self.fixed_top_k

    def declared(self, moe: MoELayer, config: Any) -> tuple[str | None, bool | None]:
        """Return the function from logits to weights, and whether a token's K weights are divided by their sum.

        Each is None unless it is known without running the model, from the configuration or from the code of the router
        or its block. The weights may be scaled afterwards, by a constant or by a factor per expert.
        """
        text = text_config(config)
        stated = next((str(value) for name in _SCORING_NAMES if (value := getattr(text, name, None))), None)
        scoring = stated or scoring_function(None if moe.router is None else unwrapped(moe.router), moe.block)
        if scoring is None:
            return None, None
        if self.renormalized is not None:
            return scoring, self.renormalized
        normed = getattr(text, "norm_topk_prob", None)
        return scoring, True if normed is None else bool(normed)

    # ------------------------------------------------------------------------------------ finding its layers

    def find(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield every container of routed experts: its path and the module."""
        for path, module in model.named_modules():
            if routed_call(module):
                yield path, module

    def unrouted_experts(self, moe: MoELayer) -> list[str]:
        """Return paths of modules in an MoE layer that look like experts but are not part of its routing."""
        del moe
        return []

    def router(self, block: nn.Module) -> nn.Module | None:
        """Return the block's router, which chooses the experts."""
        return next(
            (getattr(block, name) for name in _ROUTER_NAMES if isinstance(getattr(block, name, None), nn.Module)), None
        )

    def num_experts(self, moe: MoELayer) -> int:
        """Return E, the number of routed experts that the block's indices refer to."""
        for name in _COUNT_NAMES:
            if isinstance(known := getattr(moe.experts, name, None), int):
                return known
        raise MoewhError(f"{moe.path} ({type(moe.experts).__name__}) does not say how many experts it holds.")

    def identity_experts(self, moe: MoELayer) -> int:
        """Return how many of the E experts, the last ones, return their input."""
        del moe
        return 0

    def split_experts(self, moe: MoELayer, tensors: layouts.Tensors) -> layouts.Parts | None:
        """Split a container's matrices, by name, into those of each expert; None for an unknown layout."""
        return layouts.split(moe.experts, tensors)

    # ------------------------------------------------------------------------------------ reading its calls

    def attach(self, moe: MoELayer, record: Record) -> list[RemovableHandle]:
        """Hook the block so that `record` receives each call; return the hooks."""

        parameters = routed_call(moe.experts)
        assert parameters is not None

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, ids, weights = _read(moe, parameters, args, kwargs)
            record(moe, Call(hidden, *self.rows(ids, weights)))

        return [moe.experts.register_forward_pre_hook(before, with_kwargs=True)]

    def rows(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Convert the container's arguments to indices and weights [T, K]; NO_ROUTE where there is no route."""
        if ids.dim() == weights.dim() == 2:
            return ids, weights
        return ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, weights.shape[-1])

    def observed(self, moe: MoELayer) -> nn.Module:
        """Return the module whose output `rebuild` reproduces."""
        return moe.outermost

    def run_experts(self, moe: MoELayer, hidden_MH: torch.Tensor, expert_ids_M: torch.Tensor) -> torch.Tensor:
        """Run one expert on each of M rows, with weight one, through the container as the block calls it."""
        output_MH: torch.Tensor = moe.outermost(hidden_MH, expert_ids_M[:, None], hidden_MH.new_ones(len(hidden_MH), 1))
        return output_MH

    def rebuild(self, moe: MoELayer, call: Call) -> torch.Tensor:
        """Return Σ weight · expert(x) for each of N rows, in float64: the expected output of `observed`."""
        N, K = call.expert_ids_TK.shape
        repeated = call.hidden_TH.repeat_interleave(K, dim=0)
        single = self.run_experts(moe, repeated, call.expert_ids_TK.clamp_min(0).reshape(-1))
        weights_NK = call.weights_TK.double() * (call.expert_ids_TK != NO_ROUTE)
        return (single.reshape(N, K, -1).double() * weights_NK[..., None]).sum(1)

    def logits(self, output: Any) -> Any:
        """Return the router's logits from its forward's output."""
        return output[0] if isinstance(output, tuple) else output


def router_of(moe: MoELayer) -> nn.Module:
    """Return the router of a layer whose family always has one."""
    assert moe.router is not None
    return moe.router


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside an adapter's wrappers, whose attributes are the model's; any other module unchanged."""
    while True:
        copies = getattr(module, "modules_to_save", None)
        inner = (
            next(iter(copies.values())) if isinstance(copies, nn.ModuleDict) else getattr(module, "base_layer", None)
        )
        if not isinstance(inner, nn.Module):
            return module
        module = inner


@dataclass(frozen=True)
class _Parameters:
    signature: inspect.Signature
    index_name: str
    weight_name: str

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(self.signature.parameters)[1:]

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self._names)

    @cached_property
    def _required(self) -> frozenset[str]:
        parameters = list(self.signature.parameters.values())[1:]
        return frozenset(one.name for one in parameters if one.default is one.empty)

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by name, in order. Raises TypeError for a call that does not fit the forward.

        This runs at every call of every layer, where `Signature.bind` would slow a generation step by several percent.
        """
        if not kwargs and len(args) == len(self._names):
            return dict(zip(self._names, args, strict=True))
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        plain = len(given) == len(args) + len(kwargs)
        if plain and self._required <= given.keys() and given.keys() <= self._known:
            return {name: given[name] for name in self._names if name in given}
        bound = self.signature.bind(module, *args, **kwargs).arguments
        return dict(list(bound.items())[1:])


def _read(moe: MoELayer, parameters: _Parameters, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return a container's call. Raises MoewhError for arguments that its class's forward does not take."""
    try:
        given = parameters.bind(moe.experts, args, kwargs)
    except TypeError as error:
        raise MoewhError(
            f"{moe.path} was called with other arguments than the forward of {type(moe.experts).__name__} takes "
            f"({error}): something replaces it. It is not recorded."
        ) from error
    hidden = next(iter(given.values()), None)
    ids, weights = given.get(parameters.index_name), given.get(parameters.weight_name)
    if not (isinstance(hidden, Tensor) and isinstance(ids, Tensor) and isinstance(weights, Tensor)):
        raise MoewhError(
            f"{moe.path} ({type(moe.experts).__name__}) was called without a tensor of {parameters.index_name} or "
            f"{parameters.weight_name}. It is not recorded."
        )
    return Call(hidden, ids, weights)


def routed_call(module: nn.Module) -> _Parameters | None:
    """Return the signature, index and weight parameters of a container's forward; None for any other module.

    The signature follows decorators through `__wrapped__`.
    """
    return _parameters(type(module).forward)


@cache
def _parameters(forward: Callable[..., Any]) -> _Parameters | None:
    signature = inspect.signature(forward)
    index = next((name for name in signature.parameters if name in INDEX_NAMES), None)
    weight = next((name for name in signature.parameters if name in WEIGHT_NAMES), None)
    return _Parameters(signature, index, weight) if index and weight else None
