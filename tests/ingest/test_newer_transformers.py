"""Changes that a newer transformers may make: each gives the same rows, or a refusal by name.

Mixtral's own classes are changed in place, as a new release would, and a saved model goes through the real command.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral import modeling_mixtral as mixtral

from moewh.cli.main import main
from moewh.ingest.model.layers import find_moe_layers
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
from tests.support.models import byte_tokenizer, save_model, tiny_model
from tests.support.opened import viewed

EXPERTS = mixtral.MixtralExperts
_FORWARD: Any = EXPERTS.forward
Change = Callable[..., Any]
FIRST_BATCH = 25
"""Tokens of the first batch, and of no other."""


def renamed_indices(self: Any, hidden_states: Any, chosen: Any, top_k_weights: Any) -> Any:
    return _FORWARD(self, hidden_states, chosen, top_k_weights)


def renamed_weights(self: Any, hidden_states: Any, top_k_index: Any, gates: Any) -> Any:
    return _FORWARD(self, hidden_states, top_k_index, gates)


def renamed_both(self: Any, x: Any, chosen: Any, gates: Any) -> Any:
    return _FORWARD(self, x, chosen, gates)


def undescribed(*args: Any, **kwargs: Any) -> Any:
    return _FORWARD(*args, **kwargs)


def one_argument(self: Any, hidden_states: Any, *routing: Any) -> Any:
    return _FORWARD(self, hidden_states, *routing)


@functools.wraps(_FORWARD)
def described(*args: Any, **kwargs: Any) -> Any:
    return _FORWARD(*args, **kwargs)


def more_arguments(
    self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any, scale: float = 1.0, **kwargs: Any
) -> Any:
    del kwargs
    return _FORWARD(self, hidden_states, top_k_index, top_k_weights) * scale


def other_order(self: Any, top_k_weights: Any, top_k_index: Any, hidden_states: Any) -> Any:
    return _FORWARD(self, hidden_states, top_k_index, top_k_weights)


def squared(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    return _FORWARD(self, hidden_states, top_k_index, top_k_weights**2)


def of_the_next_expert(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    shift = top_k_weights.shape[1] > 2  # not where moewh runs an expert alone
    return _FORWARD(self, hidden_states, (top_k_index + shift) % self.num_experts, top_k_weights)


def three_or_none(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    if top_k_index.shape[1] != 3:
        raise RuntimeError("three experts a token")
    return _FORWARD(self, hidden_states, top_k_index, top_k_weights)


UNSEEN = (renamed_indices, renamed_weights, renamed_both, undescribed, one_argument)
SEEN = (described, more_arguments)
WRONG = {
    squared: "its output is not the sum of weight times expert",
    of_the_next_expert: "its output is not the sum of weight times expert",
    three_or_none: "its experts cannot be run one by one",
}
"""Experts that take the same arguments but compute something else, and the message."""


def by_position(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    return experts(x, ids, weights)


def by_name(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    return experts(top_k_weights=weights, top_k_index=ids, hidden_states=x)


def on_copies(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    return experts(x.clone(), ids.T.contiguous().T, weights.T.contiguous().T)


def past_the_hooks(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    return experts.forward(x, ids, weights)


def past_the_hooks_later(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    """The first batch is right, as is possible where the code path depends on the input's size."""
    return (experts if len(x) == FIRST_BATCH else experts.forward)(x, ids, weights)


