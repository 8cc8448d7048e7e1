"""Repair: what is bad is moved to `quarantine/`, and the command that writes it again is reported.

Nothing is deleted. The zero-row files, which depend on no data, are rewritten at once.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files import schema
from moewh.warehouse.files.commit import locked, make_folder, move_away, require_renames, sync
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import QUARANTINE, RUN_FOLDER, is_run_id, is_segment_folder
from moewh.warehouse.sealing.seal import is_complete, kept_unsealed, require_readable, seal
from moewh.warehouse.views.publishing import publish

_OF_CODE = {"in_memory", "recorded_at"}
"""Options of a run that no command can write again."""
OptionWords = Callable[[dict[str, Any]], list[str]]
"""Turns the options that shape a run's rows (the column `options`) into the words of an ingest command."""


def quarantine(layout: Layout, folders: Iterable[Path]) -> dict[Path, Path]:
    """Move bad folders, and strays, to where no view reads them, each by one rename; return the new path of each.

    A run that loses a segment is unsealed first; one that loses its sealed counts is sealed again from its segments.
    `warehouse.duckdb` is rewritten. Raises MoewhError if the disk cannot be written, or if a folder of moewh is a
    broken link; then nothing was moved.
    """
    moved = {}
    bad = sorted(set(folders))
    layout.committed_links()  # a link to a disk that is not mounted is refused before anything is moved
    require_renames(layout.root, [folder.parent for folder in bad])
    with layout.writing():
        for folder in bad:
            if not _is_there(folder):
                continue
            target = _free_path(layout.root / QUARANTINE / folder.relative_to(layout.root))
            make_folder(target.parent)
            with _segments_exposed(layout, folder), locked(layout.runs):
                if move_away(folder, target):
                    sync(target.parent)
                    moved[folder] = target
    layout.create()
    require_readable(layout)
    for folder in moved:
        if (run_id := run_of(layout, folder)) is not None and folder == layout.sealed(run_id):
            seal(layout, run_id)
    publish(layout)
    return moved


@contextmanager
def _segments_exposed(layout: Layout, folder: Path) -> Iterator[None]:
    """Let views read a run's segments one by one while one of them, or its sealed counts, is moved away."""
    run_id = run_of(layout, folder)
    if run_id is None:
        yield
        return
    of_segment = folder.parent == layout.segments(run_id) and is_segment_folder(folder.name)
    if folder == layout.sealed(run_id):
        layout.link_unsealed(run_id)
    with kept_unsealed(layout, run_id) if of_segment or folder == layout.segments(run_id) else nullcontext():
        yield


def remedy(layout: Layout, folder: Path, option_words: OptionWords) -> str | None:
    """Return the command that writes a bad folder again; None for a stray, and for a folder that belongs to no run."""
    run_id = run_of(layout, folder)
    if run_id is None or _is_stray(layout, run_id, folder):
        return None
    if folder == layout.unsealed(run_id):
        return f"moewh refresh {layout.option}"
    if folder == layout.sealed(run_id) and _has_segments(layout, run_id):
        return f"moewh seal {run_id} {layout.option}"
    measured = folder.is_relative_to(layout.geometry(run_id))
    return geometry_command(layout, run_id) if measured else restore_command(layout, run_id, option_words)


def _has_segments(layout: Layout, run_id: str) -> bool:
    """Return whether all segments of a run are there, so that its counts can be merged again."""
    import pyarrow as pa

    try:
        return is_complete(layout, run_id)
    except (OSError, pa.ArrowException, LookupError, MoewhError):
        return False  # the last one is damaged


def _is_stray(layout: Layout, run_id: str, path: Path) -> bool:
    """Return whether a path is a copy or a file among the folders of a run, which is sound without it."""
    committed = (layout.run(run_id), layout.sealed(run_id), layout.geometry(run_id))
    if path.parent == layout.segments(run_id):
        return not is_segment_folder(path.name)
    return path.parent in committed or path.parent.parent == layout.segments(run_id)


def geometry_command(layout: Layout, run_id: str) -> str:
    """Return the command that measures the weights of a run's model again."""
    row = _run_row(layout, run_id)
    if row is None:
        return f"`moewh geometry --run-id {run_id}` with its model"
    words = ["moewh", "geometry", *_model_words(row), "--run-id", run_id]
    if (rank := geometry_rank(layout, run_id)) is not None:
        words += ["--rank", str(rank)]
    return f"{shlex.join(words)} {layout.option}"


