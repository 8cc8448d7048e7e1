"""The parts that all trace formats share: the input files, their model, and the sequences read from them.

A format's reader takes `TraceFile`s and a `TraceModel` and yields `Sequence`s as in the files, or `Counts` for a format
of only counts. Their content is checked in one place, `moewh.ingest.traces.check`. Shapes: T tokens of a sequence, R of
them with routing, L layers (all hidden layers, or only the MoE layers), K experts per token, E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moewh.warehouse.errors import MoewhError

Array = npt.NDArray[Any]
_FORMATS = Path(__file__).resolve().parent / "formats"


@dataclass(frozen=True)
class TraceModel:
    """A model as its configuration describes it; nothing here comes from a trace."""

    title: str
    """Hub id or path, as given."""
    name: str
    """Its last part."""
    config_sha256: str
    num_hidden_layers: int
    layers: tuple[int, ...]
    """The MoE layers."""
    experts_L: npt.NDArray[np.int64]
    """Experts of each MoE layer."""
    top_k: int
    vocabulary: int | None
    """Entries of the vocabulary; None if the configuration does not state it."""
    run: dict[str, Any] = field(default_factory=dict)
    """Columns of `runs`."""
    layer_rows: list[dict[str, Any]] = field(default_factory=list)
    expert_rows: list[dict[str, Any]] = field(default_factory=list)

    def indices(self, width: int, where: str) -> list[int]:
        """Return the index of each MoE layer on an axis of `width` layers: all hidden layers, or only the MoE layers.

        Raises MoewhError for another width.
        """
        if width == self.num_hidden_layers:
            return list(self.layers)
        if width == len(self.layers):
            return list(range(width))
        raise MoewhError(
            f"{where}: has {width} layers, but {self.name} has {self.num_hidden_layers} layers, {len(self.layers)} of "
            "them with experts. Check --model."
        )

    def numbered(self, names: Iterable[int], where: str) -> list[int]:
        """Return the names of the MoE layers in order, given layers named by number, from 0 or from 1.

        Raises MoewhError for any other set.
        """
        given = sorted(set(names))
        if given in (list(self.layers), [layer + 1 for layer in self.layers]):
            return given
        if not given:
            raise MoewhError(
                f"{where}: nothing in the trace has the name of a layer. Check FORMAT, and give all files."
            )
        raise MoewhError(
            f"{where}: has the layers {_listed(given)}, but {self.name} has experts in the layers "
            f"{_listed(self.layers)} (from 0). Check --model, and that all files of the trace are given."
        )


@dataclass(frozen=True)
class TraceFile:
    """One input file."""

    path: Path
    name: str
    """As the user wrote it, for messages."""
    most_values: int
    """Most numbers in one array, as many as a segment takes with dense layers; larger arrays are refused unread."""

    def error(self, what: str) -> MoewhError:
        """Return an error to raise, with the file's name in front unless it is already there."""
        return MoewhError(what if what.startswith(self.name) else f"{self.name}: {what}")


@dataclass(frozen=True)
class Sequence:
    """One sequence as in a trace, which becomes a prompt."""

    where: str
    """File and position, for messages."""
    expert_ids_RLK: Array
    """Logical expert indices. A row of K zeros (if K > 1) or of K times -1 was not captured."""
    weights_RLK: Array | None = None
    """The factors of the experts' outputs; None if they were not recorded."""
    ordered: bool = False
    """For a trace without weights: whether a row's experts are in rank order."""
    first: int = 0
    """Position of the first row with routing."""
    tokens: int | None = None
    """T; None if it follows from the token ids or the rows."""
    vocab_ids_T: Array | None = None
    """Token ids, -1 where one is unknown; None if all are."""
    context_T: Array | None = None
    """Which tokens attend to each other, where not all of them do."""
    generated_from: int | None = None
    """Position of the first token that the model generated."""
    text: str | None = None
    domain: str | None = None
    source: str | None = None
    metadata: dict[str, Any] | None = None
    served: str | None = None
    """What the server calls the model that answered: the same in all of an import."""
    answer: str | None = None
    """The server's own id of the answer: one that comes again with the same content is the same answer."""


@dataclass(frozen=True)
class Counts:
    """The load of a model's experts in one file, without any rows."""

    where: str
    tokens_LE: Array
    source: str
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True)
class Format:
    """One format: how its files are read, and its messages."""

    read: Callable[[list[TraceFile], TraceModel], Iterator[Sequence]] | None = None
    """Yields the sequences, in order. Raises `TraceFile.error` for data that it cannot read."""
    read_counts: Callable[[list[TraceFile], TraceModel], Iterator[Counts]] | None = None
    """The reader of a format with only counts."""


def each(read: Callable[[TraceFile, TraceModel], Iterator[Sequence]]) -> Format:
    """Return the format whose files are read one by one."""

    def read_all(files: list[TraceFile], model: TraceModel) -> Iterator[Sequence]:
        for file in files:
            yield from read(file, model)

    return Format(read_all)


def each_rank(read: Callable[[TraceFile, TraceModel], Iterator[Sequence]]) -> Format:
    """Return the format whose files come from the processes of one program, which may record the same tokens.

    It raises the file's error for a file with the same tokens and experts as another.
    """

    def read_all(files: list[TraceFile], model: TraceModel) -> Iterator[Sequence]:
        digests: dict[bytes, str] = {}
        for file in files:
            digest, recorded = hashlib.sha256(), False
            for sequence in read(file, model):
                for array in (sequence.vocab_ids_T, sequence.expert_ids_RLK):
                    digest.update(b"" if array is None else array.astype(np.int64).tobytes())
                recorded = True
                yield sequence
            if recorded and (first := digests.setdefault(digest.digest(), file.name)) is not file.name:
                raise file.error(f"holds the tokens of {first} again: both ranks had the same input. Leave one out.")

    return Format(read_all)


def format_names() -> list[str]:
    """Return the names of all formats, from the files of `formats/`."""
    return sorted(path.stem.replace("_", "-") for path in _FORMATS.glob("[!_]*.py"))


def find_format(name: str) -> Format:
    """Return a format by its name."""
    found: Format = import_module(f"moewh.ingest.traces.formats.{name.replace('-', '_')}").FORMAT
    return found


def start_of(rows: int, tokens: int, where: str, most: int) -> int:
    """Return the position of the first of R rows, which end before the last token, because that has none.

    `most` is the greatest position at which rows may begin. Raises MoewhError for too many or too few rows.
    """
    start = tokens - 1 - rows
    if not 0 <= start <= most:
        why = "Tokens are missing, or the rows belong to others." if start < 0 else "Rows are missing."
        raise MoewhError(f"{where}: has routing for {rows:,} tokens, but {tokens:,} tokens. {why}")
    return start


def served_by(answer: dict[str, Any]) -> str | None:
    """Return the name that an OpenAI answer has for its model."""
    name = answer.get("model")
    return name if isinstance(name, str) else None


def answer_id(answer: dict[str, Any], choice: int = 0) -> str | None:
    """Return the id of a choice of an answer, if the server gave the answer one."""
    name = answer.get("id")
    return f"{name}/{choice}" if isinstance(name, str) else None


def _listed(numbers: Iterable[int]) -> str:
    found = list(numbers)
    return ", ".join(map(str, found[:8])) + (f", … ({len(found)})" if len(found) > 8 else "")
