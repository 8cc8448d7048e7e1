"""Find the target of a path or URL. A new kind of target becomes a file beside this one, and a branch here."""

from __future__ import annotations

import os
from pathlib import Path

from moewh.publish.hub import HubTarget
from moewh.publish.target import FolderTarget, StoreTarget, Target
from moewh.warehouse.answer.output import require_outside
from moewh.warehouse.errors import UsageError, require_utf8
from moewh.warehouse.files.folders import real_path
from moewh.warehouse.files.listing import ListingError, parse_listing
from moewh.warehouse.files.names import LISTING
from moewh.warehouse.remote.place import is_url, local_folder, plain_url, remote


def target_at(text: str, url: str | None = None) -> Target:
    """Return the target of a path or URL, without a request.

    `url` is where readers find a folder: "" for its own path, None for the URL it was published for before, if any.
    Raises UsageError for an unsupported path or URL.
    """
    if not is_url(text):
        folder = local_folder(require_utf8(text), "target")
        require_outside(real_path(folder))
        _require_folder(folder)
        return FolderTarget(folder, _url_before(folder) if url is None else _served(url) if url else None)
    if url is not None:
        raise UsageError("--url is for a folder: a warehouse published at a URL is read there. Leave it out.")
    scheme = text.partition("://")[0]
    if scheme not in ("s3", "hf"):
        raise UsageError(f"moewh publishes to a folder, s3:// or hf://datasets/, not to {text}.")
    place = remote(text)
    if scheme == "s3":
        return StoreTarget(place)
    target = HubTarget(place)
    target.require_data_set()
    return target


def _require_folder(folder: Path) -> None:
    """Raise UsageError for a path at or below something that is not a folder, such as a file or a broken link."""
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UsageError(f"{nearest} is not a folder. Publish to another place.")


def _url_before(folder: Path) -> str | None:
    """Return the URL that a folder was published for; None without one. A bad listing is left to `publish`."""
    try:
        root = parse_listing((folder / LISTING).read_bytes()).root
    except (OSError, ListingError):
        return None
    return root if is_url(root) else None


def _served(url: str) -> str:
    """Return the URL of a folder for readers. Raises UsageError for one with a password, which they would see."""
    if "@" in (plain := plain_url(url)).split("/")[2]:
        raise UsageError("--url holds a user or password, which the published files would show. Leave it out.")
    return plain