def geometry_rank(layout: Layout, run_id: str) -> int | None:
    """Return the rank of a run's geometry, which may be in `quarantine/`; None if it cannot be read."""
    import pyarrow as pa

    from moewh.warehouse.files.tables import read_rows

    for root in (layout, Layout(layout.root / QUARANTINE)):
        path = root.geometry(run_id) / schema.EXPERT_GEOMETRY.file
        try:
            ranks = read_rows(path, ["subspace_rank"]).column(0)
            return int(ranks.drop_null()[0].as_py())
        except (OSError, pa.ArrowException, LookupError):
            continue
    return None


def restore_command(layout: Layout, run_id: str, option_words: OptionWords) -> str:
    """Return the ingest command that writes a run's missing segments again, as far as the run's row records it.

    Only the digest of the prompts is known.
    """
    row = _run_row(layout, run_id)
    if row is None:
        return f"the `moewh ingest` or `moewh import` command that began run {run_id}"
    options = json.loads(row["options"])
    if _OF_CODE & options.keys():
        return f"`moewh runs --delete {run_id} {layout.option}`, then the Python code that wrote run {run_id}"
    if "import" in options:
        return import_command(layout, run_id, row, options)
    words = ["moewh", "ingest", *_model_words(row), "--run-id", run_id, *option_words(options)]
    prompts = f"--prompts FILE (the prompts of sha256 {row['prompts_sha256'][:12]}…)"
    return f"{shlex.join(words)} {layout.option} {prompts}"


def import_command(layout: Layout, run_id: str, row: dict[str, Any], options: dict[str, Any]) -> str:
    """Return the import command that writes a run's missing segments again.

    Only the names and digests of its files and the digest of its tokenizer are known.
    """
    words = ["moewh", "import", options["import"], *(name for name, _ in options["files"]), "--model", row["model"]]
    given = {"--revision": row["revision"], "--run-id": run_id, "--domain": options["domain"]}
    words += [word for flag, value in given.items() if value is not None for word in (flag, value)]
    words += ["--segment-rows", str(options["segment_rows"])]
    tokenizer = " --tokenizer ID_OR_PATH" if options["tokenizer_sha256"] else ""
    return f"{shlex.join(words)} {layout.option}{tokenizer}"


def run_of(layout: Layout, folder: Path) -> str | None:
    """Return the run that a folder belongs to; None for zero-row files, copies such as `run_id=a (1)` and others."""
    if not folder.is_relative_to(layout.root) or folder.is_relative_to(layout.staging):
        return None
    below = folder.relative_to(layout.root).parts
    names = [part.removeprefix(RUN_FOLDER) for part in below if part.startswith(RUN_FOLDER)]
    return names[-1] if names and is_run_id(names[-1]) else None


def _model_words(row: dict[str, Any]) -> list[str]:
    """Return the options that name a run's model."""
    words = ["--model", row["model"]]
    from_hub = json.loads(row["options"]).get("weights_sha256") is None
    if row["revision"] is not None and (from_hub or row["model"] == "demo"):
        words += ["--revision", row["commit_hash"] or row["revision"]]
    return words


def _free_path(path: Path) -> Path:
    """Return `path`, with a number added if it exists."""
    number, free = 1, path
    while _is_there(free):
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


def _is_there(path: Path) -> bool:
    """Return whether anything is at `path`, a broken link included."""
    return path.exists() or path.is_symlink()


def _run_row(layout: Layout, run_id: str) -> dict[str, Any] | None:
    """Return the run's row, which may be in `quarantine/`; None if it cannot be read."""
    import pyarrow as pa

    from moewh.warehouse.files.tables import read_rows

    for root in (layout, Layout(layout.root / QUARANTINE)):
        try:
            row: dict[str, Any] = read_rows(root.run(run_id) / schema.RUNS.file).to_pylist()[0]
            json.loads(row["options"])
        except (OSError, pa.ArrowException, LookupError, ValueError, TypeError):
            continue  # damaged or gone: the command is then described in words
        return row
    return None
