"""The saved queries that answer published analyses, computed again from a run's description in plain Python.

Each takes a `synthetic.Run` and returns the rows that the saved query of its name must have for it.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support.brute_force import ranks, saliency
from tests.support.places import Place, Rows, places, routed
from tests.support.synthetic import Run, word


def loads(run: Run, layer: int, chosen: list[Place]) -> list[int]:
    """Choices of each expert of a layer by some tokens."""
    counts = Counter(expert for place in chosen for expert in place.token.experts(layer))
    return [counts[expert] for expert in range(run.layers[layer][0])]


def domains(chosen: list[Place]) -> list[str | None]:
    return list(dict.fromkeys(place.domain for place in chosen))


def load_violation(run: Run) -> Rows:
    rows: Rows = []
    for layer, (experts, _) in run.layers.items():
        counts_E = np.array(loads(run, layer, routed(run, layer)), np.float64)
        signed_E = counts_E / counts_E.sum() * experts - 1
        size_E = np.abs(signed_E)
        rows.append((run.run_id, layer, *map(float, (size_E.max(), size_E.min(), size_E.mean(), signed_E.max()))))
    return rows


def coverage_curve(run: Run) -> Rows:
    rows: Rows = []
    for layer, (experts, _) in run.layers.items():
        counts = sorted(loads(run, layer, routed(run, layer)), reverse=True)
        for percent in (50, 80, 90, 95):
            least = next(n for n in range(1, experts + 1) if 100 * sum(counts[:n]) >= percent * sum(counts))
            even = math.ceil(percent * experts / 100)
            used = sum(count > 0 for count in counts)
            rows.append((run.run_id, layer, percent / 100, least, even, used, experts, sum(counts)))
    return rows


def top_expert_share(run: Run) -> Rows:
    rows: Rows = []
    for layer in run.layers:
        for domain in domains(routed(run, layer)):
            mine = [place for place in routed(run, layer) if place.domain == domain]
            counts = loads(run, layer, mine)
            top = counts.index(max(counts))
            first = Counter(place.token.experts(layer)[0] for place in mine)
            ranked = sorted(counts, reverse=True)
            over_half = next(n for n in range(len(ranked) + 1) if 2 * sum(ranked[:n]) > sum(ranked))
            shares = (counts[top] / len(mine), counts[top] / sum(counts), max(first.values()) / len(mine))
            rows.append((run.run_id, domain, layer, top, counts[top], *shares, over_half))
    return rows


def prompt_against_generated(run: Run) -> Rows:
    rows: Rows = []
    for layer, (experts, _) in run.layers.items():
        kinds = [[p for p in routed(run, layer) if p.token.kind == kind] for kind in ("prompt", "generated")]
        if all(kinds):
            (a, b), (n, m) = [loads(run, layer, kind) for kind in kinds], map(len, kinds)
            for expert in range(experts):
                difference = b[expert] / m - a[expert] / n
                z = two_rates(b[expert], m, a[expert], n)
                shares = (a[expert] / n, b[expert] / m)
                rows.append((run.run_id, layer, expert, a[expert], b[expert], *shares, difference, z))
    return rows


def two_rates(a: int, n: int, b: int, m: int) -> float | None:
    """The z of the difference of two rates, a of n and b of m, with their pooled variance."""
    pooled = (a + b) / (n + m)
    variance = pooled * (1 - pooled) * (1 / n + 1 / m)
    return (a / n - b / m) / math.sqrt(variance) if variance > 1e-15 else None


def next_layer_recall(run: Run) -> Rows:
    """Two guesses each."""
    rows: Rows = []
    for here, there in pairwise(sorted(run.layers)):
        (experts, _), (next_experts, _) = run.layers[here], run.layers[there]
        both = [p.token for p in routed(run, here) if p.token.experts(there)]
        N_EJ = np.zeros((experts, next_experts), np.int64)
        for token in both:
            for i in token.experts(here):
                N_EJ[i, token.experts(there)] += 1
        order_J = np.argsort(-N_EJ.sum(0), kind="stable")[:2]
        guessed = sum(row[np.argsort(-row, kind="stable")[:2]].sum() for row in N_EJ)
        shares = (float(guessed / N_EJ.sum()), float(N_EJ[:, order_J].sum() / N_EJ.sum()), 2 / next_experts)
        rows.append((run.run_id, here, there, len(both), 2, *shares))
    return rows


def entropy(p: npt.NDArray[np.float64]) -> float:
    return float(-sum(x * math.log2(x) for x in p if x > 0))


def divergence(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    """Jensen-Shannon divergence as the entropy of the mean less the mean entropy."""
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def domain_divergence(run: Run) -> Rows:
    rows: Rows = []
    for layer, (experts, top_k) in run.layers.items():
        chosen = routed(run, layer)
        of = {domain: [place for place in chosen if place.domain == domain] for domain in domains(chosen)}
        for a, here in of.items():
            for b, there in of.items():
                if a != b:
                    p, q = (np.array(loads(run, layer, side)) / (len(side) * top_k) for side in (here, there))
                    v, w = (weight_shares(run, layer, side) for side in (here, there))
                    chance = (experts - top_k) / (8 * top_k * math.log(2)) * (1 / len(here) + 1 / len(there))
                    by_count = (divergence(p, q), 2 * divergence(p, q) / (entropy(p) + entropy(q)), chance)
                    by_weight = (divergence(v, w), 2 * divergence(v, w) / (entropy(v) + entropy(w)))
                    rows.append((run.run_id, layer, a, b, len(here), len(there), *by_count, *by_weight))
    return rows


def weight_shares(run: Run, layer: int, chosen: list[Place]) -> npt.NDArray[np.float64]:
    """Each expert's share of the weights that some tokens give."""
    weight_E = np.zeros(run.layers[layer][0])
    for place in chosen:
        for expert, weight in place.token.choices[layer]:
            assert weight is not None
            weight_E[expert] += weight
    shares_E: npt.NDArray[np.float64] = weight_E / weight_E.sum()
    return shares_E


