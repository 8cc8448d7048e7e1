"""Measures of a layer's weights: norms, spectra, and the similarity of its router's rows and of its experts.

In: `LayerWeights` of one layer. Out: the columns of the three tables of a geometry, as arrays, with NaN for undefined
values. Everything is computed in float64, one expert at a time, on the given device. Singular values and vectors come
from the Gram matrix of the smaller side, so they are exact to about 1e-8 of the largest.

Shapes: E experts, H an expert's input size, I its inner size, r the rank of the subspaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moewh.ingest.geometry.matrices import LayerWeights
from moewh.warehouse.errors import MoewhError

Columns = dict[str, npt.NDArray[Any]]
Matrix = npt.NDArray[np.float64]
_UNDEFINED = float("nan")
_LEAST = 1e-6
"""A singular value of at most this times the largest counts as zero: the subspace of that rank is undefined."""
_BLOCK_BYTES = 16 << 20
"""Float64 bytes of the experts' weights multiplied with each other at once."""


@dataclass(frozen=True)
class LayerGeometry:
    """One layer's rows of the three tables, by column."""

    experts: Columns
    router_pairs: Columns
    expert_pairs: Columns


def layer_geometry(weights: LayerWeights, layer: int, experts: int, rank: int, device: torch.device) -> LayerGeometry:
    """Measure a layer of `experts` experts, including identity experts, which come last and have no weights.

    Raises MoewhError if a weight is not finite.
    """
    rows_EH = None if weights.router_EH is None else weights.router_EH.to(device, torch.float64)
    measured, inputs, outputs = _measure_experts(weights, layer, rank, rows_EH, device)
    random = rank / weights.hidden_size
    columns: Columns = {
        "layer": np.full(experts, layer, np.int32),
        "expert": np.arange(experts, dtype=np.int32),
        "router_norm": np.full(experts, _UNDEFINED) if rows_EH is None else rows_EH.norm(dim=1).cpu().numpy(),
        "subspace_rank": np.full(experts, rank, np.int32),
        "random_share": np.full(experts, random),
    }
    for name in measured[0]:
        columns[name] = np.array([row[name] for row in measured] + [_UNDEFINED] * (experts - len(measured)))
    no_rows = np.full((experts, experts), _UNDEFINED)
    router = {"cosine": no_rows if rows_EH is None else _cosines(rows_EH @ rows_EH.T)}
    similar = {
        "input_cosine": flattened_cosines(weights.input_parts, device),
        "output_cosine": flattened_cosines([weights.down], device),
        "input_overlap": subspace_overlaps(torch.stack(inputs)),
        "output_overlap": subspace_overlaps(torch.stack(outputs)),
        "random_overlap": np.full((experts, experts), random),
    }
    return LayerGeometry(columns, _pairs(layer, experts, router), _pairs(layer, experts, similar))


