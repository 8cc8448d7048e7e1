"""Resolve --prompts and --dataset: files, folders, patterns, standard input and data sets, each with its format.

Everything is looked up before anything is read, so that a wrong name costs nothing.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pyarrow as pa

from moewh.ingest import demo
from moewh.ingest.options import DEMO, STDIN, IngestOptions
from moewh.ingest.prompts.canonical import BATCH_ROWS, PromptFile
from moewh.ingest.prompts.hub import HUB, Dataset, HubName, open_dataset, pin
from moewh.ingest.prompts.plain_bytes import COMPRESSIONS
from moewh.ingest.prompts.readers import SUFFIXES, read_prompts
from moewh.ingest.prompts.tables import read_tables
from moewh.warehouse.errors import UsageError, require_utf8
from moewh.warehouse.files.folders import files_below, is_left_by_others

_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files that the `datasets` library stores beside the data."""
_STATE = "state.json"
"""In a folder of `save_to_disk`: the names of its data files, in order."""
_CACHE = re.compile(r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow")
"""Results that the `datasets` library keeps beside the data: the same records again, or only some of them."""
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_PAPERS = {"readme", "license", "licence", "notice", "changelog", "requirements", "citation"}
"""Names of .txt files often found beside the data."""


@dataclass(frozen=True)
class Input:
    """One file, wherever it is, or one data set."""

    name: str
    """As the user wrote it, for messages."""
    source: str
    """The source of prompts that do not state their own."""
    key: tuple[object, ...] | None
    """A key that changes whenever its bytes do; None if there is none."""
    batches: Callable[[Path, IngestOptions], Iterator[pa.RecordBatch]]
    """(scratch folder, options) → canonical batches"""
    pinned: str | None = None
    """Its data set on the Hub, with the commit."""


@dataclass
class Found:
    """All inputs, in the order given."""

    inputs: list[Input] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Files in folders and patterns that are not prompts, for a note."""


def find_inputs(options: IngestOptions) -> Found:
    """Look up every input in the options. Raises UsageError or MoewhError for a missing one."""
    if options.prompts.count(STDIN) > 1:
        raise UsageError("standard input (-) can be read only once. Name it once among --prompts.")
    found = Found()
    for name in options.prompts:
        if not name:
            raise UsageError(
                "a name given to --prompts is empty. Is a variable unset? Give a file, or . for this folder."
            )
        if name == STDIN:
            found.inputs.append(_standard_input(options.prompts_format or "jsonl"))
        elif name.startswith(HUB):
            _find_on_hub(name, options, found)
        else:
            _find_local(str(demo.PROMPTS) if name == DEMO else name, options, found)
    _require_distinct(found)
    if options.dataset is not None:
        dataset = open_dataset(options.dataset, options.config, options.split)
        found.inputs.append(_dataset_input(dataset, options))
    return found


# ------------------------------------------------------------------------------------------ files


def _require_distinct(found: Found) -> None:
    """Raise UsageError for a file that is given twice: each of its prompts would be counted twice."""
    files: dict[object, str] = {}
    for given in found.inputs:
        file = given.key[0] if given.key else None
        if file is not None and files.setdefault(file, given.name) is not given.name:
            first = files[file]
            raise UsageError(
                f"{given.name} is given twice. Name it once."
                if first == given.name
                else f"{given.name} is the same file as {first}. Name it once."
            )


def _find_local(name: str, options: IngestOptions, found: Found) -> None:
    """Add a file, the files in a folder, or those that a pattern matches."""
    path = Path(require_utf8(name))
    try:
        if path.is_file():
            found.inputs.append(_local_file(path, name, path.name, _format(name, options.prompts_format)))
        elif path.is_dir():
            _add_prompt_files(name, path, files_below(path), options, found)
        elif path.exists():
            raise UsageError(f"{name} is not a regular file. Pipe it in: `moewh ingest --prompts - < {name}`")
        elif glob.has_magic(name):
            root = Path(*_before_wildcard(path.parts))
            _require_readable(path.parts)
            matches = sorted(Path(match) for match in glob.glob(name, recursive=True))  # noqa: PTH207 - absolute patterns
            files = [file for match in matches for file in (files_below(match) if match.is_dir() else [match])]
            _add_prompt_files(name, root, sorted(set(files)), options, found)
        else:
            more = ""
            if "://" in name:
                more = f" Over the network, only {HUB}… is read: download the file first."
            elif len(name.split()) > 1:
                more = " A text goes into a file, or in Python into a list."
            raise UsageError(f"there is no prompts file {name}. Check the path given to --prompts.{more}")
    except OSError as error:
        raise UsageError(f"{error.filename or name}: cannot be read: {error.strerror or error}.") from error


def _before_wildcard(parts: tuple[str, ...]) -> tuple[str, ...]:
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return parts[:first]


def _require_readable(parts: tuple[str, ...]) -> None:
    """Raise OSError for a folder in a pattern's way that cannot be read: `glob` leaves it out without a word."""
    for index in range(len(_before_wildcard(parts)), len(parts)):
        way = str(Path(*parts[:index], "")) + os.sep
        for folder in glob.glob(way, recursive=True):  # noqa: PTH207 - absolute patterns
            if glob.has_magic(parts[index]):
                os.scandir(folder).close()
            else:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    Path(folder, parts[index]).lstat()


def _as_saved(good: list[Path], states: list[Path]) -> list[Path]:
    """Of the Arrow files in a folder of `save_to_disk`, keep those that its state names, in its order.

    Raises UsageError if one of them is missing.
    """
    for state in states:
        try:
            saved = [state.with_name(one["filename"]) for one in json.loads(state.read_bytes())["_data_files"]]
        except (ValueError, KeyError, TypeError):
            continue  # a file of that name that `datasets` did not write
        if missing := [path for path in saved if path not in good]:
            raise UsageError(f"{state} names {missing[0].name}, which is not there. Get the whole data set again.")
        index = min(map(good.index, saved), default=0)
        good = [path for path in good if path.parent != state.parent or path.suffix != ".arrow"]
        good[index:index] = saved
    return good


def _is_hidden(parts: tuple[str, ...]) -> bool:
    return any(map(is_left_by_others, parts))


def _add_prompt_files(name: str, root: Path, files: list[Path], options: IngestOptions, found: Found) -> None:
    """Add those files that are prompts. Raises UsageError if there are none."""
    good = [path for path in files if path.is_file() and _is_prompts(path.name, options.prompts_format)]
    good = _as_saved(good, [path for path in files if path.name == _STATE])
    found.skipped += [str(path) for path in files if path not in set(good)]
    if not good:
        what = "matches no file" if not files else f"has no file with prompts, only {', '.join(map(str, files[:3]))}"
        raise UsageError(f"{name} {what}. Use {', '.join(SUFFIXES)} or give --prompts-format.")
    for path in good:
        source = path.relative_to(root).as_posix()
        found.inputs.append(_local_file(path, str(path), source, _format(str(path), options.prompts_format)))


def _is_prompts(name: str, given: str | None) -> bool:
    """Return whether a file found in a folder or pattern is a prompts file, judged by its name."""
    if _CACHE.fullmatch(name):
        return False
    if given is not None:
        return True
    kind = _known_format(name)
    papers = kind == "txt" and name.split(".", maxsplit=1)[0].lower() in _PAPERS
    return kind is not None and not papers and name not in _DESCRIPTIONS


def _format(name: str, given: str | None) -> str:
    kind = given or _known_format(name)
    if kind is None:
        raise UsageError(
            f"the format of {name} is not known by its suffix. Use {', '.join(SUFFIXES)} "
            f"(each also with {', '.join(COMPRESSIONS)}) or give --prompts-format."
        )
    return kind


def _known_format(name: str) -> str | None:
    path = PurePosixPath(name.lower())
    return SUFFIXES.get(path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix)


def _local_file(path: Path, name: str, source: str, kind: str) -> Input:
    stat = path.stat()
    require_utf8(name)

    def batches(scratch: Path, options: IngestOptions) -> Iterator[pa.RecordBatch]:
        return read_prompts(prompt_file(path, kind, name, source, options), scratch)

    return Input(name, source, (str(path.resolve()), kind, stat.st_size, stat.st_mtime_ns), batches)


def _standard_input(kind: str) -> Input:
    def batches(scratch: Path, options: IngestOptions) -> Iterator[pa.RecordBatch]:
        path = scratch / "stdin"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield from read_prompts(prompt_file(path, kind, "standard input", STDIN, options), scratch)

    return Input(STDIN, STDIN, None, batches)


def prompt_file(path: Path, kind: str, name: str, source: str, options: IngestOptions) -> PromptFile:
    """Return one input, with the column names in the options, or the domain that a folder's `domain=…` gives it."""
    column, domain = options.domain_column, options.domain
    partition = re.search(rf"(?:^|/){re.escape(column)}=([^/]+)/", source)
    if domain is None and partition and partition[1] != _NO_PARTITION:
        column, domain = "domain", unquote(partition[1])
    given = options.prompts_format is not None
    return PromptFile(path, kind, name, source, options.text_column, column, domain, options.delimiter, given)


# ------------------------------------------------------------------------------------------ the Hub


def _find_on_hub(name: str, options: IngestOptions, found: Found) -> None:
    """Add a file on the Hub, or those in a folder or pattern there."""
    hub = pin(name.removeprefix(HUB))
    if _known_format(hub.path) and not glob.has_magic(hub.path):
        paths = [hub.path]
    else:
        paths = [path for path in hub.files() if not _is_hidden(PurePosixPath(path).parts)]
        good = [path for path in paths if _is_prompts(PurePosixPath(path).name, options.prompts_format)]
        found.skipped += [hub.at(path).pinned for path in paths if path not in good]
        if not good:
            raise UsageError(f"{name} has no file with prompts. Use {', '.join(SUFFIXES)} or give --prompts-format.")
        paths = good
    found.inputs += [_hub_file(hub.at(path), _format(path, options.prompts_format)) for path in paths]


def _hub_file(hub: HubName, kind: str) -> Input:
    def batches(scratch: Path, options: IngestOptions) -> Iterator[pa.RecordBatch]:
        yield from read_prompts(prompt_file(hub.download(), kind, hub.pinned, hub.pinned, options), scratch)

    return Input(hub.pinned, hub.pinned, (hub.pinned, kind), batches, hub.at("").pinned)


def _dataset_input(dataset: Dataset, options: IngestOptions) -> Input:
    def batches(scratch: Path, options: IngestOptions) -> Iterator[pa.RecordBatch]:
        file = prompt_file(scratch, "arrow", dataset.name, dataset.source, options)
        return read_tables(dataset.tables(BATCH_ROWS), file)

    pinned = dataset.hub.pinned if dataset.hub else None
    key: tuple[object, ...] = (dataset.source, options.config, dataset.split)
    if dataset.hub is None:
        files = [(str(path.resolve()), path.stat()) for path in files_below(Path(dataset.name))]
        key += tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in files)
    return Input(dataset.name, dataset.source, key, batches, pinned)