def standing_committee(run: Run) -> Rows:
    """Present in at least 0.6 of the domains."""
    rows: Rows = []
    for layer, (experts, top_k) in run.layers.items():
        chosen = routed(run, layer)
        shares_DE = np.array(
            [weight_shares(run, layer, [p for p in chosen if p.domain == domain]) for domain in domains(chosen)]
        )
        rank_DE = np.argsort(np.argsort(-shares_DE, axis=1, kind="stable"), axis=1) + 1
        present_DE = (rank_DE <= top_k) & (shares_DE > 0)
        rank_DE = np.where(present_DE, rank_DE, top_k + 1)
        listed = [e for e in range(experts) if present_DE[:, e].mean() >= 0.6 - 1e-9]
        points = {e: (round(rank_DE[:, e].mean(), 9), round(rank_DE[:, e].var(), 9)) for e in listed}
        for e in listed:
            (mean, var), share = points[e], float(shares_DE[:, e].mean())
            beaten = any(m <= mean and v <= var and (m, v) != (mean, var) for m, v in points.values())
            exact = (float(rank_DE[:, e].mean()), float(rank_DE[:, e].var()))
            rows.append(
                (run.run_id, layer, e, len(rank_DE), int(present_DE[:, e].sum()), *exact, share, int(not beaten))
            )
    return rows


def choice_information(run: Run) -> Rows:
    return [informed(run, layer, run.layers[layer][1], "token", "domain") for layer in run.layers]


def position_information(run: Run) -> Rows:
    return [informed(run, layer, run.layers[layer][1], "position") for layer in run.layers]


def first_choice_information(run: Run) -> Rows:
    return [informed(run, layer, 1, "token", "domain", "position") for layer in run.layers]


PARTS: dict[str, Callable[[Place], Hashable]] = {
    "token": lambda place: place.token.vocab_id,
    "domain": lambda place: place.domain,
    "position": lambda place: (place.position + 1).bit_length(),
}


