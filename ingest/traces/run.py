"""One import from end to end: files of a trace and a model's configuration in, a run's committed segments out.

In order: hash the files, read the configuration, look for an existing run, read and check the whole trace into the
spool, begin the run, commit the missing segments. Nothing is committed before the whole trace has been checked. Killed
and run again, the same command completes the run; a complete one is left alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moewh.ingest.identity import has_planned_segments, require_same
from moewh.ingest.model.architecture import require_named
from moewh.ingest.model.tokenizer import TokenizerSource, load_tokenizer
from moewh.ingest.options import SEGMENT_ROWS
from moewh.ingest.prompts.canonical import CANONICAL
from moewh.ingest.prompts.digest import PromptDigest
from moewh.ingest.prompts.tokenise import tokenizer_sha256
from moewh.ingest.prompts.vocabulary import known_entries, vocabulary_texts
from moewh.ingest.record import Identity, RunRecord, default_run_id
from moewh.ingest.routing import NO_ENTRY, NO_ROUTE, RoutingBuffer, TokenisedSegment, TokenTexts
from moewh.ingest.traces.check import Checked, check_counts, check_sequence
from moewh.ingest.traces.files import trace_paths
from moewh.ingest.traces.model import read_model
from moewh.ingest.traces.spool import Labels, Spool
from moewh.ingest.traces.trace import Format, Sequence, TraceFile, TraceModel, find_format
from moewh.ingest.write.run_files import write_run
from moewh.ingest.write.segment import Committed, write_segment
from moewh.warehouse.errors import MoewhError, brief
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.manifest import file_sha256
from moewh.warehouse.files.names import SEGMENT_FOLDER, check_run_id
from moewh.warehouse.sealing.seal import seal, unseal
from moewh.warehouse.views.publishing import publish

_PROMPTS_AT_ONCE = 4_096
"""Prompts that are digested together."""


@dataclass(frozen=True)
class ImportOptions:
    """The options of an import."""

    format: str
    files: tuple[str, ...]
    model: str
    revision: str | None = None
    tokenizer: str | None = None
    run_id: str | None = None
    domain: str | None = None
    segment_rows: int = SEGMENT_ROWS
    trust_remote_code: bool = False


@dataclass
class Imported:
    """What an import did, for its closing line."""

    run_id: str
    segments: int
    written: list[Committed] = field(default_factory=list)
    routes: int = 0
    """Routes of tokens at layers that the trace has."""
    missing: int = 0
    """Routes that were not captured."""
    load: int = 0
    """For a trace of only counts, their sum."""


def import_trace(
    options: ImportOptions, layout: Layout, segment_done: Callable[[int, int], None] = lambda *_: None
) -> Imported:
    """Import a trace as a run. `segment_done` is called with (number, segments) after each segment.

    Raises UsageError or MoewhError. Earlier commits stay; a trace with any fault leaves nothing.
    """
    paths = trace_paths(options.files)
    found = find_format(options.format)
    model = read_model(options.model, options.revision, options.trust_remote_code)
    most_values = options.segment_rows * model.num_hidden_layers // len(model.layers)  # dense layers may be included
    files = [TraceFile(path, str(path), most_values) for path in paths]
    tokens = _Tokens.of(options, model)
    identity = _identify(options, files, model, tokens)
    layout.require_one_disk(
        options.run_id if options.run_id and not has_planned_segments(layout, options.run_id) else None
    )
    began = require_same(layout, identity)
    if began and has_planned_segments(layout, identity.run_id):
        seal(layout, identity.run_id)  # a kill may have happened just before
        return Imported(identity.run_id, len(list(layout.segments(identity.run_id).glob(f"{SEGMENT_FOLDER}*"))))
    work = _Import(options, layout, files, model, tokens, identity, began, segment_done)
    return work.counts(found) if found.read_counts is not None else work.sequences(found)


@dataclass(frozen=True)
class _Tokens:
    """The tokenizer, if one is given."""

    sha256: str | None
    vocabulary: pa.Array | None
    """[V] texts; None if unknown."""
    labels: Labels
    entries: int | None = None
    """Ids that the tokenizer has."""

    def require_known(self, checked: Checked) -> None:
        """Raise MoewhError for a token id that the tokenizer does not have: it belongs to another model."""
        ids_T = checked.vocab_id_T
        if self.entries is not None and ids_T is not None and int(ids_T.max(initial=0)) >= self.entries:
            position = int(np.argmax(ids_T >= self.entries))
            raise MoewhError(
                f"{checked.sequence.where}, token {position}: the tokenizer has no token {ids_T[position]} "
                f"({self.entries:,} entries). Name the model's own with --tokenizer, or leave it out."
            )

    @classmethod
    def of(cls, options: ImportOptions, model: TraceModel) -> _Tokens:
        if options.tokenizer is None:
            return cls(None, None, Labels(options.domain))
        require_named(options.tokenizer)
        revision = None if Path(options.tokenizer).exists() else "main"
        source = TokenizerSource(options.tokenizer, options.tokenizer, revision, options.trust_remote_code, named=True)
        tokenizer = load_tokenizer(source)

        def decode(ids: npt.NDArray[np.int32]) -> str:
            return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))

        special_ids = np.array(sorted(tokenizer.all_special_ids), np.int32)
        texts = vocabulary_texts(tokenizer, model.vocabulary)
        return cls(
            tokenizer_sha256(tokenizer), texts, Labels(options.domain, decode, special_ids), known_entries(tokenizer)
        )


@dataclass
class _Import:
    """One command's import."""

    options: ImportOptions
    layout: Layout
    files: list[TraceFile]
    model: TraceModel
    tokens: _Tokens
    identity: Identity
    began: bool
    """Whether the run's own files exist."""
    segment_done: Callable[[int, int], None]

    def sequences(self, found: Format) -> Imported:
        """Import a format of sequences, through the spool."""
        assert found.read is not None
        done = Imported(self.identity.run_id, 0)
        try:
            with self.layout.writing(), self.layout.staged("import") as folder:
                spool, columns = self._read(found.read(self.files, self.model), folder, done)
                self._begin(columns, spool.segments)
                for number in filter(self._wanted, range(spool.segments)):
                    done.written.append(self._write(number, *spool.segment(number), spool.segments))
            seal(self.layout, self.identity.run_id)
        finally:
            self.layout.remove_empty()
        return done

    def _read(self, sequences: Iterator[Sequence], folder: Path, done: Imported) -> tuple[Spool, dict[str, Any]]:
        """Check the whole trace into a spool; return the spool, and the columns of `runs` that describe all of it."""
        spool = Spool(folder, self.model, self.options.segment_rows, self.tokens.labels, self._wanted)
        digests, distinct = _Digests(), _DistinctAnswers()
        for sequence in sequences:
            distinct.require(sequence)
            checked = check_sequence(sequence, self.model, self.options.segment_rows)
            self.tokens.require_known(checked)
            digests.update(spool.add(checked), checked)
            absent = int((checked.expert_ids_RLK[:, :, 0] == NO_ROUTE).sum())
            done.missing += absent
            done.routes += checked.expert_ids_RLK.shape[0] * checked.expert_ids_RLK.shape[1] - absent
        spool.close()
        if not done.routes:
            raise MoewhError(
                f"{self.files[0].name}: {'no row was captured' if done.missing else 'there are no sequences'}. Check "
                "that the server was started with the option that returns routed experts."
            )
        done.segments = spool.segments
        return spool, digests.columns()

    def counts(self, found: Format) -> Imported:
        """Import a format of only counts: one segment without tokens, whose load is the sum of all files."""
        assert found.read_counts is not None
        rows: list[dict[str, Any]] = []
        buffer = RoutingBuffer(0)
        files: dict[bytes, str] = {}
        for counts in found.read_counts(self.files, self.model):
            if (first := files.setdefault(counts.tokens_LE.tobytes(), counts.where)) is not counts.where:
                raise MoewhError(f"{counts.where}: holds the counts of {first} again. Leave one out.")
            for layer, tokens_E in check_counts(counts, self.model).items():
                buffer.counts[layer] = buffer.counts.get(layer, 0) + tokens_E
            label = {"form": "text", "domain": self.options.domain, "source": counts.source}
            rows.append({**label, **_metadata_json({"counts_alone": True, **(counts.metadata or {})})})
        if missing := [layer for layer, tokens_E in buffer.counts.items() if not tokens_E.any()]:
            raise MoewhError(
                f"{self.files[0].name}: every count of layer {missing[0]} is 0, so it was not recorded. Give the files "
                "of all ranks."
            )
        prompts = pa.Table.from_pylist(rows, CANONICAL)
        digest = PromptDigest()
        for batch in prompts.to_batches():
            digest.update(batch)
        self._begin({"prompts_sha256": digest.hexdigest(), "tokens_key": None}, 1)
        load = int(sum(int(tokens_E.sum()) for tokens_E in buffer.counts.values()))
        committed = self._write(0, _without_tokens(prompts), buffer, 1)
        seal(self.layout, self.identity.run_id)
        return Imported(self.identity.run_id, 1, [committed], load=load)

    def _wanted(self, number: int) -> bool:
        return not self.layout.segment(self.identity.run_id, number).is_dir()

    def _begin(self, columns: dict[str, Any], segments: int) -> None:
        """Create the warehouse, the run's own files and the database, now that the trace has been checked."""
        self.layout.create()
        self.layout.sweep()
        unseal(self.layout, self.identity.run_id)  # a segment of a sealed run may have been removed
        if not self.began:
            origin = {"origin": "imported", "origin_format": self.options.format}
            run = {**self.model.run, **origin, **columns, "segments_planned": segments}
            model, texts = self.model, self.tokens.vocabulary
            write_run(self.layout, RunRecord(self.identity, run, model.layer_rows, model.expert_rows, texts))
        publish(self.layout)

    def _write(self, number: int, segment: TokenisedSegment, routing: RoutingBuffer, segments: int) -> Committed:
        last = number == segments - 1
        committed = write_segment(
            self.layout,
            self.identity,
            number,
            segment,
            routing,
            texts=TokenTexts(self.tokens.vocabulary),
            last=last,
        )
        self.segment_done(number, segments)
        return committed


