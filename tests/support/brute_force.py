"""The views computed again in plain Python, from a run's description alone, and the comparison of their rows.

Each `brute_<view>` takes a `synthetic.Run` and returns the rows that the view must have for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest

from moewh.warehouse.answer.catalog import describe_views
from tests.support.synthetic import Run, word

Rows = list[tuple[Any, ...]]


def brute_co_routing(run: Run) -> Rows:
    rows = []
    for layer, (experts, _) in run.layers.items():
        sets = [set(t.experts(layer)) for t in run.tokens() if t.counted and t.experts(layer)]
        for a in range(experts):
            for b in range(experts):
                both = sum({a, b} <= s for s in sets)
                if a != b and both:
                    n_a, n_b = sum(a in s for s in sets), sum(b in s for s in sets)
                    ratios = (both / n_a, both / (n_a + n_b - both), both * len(sets) / (n_a * n_b))
                    rows.append((run.run_id, layer, a, b, both, *ratios))
    return rows


def brute_expert_token_affinity(run: Run) -> Rows:
    rows = []
    for layer, (experts, _) in run.layers.items():
        tokens = [t for t in run.tokens() if t.counted and t.experts(layer)]
        for expert in range(experts):
            mine = [t for t in tokens if expert in t.experts(layer)]
            for vocab_id, n_xi in Counter(t.vocab_id for t in mine).items():
                n_x = sum(t.vocab_id == vocab_id for t in tokens)
                ratios = (n_xi / n_x, n_xi / len(mine), n_xi * len(tokens) / (n_x * len(mine)))
                rows.append((run.run_id, layer, expert, vocab_id, word(vocab_id), n_xi, *ratios))
    return rows


def brute_layer_transitions(run: Run) -> Rows:
    rows = []
    layers = sorted(run.layers)
    for layer, following in pairwise(layers):
        moves = [(t.experts(layer), t.experts(following)) for t in run.tokens() if t.counted]
        moves = [(here, there) for here, there in moves if here and there]
        for i in range(run.layers[layer][0]):
            for j in range(run.layers[following][0]):
                both = sum(i in here and j in there for here, there in moves)
                if both:
                    n_i, n_j = sum(i in here for here, _ in moves), sum(j in there for _, there in moves)
                    rows.append((run.run_id, layer, following, i, j, both, both / n_i, both * len(moves) / (n_i * n_j)))
    return rows


def brute_expert_load(run: Run) -> Rows:
    rows: Rows = []
    for layer, (experts, _) in run.layers.items():
        tokens = [t for t in run.tokens() if t.counted and t.experts(layer)]
        choices = sum(len(t.experts(layer)) for t in tokens)
        for expert in range(experts):
            weights = [w for t in tokens for e, w in t.choices[layer] if e == expert and w is not None]
            first = sum(t.experts(layer)[0] == expert for t in tokens)
            mean = sum(weights) / len(weights) if weights else None
            rows.append((run.run_id, layer, expert, len(weights), len(weights) / choices, first, sum(weights), mean))
    return rows


def brute_load_balance(run: Run) -> Rows:
    rows: Rows = []
    for layer, (experts, _) in run.layers.items():
        chosen = [expert for t in run.tokens() if t.counted for expert in t.experts(layer)]
        n = [chosen.count(expert) for expert in range(experts)]
        mean = sum(n) / experts
        entropy = -sum(x / sum(n) * math.log2(x / sum(n)) for x in n if x)
        cv = math.sqrt(sum((x - mean) ** 2 for x in n) / experts) / mean
        gini = sum(abs(x - y) for x in n for y in n) / (2 * experts**2 * mean)
        rows.append((run.run_id, layer, entropy, entropy / math.log2(experts), cv, gini, max(n) / mean, n.count(0)))
    return rows


def brute_domain_specialization(run: Run) -> Rows:
    rows: Rows = []
    prompts = [prompt for segment in run.segments for prompt in segment]
    for layer, (experts, _) in run.layers.items():
        sets = [(p.domain, t.experts(layer)) for p in prompts for t in p.tokens if t.counted and t.experts(layer)]
        for domain in {domain for domain, _ in sets}:
            mine = [chosen for d, chosen in sets if d == domain]
            for expert in range(experts):
                n_i = sum(expert in chosen for _, chosen in sets)
                tokens = sum(expert in chosen for chosen in mine)
                share, overall = tokens / len(mine), n_i / len(sets)
                lift = share / overall if n_i else None
                rows.append((run.run_id, domain, layer, expert, tokens, share, overall, lift))
    return rows


def brute_routes(run: Run) -> Rows:
    rows: Rows = []
    prompt_id = 0
    for segment, prompts in enumerate(run.segments):
        for prompt in prompts:
            for position, token in enumerate(prompt.tokens):
                about = (word(token.vocab_id), token.kind, position, prompt_id, prompt.domain)
                for layer, chosen in token.choices.items():
                    for rank, (expert, weight) in enumerate(chosen):
                        token_id = prompt_id * 2**24 + position
                        rows.append((run.run_id, segment, token_id, layer, rank, expert, weight, *about))
            prompt_id += 1
    return rows


def brute_first_choice_transitions(run: Run) -> Rows:
    rows = []
    for layer, following in pairwise(sorted(run.layers)):
        moves = [(t.experts(layer)[:1], t.experts(following)[:1]) for t in run.tokens() if t.counted]
        moves = [(here, there) for here, there in moves if here and there]
        for (here, there), both in Counter((here[0], there[0]) for here, there in moves).items():
            n_i, n_j = sum(h == [here] for h, _ in moves), sum(t == [there] for _, t in moves)
            ratios = (both / n_i, both * len(moves) / (n_i * n_j))
            rows.append((run.run_id, layer, following, here, there, both, *ratios))
    return rows


def brute_first_choice_paths(run: Run) -> Rows:
    layers = sorted(run.layers)
    prompts = [prompt for segment in run.segments for prompt in segment]
    paths = Counter(
        (prompt.domain, "-".join(str(token.experts(layer)[0]) for layer in layers))
        for prompt in prompts
        for token in prompt.tokens
        if token.counted and all(token.experts(layer) for layer in layers)
    )
    return [(run.run_id, domain, path, tokens) for (domain, path), tokens in paths.items()]


def brute_vocabulary_specialization(run: Run) -> Rows:
    rows: Rows = []
    for layer, (experts, _) in run.layers.items():
        tokens = [t for t in run.tokens() if t.counted and t.experts(layer)]
        largest = []
        for vocab_id, n_x in Counter(t.vocab_id for t in tokens).items():
            mine = [t.experts(layer) for t in tokens if t.vocab_id == vocab_id]
            if n_x >= 10:
                largest.append(max(sum(expert in chosen for chosen in mine) for expert in range(experts)) / n_x)
        rows.append((run.run_id, layer, sum(largest) / len(largest) if largest else None, len(largest)))
    return rows


def brute_expert_repetition(run: Run) -> Rows:
    rows: Rows = []
    prompts = [prompt for segment in run.segments for prompt in segment]
    for layer, (experts, top_k) in run.layers.items():
        sets = list(combinations(range(experts), top_k))
        shares_any = sum(bool({*sets[0]} & {*other}) for other in sets) / len(sets)
        for domain in {prompt.domain for prompt in prompts}:
            pairs = [
                (here.experts(layer), there.experts(layer))
                for prompt in prompts
                for here, there in pairwise(prompt.tokens)
                if prompt.domain == domain and here.counted and there.counted
            ]
            pairs = [(here, there) for here, there in pairs if here and there]
            if pairs:
                first = sum(here[0] == there[0] for here, there in pairs) / len(pairs)
                any_ = sum(bool({*here} & {*there}) for here, there in pairs) / len(pairs)
                rows.append((run.run_id, domain, layer, len(pairs), first, any_, 1 / experts, shares_any))
    return rows


def brute_router_saturation(run: Run, runs: list[Run]) -> Rows:
    series = [r for r in runs if r.fields.get("series") and r.fields["series"] == run.fields.get("series")]
    if not series:
        return []
    last = max(series, key=lambda r: r.fields["train_step"])
    rows: Rows = []
    for layer, (experts, top_k) in run.layers.items():
        both = [
            (here.experts(layer), there.experts(layer))
            for here, there in zip(run.tokens(), last.tokens(), strict=True)
            if here.counted and here.experts(layer) and there.experts(layer)
        ]
        saturation = sum(len({*here} & {*there}) / top_k for here, there in both) / len(both)
        about = (run.run_id, last.run_id, run.fields["train_step"], layer, len(both))
        rows.append((*about, saturation, top_k / experts))
    return rows


def brute_router_confidence(run: Run) -> Rows:
    rows: Rows = []
    prompt_id = 0
    for segment, prompts in enumerate(run.segments):
        for prompt in prompts:
            for position, token in enumerate(prompt.tokens):
                token_id = prompt_id * 2**24 + position
                for layer, logits in token.logits.items():
                    numbers = confidence(logits, run.scoring[layer], run.selection_bias[layer], run.layers[layer][1])
                    rows.append((run.run_id, segment, token_id, layer, *numbers))
            prompt_id += 1
    return rows


def confidence(logits: list[float], scoring: str, bias: list[float], top_k: int) -> tuple[float, float, float | None]:
    """Entropy, mass of the k greatest shares, and margin, with numpy."""
    z_E = np.asarray(logits, np.float64)
    scores_E = np.exp(z_E) / np.exp(z_E).sum() if scoring == "softmax" else 1 / (1 + np.exp(-z_E))
    shares_E = scores_E / scores_E.sum()
    selection_E = np.sort(scores_E + np.asarray(bias, np.float64))[::-1]
    margin = float(selection_E[top_k - 1] - selection_E[top_k]) if top_k < len(logits) else None
    return float(-(shares_E * np.log2(shares_E)).sum()), float(np.sort(shares_E)[::-1][:top_k].sum()), margin


def saliency(chosen: list[tuple[float, float | None, float | None]]) -> tuple[Any, ...]:
    """What an expert did, of (weight, norm, cosine) per choice: choices, sums and means, with numpy."""
    known = [(w, n, c) for w, n, c in chosen if n is not None]
    cosines = [c for _, _, c in known if c is not None]
    if not known:
        return (0, 0.0, None, 0.0, None, None, None, None)
    weight_N, norm_N = (np.array([row[place] for row in known], np.float64) for place in (0, 1))
    sums = (norm_N.sum(), norm_N.mean(), weight_N @ norm_N, (weight_N * norm_N).mean(), (norm_N**2).mean())
    return (len(known), *map(float, sums), float(norm_N.max()), float(np.mean(cosines)) if cosines else None)


def ranks(values: list[float | None]) -> list[int]:
    """Place of each, 1 for the greatest; None last, ties in order."""
    order = sorted(range(len(values)), key=lambda n: (values[n] is None, -round(values[n] or 0.0, 12), n))
    return [order.index(place) + 1 for place in range(len(values))]


def brute_expert_saliency(run: Run) -> Rows:
    rows: Rows = []
    for layer, (experts, _) in run.layers.items():
        tokens = [t for t in run.tokens() if t.counted and layer in t.outputs]
        chosen: list[list[Any]] = [[] for _ in range(experts)]
        for token in tokens:
            for (expert, weight), output in zip(token.choices[layer], token.outputs[layer], strict=True):
                chosen[expert].append((weight, *output))
        did = [saliency(of_expert) for of_expert in chosen]
        places = [ranks([row[column] for row in did]) for column in range(6)]
        rows += [(run.run_id, layer, e, *did[e], *(place[e] for place in places)) for e in range(experts) if tokens]
    return rows


BRUTE_FORCE: dict[str, Callable[[Run], Rows]] = {
    "expert_saliency": brute_expert_saliency,
    "first_choice_transitions": brute_first_choice_transitions,
    "first_choice_paths": brute_first_choice_paths,
    "vocabulary_specialization": brute_vocabulary_specialization,
    "expert_repetition": brute_expert_repetition,
    "router_confidence": brute_router_confidence,
    "co_routing": brute_co_routing,
    "expert_token_affinity": brute_expert_token_affinity,
    "layer_transitions": brute_layer_transitions,
    "expert_load": brute_expert_load,
    "load_balance": brute_load_balance,
    "domain_specialization": brute_domain_specialization,
    "routes": brute_routes,
}


def assert_same_rows(name: str, got: Rows, expected: Rows) -> None:
    """Rows in any order: all but computed floats to the letter, those to 1e-12."""
    inexact = [column.type == "DOUBLE" for column in describe_views()[name].columns]

    def key(row: tuple[Any, ...]) -> str:
        return repr([value for value, is_float in zip(row, inexact, strict=True) if not is_float])

    assert len(got) == len(expected)
    for row, wanted in zip(sorted(got, key=key), sorted(expected, key=key), strict=True):
        for value, target, is_float in zip(row, wanted, inexact, strict=True):
            near = is_float and target is not None
            assert value == (pytest.approx(target, rel=1e-12, abs=1e-15) if near else target), (row, wanted)