def informed(run: Run, layer: int, top_k: int, *abouts: str) -> tuple[Any, ...]:
    """What the first `top_k` choices share with each: the sum of the entropies less the joint entropy."""
    row: list[Any] = []
    for about in abouts:
        pairs = [(PARTS[about](p), expert) for p in routed(run, layer) for expert in p.token.experts(layer)[:top_k]]
        n = len(pairs)
        joint, parts, experts = Counter(pairs), Counter(g for g, _ in pairs), Counter(e for _, e in pairs)
        bits = [entropy(np.array(list(counts.values())) / n) for counts in (joint, parts, experts)]
        chance = max(len(experts) - top_k, 0) * (len(parts) - 1) / (2 * n * math.log(2))
        row += [len(parts), bits[1] + bits[2] - bits[0], chance]
    return (run.run_id, layer, n // top_k, bits[2], *row)


def expert_token_association(run: Run) -> Rows:
    """Every entry, with Wilson's interval from its quadratic equation."""
    rows: Rows = []
    for layer, (experts, _) in run.layers.items():
        chosen = routed(run, layer)
        n, entries = len(chosen), Counter(place.token.vocab_id for place in chosen)
        for expert in range(experts):
            mine = Counter(place.token.vocab_id for place in chosen if expert in place.token.experts(layer))
            for vocab_id, n_xi in mine.items():
                n_x, share = entries[vocab_id], mine.total() / n
                expected, lift = n_x * share, n_xi / (n_x * share)
                p, c = n_xi / n_x, 1.96**2 / n_x
                low, high = sorted(np.roots([1 + c, -(2 * p + c), p * p]).real / share)
                variance = n_x * share * (1 - share) * (n - n_x) / (n - 1)
                z = (n_xi - expected) / math.sqrt(variance) if variance > 1e-12 else None
                npmi = math.log2(lift) / -math.log2(n_xi / n) if n_xi < n else None
                about = (run.run_id, layer, expert, vocab_id, word(vocab_id), n_xi)
                rows.append((*about, expected, lift, float(low), float(high), z, npmi))
    return rows


def load_by_position(run: Run) -> Rows:
    """Ranges of four positions."""
    rows: Rows = []
    for layer, (experts, _) in run.layers.items():
        chosen = routed(run, layer)
        overall = loads(run, layer, chosen)
        for first in sorted({place.position // 4 * 4 for place in chosen}):
            mine = [place for place in chosen if place.position // 4 * 4 == first]
            there = sum(place.position // 4 * 4 == first for place in places(run))
            counts = loads(run, layer, mine)
            for expert in range(experts):
                share, overall_share = counts[expert] / len(mine), overall[expert] / len(chosen)
                lift = share / overall_share if overall_share else None
                about = (run.run_id, layer, first, expert, counts[expert])
                rows.append((*about, share, overall_share, lift, len(mine) / there))
    return rows


def expert_reuse(run: Run) -> Rows:
    rows: Rows = []
    for layer, (experts, top_k) in run.layers.items():
        chosen = routed(run, layer)
        at = {place.token_id: place for place in chosen}
        for domain in domains(chosen):
            mine = [place for place in chosen if place.domain == domain]
            sets = [
                ({*p.token.experts(layer)}, {*at[p.token_id + 1].token.experts(layer)})
                for p in mine
                if p.token_id + 1 in at
            ]
            if sets:
                reuse = sum(len(a & b) / top_k for a, b in sets) / len(sets)
                jaccard = sum(len(a & b) / len(a | b) for a, b in sets) / len(sets)
                by_load = sum((count / len(mine)) ** 2 for count in loads(run, layer, mine)) / top_k
                rows.append((run.run_id, domain, layer, len(sets), reuse, jaccard, by_load, top_k / experts))
    return rows


def expert_cache(run: Run) -> Rows:
    """A cache of each size, run through token by token."""
    rows: Rows = []
    for layer, (experts, _) in run.layers.items():
        sets = [sorted(place.token.experts(layer)) for place in routed(run, layer)]
        counts = sorted(loads(run, layer, routed(run, layer)), reverse=True)
        for capacity in range(1, experts + 1):
            hits = lru_hits(sets, capacity)
            n = sum(counts)
            shares = (hits / n, sum(counts[:capacity]) / n, capacity / experts)
            rows.append((run.run_id, layer, capacity, n, hits, *shares))
    return rows


def lru_hits(sets: list[list[int]], capacity: int) -> int:
    """Choices found in a cache that keeps what was used last; of one token's, the lowest expert is put in last."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for experts in sets:
        hits += sum(expert in cache for expert in experts)
        for expert in sorted(experts, reverse=True):
            cache.pop(expert, None)
            cache[expert] = None
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


def load_over_segments(run: Run) -> Rows:
    rows: Rows = []
    first, segments = 0, []
    for prompts in run.segments:
        segments.append(range(first, first + len(prompts)))
        first += len(prompts)
    for layer, (experts, _) in run.layers.items():
        parts = [[p for p in routed(run, layer) if p.prompt_id in segment] for segment in segments]
        counts_SE = np.array([loads(run, layer, part) for part in parts if part], np.float64)
        share_SE = counts_SE / counts_SE.sum(1, keepdims=True)
        for e in range(experts):
            levels = (float(np.percentile(share_SE[:, e], percent)) for percent in (0, 5, 50, 95, 100))
            overall = float(counts_SE[:, e].sum() / counts_SE.sum())
            rows.append((run.run_id, layer, e, len(counts_SE), overall, *levels))
    return rows


def saliency_by_domain(run: Run) -> Rows:
    rows: Rows = []
    for layer, (experts, _) in run.layers.items():
        measured = [place for place in routed(run, layer) if layer in place.token.outputs]
        for domain in domains(measured):
            chosen: list[list[Any]] = [[] for _ in range(experts)]
            for token in (place.token for place in measured if place.domain == domain):
                for (expert, weight), output in zip(token.choices[layer], token.outputs[layer], strict=True):
                    chosen[expert].append((weight, *output))
            did = [saliency(of_expert) for of_expert in chosen]
            places = ranks([row[4] for row in did])
            rows += [
                (run.run_id, domain, layer, e, did[e][0], did[e][2], did[e][3], did[e][4], places[e])
                for e in range(experts)
            ]
    return rows


def outputs_by_rank(run: Run) -> Rows:
    rows: Rows = []
    for layer, (_, top_k) in run.layers.items():
        tokens = [place.token for place in routed(run, layer) if layer in place.token.outputs]
        known = [t for t in tokens if None not in [norm for norm, _ in t.outputs[layer]]]
        if not known:
            continue
        weight_TK = np.array([[weight for _, weight in t.choices[layer]] for t in known], np.float64)
        norm_TK = np.array([[norm for norm, _ in t.outputs[layer]] for t in known], np.float64)
        cosine_TK = np.array([[cosine for _, cosine in t.outputs[layer]] for t in known], np.float64)  # None: NaN
        larger_TK = (norm_TK[:, None, :] > norm_TK[:, :, None]).sum(2)
        equal_TK = (norm_TK[:, None, :] == norm_TK[:, :, None]).sum(2)
        place_TK = larger_TK + (equal_TK + 1) / 2
        alone_TK = weight_TK * norm_TK / np.linalg.norm(weight_TK * norm_TK, axis=1, keepdims=True)
        numbers = (weight_TK, norm_TK, place_TK, cosine_TK, alone_TK)
        for choice in range(top_k):
            means = [float(np.nanmean(array_TK[:, choice])) for array_TK in numbers]
            rows.append((run.run_id, layer, choice, len(known), *means))
    return rows


LITERATURE: dict[str, Callable[[Run], Rows]] = {
    "outputs_by_rank": outputs_by_rank,
    "saliency_by_domain": saliency_by_domain,
    "load_violation": load_violation,
    "coverage_curve": coverage_curve,
    "top_expert_share": top_expert_share,
    "prompt_against_generated": prompt_against_generated,
    "next_layer_recall": next_layer_recall,
    "domain_divergence": domain_divergence,
    "standing_committee": standing_committee,
    "choice_information": choice_information,
    "position_information": position_information,
    "first_choice_information": first_choice_information,
    "expert_token_association": expert_token_association,
    "load_by_position": load_by_position,
    "expert_reuse": expert_reuse,
    "expert_cache": expert_cache,
    "load_over_segments": load_over_segments,
}
ASKED: dict[str, dict[str, int | float | bool | str]] = {
    "next_layer_recall": {"guesses": 2},
    "standing_committee": {"min_share": 0.6},
    "expert_token_association": {"most": 1000},
    "load_by_position": {"width": 4},
}
"""The values that the functions above are for, where they are not the defaults."""