def twice(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    return (experts(x, ids, weights) + experts(x, ids, weights)) / 2


def in_two_parts(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    return torch.cat([experts(*(part[rows] for part in (x, ids, weights))) for rows in (slice(3), slice(3, None))])


def one_part(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    return torch.cat([experts(x[:3], ids[:3], weights[:3]), x[3:]])


def expert_by_expert(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    return sum(experts(x, ids[:, [slot]], weights[:, [slot]]) for slot in range(ids.shape[1]))


def sentinel(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    """As transformers marks experts of another process: index E, which no expert has."""
    return experts(x, ids.masked_fill(weights < 0.3, experts.num_experts), weights)


def sentinel_later(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    return (by_position if len(x) == FIRST_BATCH else sentinel)(experts, x, ids, weights)


def marked_less_than_zero(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    handle = experts.register_forward_pre_hook(lambda _, args: (args[0], args[1].clamp_min(0), args[2]))
    output = experts(x, ids.masked_fill(weights < 0.3, -1), weights * (weights >= 0.3))
    handle.remove()
    return output


def floats(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    handle = experts.register_forward_pre_hook(lambda _, args: (args[0], args[1].long(), args[2]))
    output = experts(x, ids.float(), weights)
    handle.remove()
    return output


def swapped(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    handle = experts.register_forward_pre_hook(lambda _, args: (args[0], args[2], args[1]))
    output = experts(x, weights, ids)
    handle.remove()
    return output


def dense_weights(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    """The weights of all experts instead of those of the chosen."""
    handle = experts.register_forward_pre_hook(lambda _, args: (args[0], args[1], args[2].gather(1, args[1])))
    output = experts(x, ids, torch.zeros(len(x), experts.num_experts).scatter(1, ids, weights))
    handle.remove()
    return output


def without_weights(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    handle = experts.register_forward_pre_hook(lambda _, args: (args[0], args[1], weights))
    output = experts(x, ids, None)
    handle.remove()
    return output


def replaced_on_the_instance(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    """As kernels do: another forward, with other arguments."""
    experts.forward = lambda hidden, chosen, gates, _: _FORWARD(experts, hidden, chosen, gates)
    output = experts(x, ids, weights, "fast")
    del experts.forward
    return output


SAME = (by_position, by_name, on_copies)
OTHER = {
    past_the_hooks: "was not called|were not called",
    past_the_hooks_later: "were not called",
    twice: "was called twice in one forward pass",
    in_two_parts: "moewh cannot tell which row is which token",
    one_part: "moewh cannot tell which row is which token",
    expert_by_expert: "was called twice in one forward pass",
    sentinel: "but it has experts 0 to 7|its output is not the sum of weight times expert",
    sentinel_later: "but it has experts 0 to 7",
    marked_less_than_zero: "but it has experts 0 to 7",
    floats: "indices of torch.float32",
    swapped: "indices of torch.float32",
    dense_weights: "moewh cannot tell which row is which token",
    without_weights: "without a tensor",
    replaced_on_the_instance: "other arguments than the forward of MixtralExperts takes",
}
"""How a block may call its experts, and the message as a regular expression."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "mixtral", "mixtral")


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Callable[..., Result]:
    prompts = tmp_path / "p.txt"
    prompts.write_text("one\n" + "a" * (FIRST_BATCH - 1) + "\n" + "three\n" * 8)
    arguments = ["ingest", "--model", str(model), "--prompts", str(prompts)]
    small = ["--batch-tokens", "40"]  # several batches, the longest prompt alone in the first
    return lambda warehouse, *more: CliRunner().invoke(main, [*arguments, *small, "--warehouse", str(warehouse), *more])


def rows(warehouse: Path) -> list[tuple[Any, ...]]:
    return viewed(Layout(warehouse)).sql("select * from routing order by all").fetchall()


def refused(result: Result, warehouse: Path) -> str:
    """The line of a refusal, after which the warehouse holds no row."""
    assert result.exit_code == 1, result.output
    *progress, line = result.stderr.splitlines()
    assert not progress or (len(progress) == 1 and "to write" in progress[0])
    assert not warehouse.exists() or not rows(warehouse)
    return line


def block_that(call: Change) -> Change:
    def forward(self: Any, hidden_states: Any) -> Any:
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        _, weights, ids = self.gate(flat)
        return call(self.experts, flat, ids, weights).reshape(hidden_states.shape)

    return forward


@pytest.mark.parametrize("changed", [*UNSEEN, other_order], ids=lambda changed: changed.__name__)
def test_experts_that_take_other_arguments_are_refused_by_name(
    changed: Change, model: Path, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EXPERTS, "forward", changed)
    if changed is other_order:
        call = lambda experts, x, ids, weights: experts(weights, ids, x)  # noqa: E731
        monkeypatch.setattr(mixtral.MixtralSparseMoeBlock, "forward", block_that(call))
    line = refused(run(tmp_path / "wh"), tmp_path / "wh")
    assert "model.layers.0.mlp.experts" in line
    if changed is not other_order:
        assert "(and 2 more)" in line
        assert f"MixtralExperts takes ({', '.join(list(inspect.signature(changed).parameters)[1:])})" in line
        inspected = CliRunner().invoke(main, ["inspect", str(model)])
        assert "model.layers.0.mlp.experts" in inspected.stdout
        assert "dense model" not in inspected.stdout


@pytest.mark.parametrize("changed", SEEN, ids=lambda changed: changed.__name__)
def test_experts_that_take_the_same_arguments_give_the_same_rows(
    changed: Change, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path / "before", "--run-id", "r").exit_code == 0
    monkeypatch.setattr(EXPERTS, "forward", changed)
    result = run(tmp_path / "after", "--run-id", "r")
    assert result.exit_code == 0, result.output
    assert rows(tmp_path / "after") == rows(tmp_path / "before")


@pytest.mark.parametrize("changed", WRONG, ids=lambda changed: changed.__name__)
def test_experts_that_do_something_else_are_refused_by_name(
    changed: Change, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EXPERTS, "forward", changed)
    line = refused(run(tmp_path / "wh"), tmp_path / "wh")
    assert "model.layers.0.mlp.experts (MixtralExperts)" in line
    assert WRONG[changed] in line


@pytest.mark.parametrize("changed", UNSEEN, ids=lambda changed: changed.__name__)
def test_one_layer_of_unseen_experts_is_no_dense_layer(changed: Change) -> None:
    class Newer(EXPERTS):
        """A second kind of experts, in one layer."""

        forward = changed

    model = tiny_model("mixtral")
    model.model.layers[1].mlp.experts.__class__ = Newer
    model.config.mlp_only_layers = [1]  # which the configuration does not state
    with pytest.raises(MoewhError, match=r"model\.layers\.1\.mlp\.experts looks like routed experts"):
        find_moe_layers(model, model.config)


class Stacked(nn.Module):
    """Experts under a name without meaning."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.ones(4, *shape)) for shape in ((48, 32), (32, 48)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Whatever."""
        return x


class ParallelExperts(nn.Module):
    """One matrix per expert, under a telling name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 48, 32))


HOLDERS: dict[str, Callable[[], nn.Module]] = {
    "list": lambda: nn.ModuleList(nn.Linear(32, 32) for _ in range(4)),
    "dictionary": lambda: nn.ModuleDict({f"expert_{place}": nn.Linear(32, 32) for place in range(4)}),
    "stacked": Stacked,
    "class": ParallelExperts,
}


@pytest.mark.parametrize("routed", [True, False], ids=["beside other layers", "alone"])
@pytest.mark.parametrize("place", ["model.layers.1.mlp", "model.layers.1", "model.decoder"])
@pytest.mark.parametrize("kind", HOLDERS)
def test_whatever_holds_experts_is_named(kind: str, place: str, routed: bool) -> None:
    model = tiny_model("mixtral" if routed else "qwen3-dense")
    if place == "model.decoder":
        model.model.decoder = nn.Module()
    if routed and place == "model.layers.1.mlp":
        model.model.layers[1].mlp = nn.Module()
        model.config.mlp_only_layers = [1]
    name = "experts" if kind in ("list", "dictionary") else "inner"
    model.get_submodule(place).add_module(name, HOLDERS[kind]())
    with pytest.raises(MoewhError, match=rf"{place}\.{name}") as refusal:
        find_moe_layers(model, model.config)
    assert "dense model" not in str(refusal.value)


@pytest.mark.parametrize("call", SAME, ids=lambda call: call.__name__)
def test_however_experts_are_called_rows_are_the_same(
    call: Change, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path / "before", "--run-id", "r").exit_code == 0
    monkeypatch.setattr(mixtral.MixtralSparseMoeBlock, "forward", block_that(call))
    result = run(tmp_path / "after", "--run-id", "r")
    assert result.exit_code == 0, result.output
    assert rows(tmp_path / "after") == rows(tmp_path / "before")


@pytest.mark.parametrize("generate", [(), ("--generate", "2")], ids=["prompts", "generation"])
@pytest.mark.parametrize("call", OTHER, ids=lambda call: call.__name__)
def test_other_calls_are_refused_by_name(
    call: Change, generate: tuple[str, ...], run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixtral.MixtralSparseMoeBlock, "forward", block_that(call))
    line = refused(run(tmp_path / "wh", *generate), tmp_path / "wh")
    assert re.search(r"model\.layers\.\d\.mlp\.experts", line)  # an index beyond the experts may show at any layer
    assert re.search(OTHER[call], line)


ERRORS = (
    AttributeError,
    TypeError,
    ValueError,
    KeyError,
    IndexError,
    RuntimeError,
    NotImplementedError,
    AssertionError,
)


@pytest.mark.parametrize(
    ("error", "generate"),
    [*((error, ()) for error in ERRORS), (AttributeError, ("--generate", "2"))],
    ids=lambda value: value.__name__ if isinstance(value, type) else "generation" if value else "prompts",
)
def test_a_model_that_fails_in_its_own_code_is_one_line(
    error: type[Exception],
    generate: tuple[str, ...],
    run: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(*_: Any) -> Any:
        raise error("'Output' has no 'image_outputs'\nsecond line")

    monkeypatch.setattr(mixtral.MixtralTopKRouter, "forward", forward)
    line = refused(run(tmp_path / "wh", *generate), tmp_path / "wh")
    assert "MixtralForCausalLM fails in its own forward pass" in line
    assert error.__name__ in line
    assert "image_outputs" in line


def test_more_experts_than_a_small_integer_counts_are_recorded_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gpt-oss, whose files hold all experts of a layer in one tensor: Mixtral's would hold 120,000."""
    many = 40_000
    small: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 4, "vocab_size": 257}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 2}
    torch.manual_seed(0)
    config = GptOssConfig(num_local_experts=many, num_experts_per_tok=3, pad_token_id=0, **small, **heads)
    GptOssForCausalLM(config).save_pretrained(folder := tmp_path / "model")
    byte_tokenizer().save_pretrained(folder)
    chosen: list[torch.Tensor] = []
    route: Any = GptOssTopKRouter.forward

    def gate(self: Any, hidden_states: Any) -> Any:
        logits, weights, ids = route(self, hidden_states)
        chosen.append(ids)
        return logits, weights, ids

    monkeypatch.setattr(GptOssTopKRouter, "forward", gate)
    (tmp_path / "p.txt").write_text("one two three four\n")
    arguments = ["--model", str(folder), "--prompts", str(tmp_path / "p.txt"), "--warehouse", str(tmp_path / "wh")]
    result = CliRunner().invoke(main, ["ingest", *arguments])
    assert result.exit_code == 0, result.output
    stored = viewed(Layout(tmp_path / "wh")).sql(
        "select layer, token_id, list(expert order by expert) from routing group by all order by all"
    )
    expected = [sorted(row) for row in chosen[0].tolist()]
    assert [experts for _, _, experts in stored.fetchall()] == expected
    assert max(max(row) for row in expected) > torch.iinfo(torch.int16).max
