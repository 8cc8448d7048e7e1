"""Data sets of the Hugging Face Hub: files with an hf:// name, and data sets that the `datasets` library streams.

Both are pinned to a commit before reading starts, and read from that commit however long the run takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from moewh.warehouse.errors import MoewhError, UsageError

HUB = "hf://datasets/"
_NAME = re.compile(r"(?P<repo>[^/@]+/[^/@]+|[^/@]+(?=@|$))(@(?P<revision>[^/]+))?(/(?P<path>.*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A data set on the Hub at one commit, and a file, folder or pattern in it."""

    repo: str
    commit: str
    path: str

    @property
    def pinned(self) -> str:
        """The name with the commit, which always refers to the same bytes."""
        return f"{HUB}{self.repo}@{self.commit}" + (f"/{self.path}" if self.path else "")

    def at(self, path: str) -> HubName:
        """Return another path of the same data set and commit."""
        return HubName(self.repo, self.commit, path)

    def files(self) -> list[str]:
        """Return the Hub paths of the files that this pattern matches or this folder holds."""
        from huggingface_hub import HfFileSystem

        root = f"datasets/{self.repo}@{self.commit}"
        pattern = f"{root}/{self.path}".rstrip("/")
        if any(character in self.path for character in "*?["):
            found = asking(self.pinned, lambda: HfFileSystem().glob(pattern))
        else:
            found = asking(self.pinned, lambda: HfFileSystem().find(pattern))
        return sorted(str(name).removeprefix(f"{root}/") for name in found)

    def download(self) -> Path:
        """Return the path of this file in the Hub's cache, downloading it if needed."""
        from huggingface_hub import hf_hub_download

        return Path(
            asking(
                self.pinned,
                lambda: hf_hub_download(self.repo, self.path, repo_type="dataset", revision=self.commit),
            )
        )


def pin(name: str) -> HubName:
    """Resolve `ORG/NAME[@REVISION][/PATH]` to its current commit. Raises MoewhError if the Hub gives none."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise UsageError(f"{name} is not a data set. Use ORG/NAME, ORG/NAME@REVISION or {HUB}ORG/NAME/FILE.")
    repo, revision, path = found["repo"], unquote(found["revision"] or "main"), found["path"] or ""
    if _COMMIT.fullmatch(revision):
        return HubName(repo, revision, path)

    from huggingface_hub import HfApi

    commit = asking(f"{HUB}{repo}", lambda: HfApi().dataset_info(repo, revision=revision).sha)
    if not commit:
        raise MoewhError(f"{HUB}{repo}: the Hub gives no commit for {revision}.")
    return HubName(repo, commit, path)


def asking(name: str, call: Callable[[], Any]) -> Any:
    """Return the result of a call to the Hub; any exception becomes a one-line MoewhError.

    The underlying libraries (HTTP, file systems, builders) raise many kinds of errors, which differ by version.
    """
    try:
        return call()
    except MoewhError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if not line.startswith("(Request ID")), type(error).__name__)
        raise MoewhError(f"{name}: {reason.rstrip('.')}. Check the name, the network and your access.") from error


@dataclass(frozen=True)
class Dataset:
    """One split of a data set read with the `datasets` library, from the Hub at a commit or from a folder."""

    name: str
    hub: HubName | None
    config: str | None
    split: str
    rows: Any
    """The library's own object."""

    @property
    def source(self) -> str:
        """The source of prompts that do not state their own."""
        if self.hub is None:
            return Path(self.name).name
        return "/".join([self.hub.pinned, *([self.config] if self.config else []), self.split])

    def tables(self, batch_rows: int) -> Iterator[pa.Table]:
        """Yield the rows as Arrow tables. Raises MoewhError if the library cannot read them."""
        batches = asking(self.name, lambda: self.rows.with_format("arrow").iter(batch_size=batch_rows))
        while (table := asking(self.name, lambda: next(batches, None))) is not None:
            yield table


def open_dataset(name: str, config: str | None, split: str | None) -> Dataset:
    """Open a data set by its name on the Hub (ORG/NAME[@REVISION]) or as a folder.

    Raises UsageError without the `datasets` library, or if there are several splits and none is chosen.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError("--dataset needs the `datasets` library: pip install 'moewh[datasets]'.") from error
    datasets.disable_progress_bars()
    folder = Path(name)
    hub = None if folder.is_dir() else pin(name.removeprefix(HUB))
    if hub is not None and hub.path:
        raise UsageError(f"--dataset {name} is a file or folder in a data set. Give it to --prompts as {HUB}….")
    saved = any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json"))

    def load() -> Any:
        if hub is None and saved:
            return datasets.load_from_disk(name)
        path, revision = (name, None) if hub is None else (hub.repo, hub.commit)
        return datasets.load_dataset(path, config, revision=revision, streaming=True)

    found = asking(f"--dataset {name}", load)
    splits = list(found) if isinstance(found, dict) else []
    if split is None and len(splits) > 1:
        raise UsageError(f"--dataset {name} has the splits {', '.join(splits)}. Choose one with --split.")
    if split is not None and split not in splits:
        raise UsageError(f"--dataset {name} has no split {split!r}; it has {', '.join(splits) or 'none'}.")
    chosen = split or next(iter(splits), "")
    return Dataset(name, hub, config, chosen, found[chosen] if splits else found)
