"""Existence: a query about a run, domain or expert that does not exist is refused with a list of those that do.

In: the kinds of a query's parameters (`moewh.warehouse.answer.parameters`) and their values. A few small queries look
them up, in the same way for every query and on both engines. A layer, expert, domain, token or prompt must exist in
every given run; without a given run, one run must have all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from moewh.warehouse.answer.parameters import id_list
from moewh.warehouse.answer.query import Value
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files import schema

Rows = list[tuple[Any, ...]]
Look = Callable[[str, Mapping[str, Value]], Rows]
"""Returns the rows of one of moewh's own SQL statements."""
RUNS = "select run_id, series, tokens_key, status from runs order by run_id"
LAYERS = "select run_id, layer, num_experts from layers order by run_id, layer"
DOMAINS = "select distinct run_id, domain from prompts order by run_id, domain"
TOKENS = "select distinct run_id, token from vocab_counts where kind <> 'special' and token is not null order by token"
TOKEN = "select distinct run_id from vocab_counts where kind <> 'special' and token = getvariable('token')::varchar"
PROMPTS = "select distinct run_id, prompt_id from prompts where prompt_id in ({ids})"
PROMPT_RANGES = "select run_id, min(prompt_id), max(prompt_id) from prompts group by run_id order by run_id"
TOKEN_IDS = "select distinct run_id, token_id from tokens where token_id in ({ids})"

_LISTED = 20
"""Names that a message lists; it gives the number of the rest."""
_COMPARED = ("run of the same experts", "run of the same tokens", "complete run of the same tokens")
RUN_KINDS = ("run", *_COMPARED)
_RUNS_ROWS = frozenset({"run of the same tokens", "complete run of the same tokens", "series"})
"""Kinds for which the rows of `runs` are needed. All others need only the ids, and each run has layers: these take a
fourth of the time to look up, because `runs` counts segments."""


@dataclass
class Scope:
    """The runs that a query is about, according to the parameters seen so far."""

    look: Look
    runs: list[str]
    given: bool
    """True if the runs are named: then each must have the value; otherwise one is enough."""
    everything: bool
    """True if these are all runs of the warehouse."""

    def narrow(self, holders: Collection[str], absent: Callable[[Sequence[str], str], str]) -> None:
        """Keep only the runs in `holders`. Raises MoewhError, with the text of `absent`, if required runs are not."""
        lacking = [run_id for run_id in self.runs if run_id not in holders]
        if lacking and (self.given or len(lacking) == len(self.runs)):
            raise MoewhError(absent(lacking, self._where(lacking)))
        self.everything = self.everything and not lacking
        self.runs = [run_id for run_id in self.runs if run_id in holders]

    def _where(self, runs: Sequence[str]) -> str:
        if len(runs) == 1:
            return f"in run {runs[0]}"
        return "in any run" if self.everything and len(runs) == len(self.runs) else f"in the runs {_listed(runs)}"


def require_existing(look: Look, kinds: Mapping[str, str], values: Mapping[str, Value]) -> None:
    """Raise MoewhError, with the existing names, for a value that names something missing from the warehouse."""
    asked = {name: kind for name, kind in kinds.items() if name in values and kind in (*RUN_KINDS, *_FINDERS)}
    if not asked:
        return
    if _RUNS_ROWS.isdisjoint(asked.values()):
        with suppress(MoewhError):  # then the names are listed from RUNS, in the order that users know
            _require_among({run_id: (None, None) for run_id, *_ in look(LAYERS, {})}, look, asked, values)
            return
    _require_among({run_id: (key, status) for run_id, _, key, status in look(RUNS, {})}, look, asked, values)


def _require_among(
    runs: Mapping[str, tuple[str | None, str | None]],
    look: Look,
    asked: Mapping[str, str],
    values: Mapping[str, Value],
) -> None:
    """Do what `require_existing` does, given the warehouse's runs, each with its tokens_key and status."""
    given = [str(values[name]) for name, kind in asked.items() if kind in RUN_KINDS]
    for run_id in given:
        if run_id not in runs:
            raise MoewhError(_absent(f"run {run_id!r}", "", nearest(run_id, runs), f"Runs: {_listed(runs)}."))
    if not runs:
        named = {name: kind for name, kind in asked.items() if kind != "placement"}
        if not named:  # a file or a text of the user's: nothing in a warehouse has its name
            return
        name, kind = next(iter(named.items()))
        raise MoewhError(f"there is no {kind} {values[name]!r}: the warehouse is empty. Runs: none.")
    if compared := {str(values[name]): kind for name, kind in asked.items() if kind in _COMPARED}:
        first = [str(values[name]) for name, kind in asked.items() if kind == "run"]
        _require_comparable(look, first, compared, {run_id: key for run_id, (key, _) in runs.items()})
        if "complete run of the same tokens" in compared.values():
            _require_complete(given, {run_id: status for run_id, (_, status) in runs.items()})
    scope = Scope(look, given or list(runs), bool(given), not given)
    for kind, find in _FINDERS.items():
        for name in (name for name in asked if asked[name] == kind):
            find(scope, values[name], values.get(name.replace("expert", "layer")))