class _DistinctAnswers:
    """The answers of an import, each once: files that were concatenated or overlap hold some twice."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def require(self, sequence: Sequence) -> None:
        """Raise MoewhError for an answer with the id and the content of an earlier one."""
        if sequence.answer is None:
            return
        digest = hashlib.blake2b(sequence.answer.encode(errors="surrogatepass"), digest_size=16)
        for array in (sequence.vocab_ids_T, sequence.expert_ids_RLK):
            digest.update(b"" if array is None else array.tobytes())
        if digest.digest() in self._seen:
            raise MoewhError(
                f"{sequence.where}: is answer {brief(sequence.answer)} again, whose rows would count twice. Leave it "
                "out."
            )
        self._seen.add(digest.digest())


class _Digests:
    """The columns of `runs` that describe all prompts and tokens."""

    def __init__(self) -> None:
        self._prompts, self._tokens = PromptDigest(), hashlib.sha256()
        self._waiting: list[dict[str, Any]] = []
        self._known = True

    def update(self, row: dict[str, Any], checked: Checked) -> None:
        """Add the next sequence."""
        self._waiting.append({name: row[name] for name in CANONICAL.names})
        if len(self._waiting) == _PROMPTS_AT_ONCE:
            self._flush()
        ids = checked.vocab_id_T
        self._known = self._known and ids is not None and bool((ids != NO_ENTRY).all())
        if ids is not None:
            self._tokens.update(len(ids).to_bytes(8, "little") + ids.astype("<i4").tobytes())

    def columns(self) -> dict[str, Any]:
        """Return the digest of the prompts, and the key of runs with the same tokens: NULL if some are unknown."""
        self._flush()
        return {
            "prompts_sha256": self._prompts.hexdigest(),
            "tokens_key": self._tokens.hexdigest() if self._known else None,
        }

    def _flush(self) -> None:
        for batch in pa.Table.from_pylist(self._waiting, CANONICAL).to_batches():
            self._prompts.update(batch)
        self._waiting = []


def _identify(options: ImportOptions, files: list[TraceFile], model: TraceModel, tokens: _Tokens) -> Identity:
    """Return the identity of the run: the trace's bytes, the configuration, and the labels of its rows."""
    digests = [file_sha256(file.path) for file in files]
    for number, digest in enumerate(digests):
        if (first := digests.index(digest)) < number:
            raise files[number].error(f"is a copy of {files[first].name}, whose rows would count twice. Leave it out.")
    shaping = {
        "import": options.format,
        "files": [[file.path.name, digest] for file, digest in zip(files, digests, strict=True)],
        "model": model.title,
        "config_sha256": model.config_sha256,
        "tokenizer_sha256": tokens.sha256,
        "domain": options.domain,
        "segment_rows": options.segment_rows,
    }
    return Identity(shaping, check_run_id(options.run_id or default_run_id(model.name, shaping)))


def _metadata_json(metadata: dict[str, Any]) -> dict[str, str]:
    return {"metadata": json.dumps(metadata, sort_keys=True)}


def _without_tokens(prompts: pa.Table) -> TokenisedSegment:
    """Return a segment of prompts that have no tokens: the files of counts."""
    nothing = np.zeros(0, np.int64)
    small = np.zeros(0, np.int32)
    return TokenisedSegment(
        prompts=prompts,
        text_P=[None] * len(prompts),
        first_prompt=0,
        status_P=["ok"] * len(prompts),
        num_tokens_P=np.zeros(len(prompts), np.int64),
        prompt_T=nothing,
        position_T=small,
        context_T=small,
        vocab_id_T=small,
        special_T=np.zeros(0, np.bool_),
        start_C=nothing,
        length_C=nothing,
    )
