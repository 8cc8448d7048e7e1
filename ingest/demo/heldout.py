"""Held-out losses of a checkpoint, and of a bigram model as a baseline.

In: token streams of one domain (documents joined, `<|endoftext|>` before each). Out: mean loss in
nats per token. Both predict the same tokens of the same windows, and both see the real token before
each of them, so neither scores the first token of a window.

Shapes: W windows, S positions in a window, V vocabulary.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import OlmoeForCausalLM

Tokens = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

DISCOUNTS: tuple[float, ...] = (0.01, 0.02, *(round(0.05 * n, 2) for n in range(1, 20)))


def windows(stream: Tokens, length: int, most: int) -> Tokens:
    """Return at most `most` windows that do not overlap, spread evenly over the stream: [W, S]."""
    count = len(stream) // length
    chosen = np.linspace(0, count - 1, min(most, count)).astype(np.int64)
    return stream[: count * length].reshape(count, length)[chosen]


@torch.inference_mode()
def model_loss(model: OlmoeForCausalLM, windows_WS: Tokens, start: int) -> float:
    """Return the model's mean loss in nats per token; each window is a separate context after `start`."""
    total = 0.0
    for part in np.array_split(windows_WS, max(1, len(windows_WS) // 16)):
        targets_WS = torch.from_numpy(part)
        starts_W1 = torch.full((len(part), 1), start)
        inputs_WS = torch.cat([starts_W1, targets_WS[:, :-1]], dim=1)
        logits_WSV = model(input_ids=inputs_WS, use_cache=False).logits.float()
        scored = logits_WSV[:, 1:].flatten(0, 1), targets_WS[:, 1:].flatten()
        total += functional.cross_entropy(*scored, reduction="sum").item()
    return total / windows_WS[:, 1:].size


def bigram_loss(training: list[Tokens], windows_WS: Tokens, vocabulary: int) -> tuple[float, float]:
    """Return (mean loss in nats per token, discount) of a bigram model with interpolated absolute discounting.

    p(w | v) = max(c(v, w) - d, 0) / c(v) + d · n(v) / c(v) · q(w), with n(v) the number of different
    successors of v and q the add-one unigram model (Ney, Essen and Kneser 1994). The discount d is the
    best one on every tenth training document with counts from the other nine; the final counts are those
    of all training documents. Held-out tokens are used for neither.
    """
    tuning, fitting = training[::10], [d for n, d in enumerate(training) if n % 10]
    counts_VV = _counts(fitting, vocabulary)
    joined = np.concatenate(tuning)
    discount = min(DISCOUNTS, key=lambda d: _loss(counts_VV, d, joined[:-1], joined[1:]))
    before, after = windows_WS[:, :-1].ravel(), windows_WS[:, 1:].ravel()
    return _loss(_counts(training, vocabulary), discount, before, after), discount


def _counts(documents: list[Tokens], vocabulary: int) -> Floats:
    stream = np.concatenate(documents)
    pairs = stream[:-1] * vocabulary + stream[1:]
    return np.bincount(pairs, minlength=vocabulary**2).reshape(vocabulary, vocabulary).astype(np.float64)


def _loss(counts_VV: Floats, discount: float, before: Tokens, after: Tokens) -> float:
    unigram_V = (counts_VV.sum(axis=0) + 1) / (counts_VV.sum() + len(counts_VV))
    seen_V = counts_VV.sum(axis=1)
    successors_V = (counts_VV > 0).sum(axis=1)
    # For a token never seen as a context, the unigram model decides alone.
    total = np.maximum(seen_V[before], 1)
    backoff = np.where(seen_V[before] > 0, discount * successors_V[before] / total, 1.0)
    direct = np.maximum(counts_VV[before, after] - discount, 0) / total
    return float(-np.log(direct + backoff * unigram_V[after]).mean())
