"""What the definitions of a geometry give for matrices: plain numpy, one expert after the other.

Nothing here reads the code that it is compared with: singular values come from `numpy.linalg.svd`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True)
class Expert:
    """One expert's matrices: gate and up [I, H], down [H, I]."""

    gate: Matrix | None
    up: Matrix
    down: Matrix

    @property
    def input(self) -> Matrix:
        """[gate; up]."""
        return self.up if self.gate is None else np.concatenate([self.gate, self.up])


def direct_experts(experts: list[Expert], router_EH: Matrix | None, rank: int) -> list[Row]:
    """The rows of expert_geometry, without layer."""
    rows = []
    for place, expert in enumerate(experts):
        _, read_values, read = np.linalg.svd(expert.input, full_matrices=False)
        written, write_values, _ = np.linalg.svd(expert.down, full_matrices=False)
        row_H = None if router_EH is None else router_EH[place]
        same_space = row_H is not None and len(row_H) == expert.up.shape[1]
        rows.append(
            {
                "expert": place,
                "router_norm": None if row_H is None else np.sqrt((row_H**2).sum()),
                "gate_norm": None if expert.gate is None else np.sqrt((expert.gate**2).sum()),
                "up_norm": np.sqrt((expert.up**2).sum()),
                "down_norm": np.sqrt((expert.down**2).sum()),
                "subspace_rank": rank,
                "input_share": _share(row_H, read[:rank].T) if same_space else None,
                "output_share": _share(row_H, written[:, :rank]) if same_space else None,
                "random_share": rank / expert.up.shape[1],
                "input_kurtosis": _kurtosis(expert.input),
                "output_kurtosis": _kurtosis(expert.down),
                "input_effective_rank": _effective_rank(read_values),
                "output_effective_rank": _effective_rank(write_values),
            }
        )
    return rows


def direct_router_pairs(router_EH: Matrix | None, experts: int) -> list[Row]:
    """The rows of router_similarity, without layer."""
    rows = []
    for a, b in combinations(range(experts), 2):
        cosine = None if router_EH is None else _cosine(router_EH[a], router_EH[b])
        rows.append({"expert_a": a, "expert_b": b, "cosine": cosine})
    return rows


def direct_expert_pairs(experts: list[Expert], rank: int) -> list[Row]:
    """The rows of expert_similarity, without layer: overlaps from the singular values of Uₐᵀ U_b, the cosines."""
    rows = []
    read_by = [np.linalg.svd(expert.input)[2][:rank].T for expert in experts]
    written_by = [np.linalg.svd(expert.down)[0][:, :rank] for expert in experts]
    for a, b in combinations(range(len(experts)), 2):
        both = experts[a], experts[b]
        read, written = (read_by[a], read_by[b]), (written_by[a], written_by[b])
        rows.append(
            {
                "expert_a": a,
                "expert_b": b,
                "input_cosine": _cosine(*(expert.input.ravel() for expert in both)),
                "output_cosine": _cosine(*(expert.down.ravel() for expert in both)),
                "input_overlap": np.mean(np.linalg.svd(read[0].T @ read[1])[1] ** 2),
                "output_overlap": np.mean(np.linalg.svd(written[0].T @ written[1])[1] ** 2),
                "random_overlap": rank / both[0].up.shape[1],
            }
        )
    return rows


def _share(row_H: Matrix | None, basis_Hr: Matrix) -> float:
    assert row_H is not None
    inside_H = basis_Hr @ (basis_Hr.T @ row_H)
    return float((inside_H**2).sum() / (row_H**2).sum())


def _kurtosis(matrix: Matrix) -> float:
    standard = (matrix - matrix.mean()) / matrix.std()
    return float((standard**4).mean())


def _effective_rank(values: Matrix) -> float:
    p = values / values.sum()
    return float(np.prod(p ** (-p)))


def _cosine(a: Matrix, b: Matrix) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