def singular_subspace(matrix_MN: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a float64 matrix's singular values, descending, and its top-`rank` right singular subspace.

    The subspace is given as orthonormal columns [N, rank], all NaN if the matrix has a lower rank.
    """
    M, N = matrix_MN.shape
    squares, vectors = torch.linalg.eigh(matrix_MN @ matrix_MN.T if M < N else matrix_MN.T @ matrix_MN)
    values = squares.clamp_min(0).sqrt().flip(0)
    if values[rank - 1] <= _LEAST * values[0]:
        return values, matrix_MN.new_full((N, rank), _UNDEFINED)
    top = vectors[:, -rank:].clone()  # not a view, which would keep all the others in memory
    return values, torch.linalg.qr(matrix_MN.T @ top).Q if M < N else top


def effective_rank(values: torch.Tensor) -> float:
    """Return exp(-Σ p ln p), where p is a singular value's share of their sum; NaN if all are zero.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007).
    """
    return float(torch.special.entr(values / values.sum()).sum().exp())


def energy_share(row_H: torch.Tensor, basis_Hr: torch.Tensor) -> float:
    """Return ‖P u‖² / ‖u‖², where P projects onto the span of the basis; NaN for a row of zeros."""
    return float((row_H @ basis_Hr).square().sum() / row_H.square().sum())


def kurtosis(matrix: torch.Tensor) -> float:
    """Return E[(w - μ)⁴] / E[(w - μ)²]² over all entries: 3 for a normal distribution; NaN if all are equal."""
    squares = (matrix - matrix.mean()).square()
    return float(squares.square().mean() / squares.mean().square())


def subspace_overlaps(bases_EHr: torch.Tensor) -> Matrix:
    """Return ‖Uₐᵀ U_b‖² / r for every pair of E subspaces [E, E]: the mean squared cosine of their principal angles.

    1 for the same subspace, 0 for orthogonal ones, r / H on average for random ones. Björck and Golub, "Numerical
    methods for computing angles between linear subspaces" (1973).
    """
    E, H, r = bases_EHr.shape
    all_HEr = bases_EHr.transpose(0, 1).reshape(H, E * r)
    overlaps = [(basis_Hr.T @ all_HEr).square().reshape(r, E, r).sum((0, 2)) / r for basis_Hr in bases_EHr]
    return torch.stack(overlaps).cpu().numpy()


def flattened_cosines(parts: list[list[torch.Tensor]], device: torch.device) -> Matrix:
    """Return the cosine of every pair of experts' weights [E, E], each flattened from all its matrices.

    `parts` holds lists of E matrices of one shape. Neurons are compared in order, so experts with the same neurons in
    another order are not similar. Summed over blocks of rows, to avoid copying a layer.
    """
    E = len(parts[0])
    gram_EE = torch.zeros(E, E, dtype=torch.float64, device=device)
    for matrices in parts:
        rows, columns = matrices[0].shape
        step = max(1, _BLOCK_BYTES // (8 * E * columns))
        for start in range(0, rows, step):
            stored = torch.stack([matrix[start : start + step] for matrix in matrices])
            block_EN = stored.to(device, torch.float64).flatten(1)
            gram_EE += block_EN @ block_EN.T
    return _cosines(gram_EE)


def _measure_experts(
    weights: LayerWeights, layer: int, rank: int, rows_EH: torch.Tensor | None, device: torch.device
) -> tuple[list[dict[str, float]], list[torch.Tensor], list[torch.Tensor]]:
    """Return each expert's measures by column, and its top-r input and output subspaces [H, r]."""
    measured: list[dict[str, float]] = []
    bases: dict[str, list[torch.Tensor]] = {"input": [], "output": []}
    for expert in range(len(weights.up)):
        row = _norms(weights, expert, device)
        # As matrices with H columns: those applied to the expert's input, and the transpose of its output matrix.
        for side, stored in (("input", weights.input(expert)), ("output", weights.down[expert].T)):
            part_MH = stored.to(device, torch.float64)
            if not part_MH.isfinite().all():
                raise MoewhError(f"layer {layer}: the weights of expert {expert} are not all finite numbers.")
            values, basis_Hr = singular_subspace(part_MH, rank)
            row[f"{side}_share"] = _UNDEFINED
            if rows_EH is not None and rows_EH.shape[1] == len(basis_Hr):
                row[f"{side}_share"] = energy_share(rows_EH[expert], basis_Hr)
            row[f"{side}_kurtosis"] = kurtosis(part_MH)
            row[f"{side}_effective_rank"] = effective_rank(values)
            bases[side].append(basis_Hr)
        measured.append(row)
    return measured, bases["input"], bases["output"]


def _norms(weights: LayerWeights, expert: int, device: torch.device) -> dict[str, float]:
    """Return the Frobenius norms of an expert's matrices."""
    parts = {"gate_norm": weights.gate, "up_norm": weights.up, "down_norm": weights.down}
    return {
        name: _UNDEFINED if part is None else float(part[expert].to(device, torch.float64).norm())
        for name, part in parts.items()
    }


def _cosines(gram_EE: torch.Tensor) -> Matrix:
    lengths_E = gram_EE.diagonal().sqrt()
    return (gram_EE / (lengths_E[:, None] * lengths_E)).cpu().numpy()


def _pairs(layer: int, experts: int, matrices: dict[str, Matrix]) -> Columns:
    """Return the pairs above the diagonal of matrices [E, E] as rows; NaN where a smaller matrix has no entry."""
    first, second = np.triu_indices(experts, 1)
    columns: Columns = {
        "layer": np.full(len(first), layer, np.int32),
        "expert_a": first.astype(np.int32),
        "expert_b": second.astype(np.int32),
    }
    for name, matrix_EE in matrices.items():
        whole = np.full((experts, experts), _UNDEFINED)
        whole[: len(matrix_EE), : len(matrix_EE)] = matrix_EE
        columns[name] = whole[first, second]
    return columns