def nearest(text: str, known: Iterable[str]) -> list[str]:
    """Return up to three names most similar to a text; those that differ only in case and white space come first."""
    import difflib

    names = list(known)
    alike = sorted((name for name in names if _bare(name) == _bare(text)), key=lambda name: text.strip() not in name)
    return list(dict.fromkeys([*alike, *difflib.get_close_matches(text, names, 3)]))[:3]


def _bare(text: str) -> str:
    """Return a token without the mark that tokenizers write for a space, which users copy with the token."""
    return text.replace("\u0120", " ").replace("\u2581", " ").strip().casefold()


def _require_comparable(
    look: Look, first: Sequence[str], compared: Mapping[str, str], keys: Mapping[str, str | None]
) -> None:
    """Raise MoewhError for runs that are compared expert by expert, or token by token, but have different ones.

    Given the first runs, those that each is compared with, by kind, and each run's tokens_key.
    """
    experts: dict[str, dict[int, int]] = {}
    for run_id, layer, num_experts in look(LAYERS, {}):
        experts.setdefault(run_id, {})[layer] = num_experts
    for run_id in first:
        tokens = {name for name, key in keys.items() if key is not None and key == keys[run_id]}
        for other, kind in compared.items():
            by_token = kind != "run of the same experts"
            if by_token and other not in tokens:
                what, why = "tokens", "their tokens_key differs"
            elif differ := _different_experts(run_id, other, experts):
                what, why = "experts", differ
            else:
                continue
            same = [
                name
                for name in keys
                if name != run_id and (name in tokens or not by_token) and experts.get(name) == experts.get(run_id)
            ]
            raise MoewhError(
                f"runs {run_id} and {other} do not have the same {what} ({why}), so they cannot be compared. "
                f"Runs with {'the tokens and ' if by_token else ''}the experts of {run_id}: {_listed(same)}."
            )


def _require_complete(given: Sequence[str], statuses: Mapping[str, str | None]) -> None:
    """Raise MoewhError for a run that is not complete: its domains have fewer tokens than those of the other run."""
    for run_id in given:
        if statuses[run_id] != "complete":
            raise MoewhError(
                f"run {run_id} is {statuses[run_id]}, so its tokens are not all those of the other run. "
                "Run its ingest command again to complete it."
            )


def _different_experts(run_id: str, other: str, experts: Mapping[str, Mapping[int, int]]) -> str:
    """Return the first difference between two runs' numbers of experts by layer; empty if there is none."""
    here, there = experts.get(run_id, {}), experts.get(other, {})
    for layer in sorted({*here, *there}):
        if layer not in there or layer not in here:
            has, lacks = (run_id, other) if layer in here else (other, run_id)
            return f"{has} has an MoE layer {layer}, {lacks} has none"
        if here[layer] != there[layer]:
            return f"{here[layer]} and {there[layer]} at layer {layer}"
    return ""


def _find_series(scope: Scope, value: Value, _: Value | None) -> None:
    series = {run_id: name for run_id, name, *_ in scope.look(RUNS, {})}

    def absent(runs: Sequence[str], where: str) -> str:
        known = sorted({series[run_id] for run_id in runs if series[run_id] is not None})
        return _absent(f"series {value!r}", where, nearest(str(value), known), f"Series: {_listed(map(repr, known))}.")

    scope.narrow({run_id for run_id, name in series.items() if name == value}, absent)


def _find_layer(scope: Scope, value: Value, _: Value | None) -> None:
    rows = scope.look(LAYERS, {})

    def absent(runs: Sequence[str], where: str) -> str:
        known = {layer for run_id, layer, _ in rows if run_id in runs}
        return _absent(f"MoE layer {value}", where, [], f"MoE layers: {_numbers(known)}.")

    scope.narrow({run_id for run_id, layer, _ in rows if layer == value}, absent)


def _find_expert(scope: Scope, value: Value, layer: Value | None) -> None:
    """Look up an expert at the layer given with it, or at any layer."""
    rows = [row for row in scope.look(LAYERS, {}) if layer is None or row[1] == layer]

    def absent(runs: Sequence[str], where: str) -> str:
        most = max(experts for run_id, _, experts in rows if run_id in runs)
        at = "" if layer is None else f"at layer {layer} "
        return _absent(f"expert {value}", at + where, [], f"Experts: {_numbers(range(most))}.")

    scope.narrow({run_id for run_id, _, experts in rows if 0 <= int(value) < experts}, absent)


def _find_placement(scope: Scope, value: Value, _: Value | None) -> None:
    rows = scope.look(LAYERS, {})
    placed = sorted({(int(layer), int(expert)) for layer, expert, _ in (p.split(":") for p in str(value).split(","))})

    def missing(run_id: str) -> tuple[int, int] | None:
        experts = {layer: number for run, layer, number in rows if run == run_id}
        return next((place for place in placed if place[1] >= experts.get(place[0], 0)), None)

    def absent(runs: Sequence[str], where: str) -> str:
        layer, expert = missing(runs[0]) or placed[0]
        numbers = {at: number for run, at, number in rows if run == runs[0]}
        if layer not in numbers:
            return _absent(
                f"MoE layer {layer}, which the placement has,", where, [], f"MoE layers: {_numbers(numbers)}."
            )
        known = f"Experts: {_numbers(range(numbers[layer]))}."
        return _absent(f"expert {expert}, which the placement has, at layer {layer}", where, [], known)

    scope.narrow({run_id for run_id in scope.runs if missing(run_id) is None}, absent)


def _find_domain(scope: Scope, value: Value, _: Value | None) -> None:
    rows = scope.look(DOMAINS, {})

    def absent(runs: Sequence[str], where: str) -> str:
        known = {domain for run_id, domain in rows if run_id in runs}
        names = sorted(domain for domain in known if domain is not None)
        none = " Some prompts have no domain: in SQL, `domain is null`." if None in known else ""
        return _absent(
            f"domain {value!r}", where, nearest(str(value), names), f"Domains: {_listed(map(repr, names))}.{none}"
        )

    scope.narrow({run_id for run_id, domain in rows if domain == value}, absent)


def _find_token(scope: Scope, value: Value, _: Value | None) -> None:
    def absent(runs: Sequence[str], where: str) -> str:
        known = {token for run_id, token in scope.look(TOKENS, {}) if run_id in runs}
        return _absent(f"token {value!r}", where, nearest(str(value), sorted(known)), f"{len(known):,} others occur.")

    scope.narrow({run_id for (run_id,) in scope.look(TOKEN, {"token": value})}, absent)


def _find_prompts(scope: Scope, value: Value, _: Value | None) -> None:
    def known(runs: Sequence[str]) -> str:
        found = [(first, last) for run_id, first, last in scope.look(PROMPT_RANGES, {}) if run_id in runs]
        return (
            f"Prompts: {min(first for first, _ in found)} to {max(last for _, last in found)}."
            if found
            else "Prompts: none."
        )

    _find_ids(scope, "prompt", PROMPTS, value, known)


def _find_token_ids(scope: Scope, value: Value, _: Value | None) -> None:
    how = f"A token_id is prompt_id * {1 << schema.POSITION_BITS} + position."
    _find_ids(scope, "token", TOKEN_IDS, value, lambda _: how)


def _find_ids(scope: Scope, what: str, sql: str, value: Value, known: Callable[[Sequence[str]], str]) -> None:
    """Look up ids: each must be in every given run, or in any run if none is given."""
    ids = sorted(set(id_list(str(value))))
    runs = set(scope.runs)
    found = {row for row in scope.look(sql.format(ids=", ".join(map(str, ids))), {}) if row[0] in runs}

    def missing(runs: Sequence[str]) -> list[int]:
        return [number for number in ids if not any((run_id, number) in found for run_id in runs)]

    if scope.given:
        holders = {run_id for run_id in scope.runs if not missing([run_id])}
    else:
        holders = set() if missing(scope.runs) else {run_id for run_id, _ in found}
    scope.narrow(
        holders,
        lambda lacking, where: _absent(
            f"{what} {_numbers(missing(lacking[:1] if scope.given else lacking))}", where, [], known(lacking)
        ),
    )


_FINDERS: dict[str, Callable[[Scope, Value, Value | None], None]] = {
    "series": _find_series,
    "layer": _find_layer,
    "expert": _find_expert,
    "placement": _find_placement,
    "domain": _find_domain,
    "token": _find_token,
    "prompt ids": _find_prompts,
    "token ids": _find_token_ids,
}
"""Kind → function that looks it up, given the value and, for an expert, the value of the layer given with it."""


def _absent(what: str, where: str, near: Sequence[str], known: str) -> str:
    """Return the message for a missing name: what is missing and where, the nearest names, and the known names."""
    quoted = what.endswith("'") or what.endswith('"')
    hint = f" Did you mean {' or '.join(map(repr, near) if quoted else near)}?" if near else ""
    return f"there is no {what}{where and ' '}{where}.{hint} {known}"


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _LISTED:,} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more or "none"


def _numbers(numbers: Iterable[int]) -> str:
    """List numbers in order, with consecutive ones as `0 to 15`."""
    listed = sorted(numbers)
    if len(listed) > 2 and listed[-1] - listed[0] == len(listed) - 1:
        return f"{listed[0]} to {listed[-1]}"
    return _listed(map(str, listed))
