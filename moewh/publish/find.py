"""Find the target that a path or URL names. A new kind of place becomes a file beside this one, and a branch here."""

from __future__ import annotations

from pathlib import Path

from moewh.publish.hub import HubTarget
from moewh.publish.target import FolderTarget, StoreTarget, Target
from moewh.warehouse.errors import UsageError
from moewh.warehouse.remote.place import is_url, plain_url, remote


def target_at(text: str, url: str | None = None) -> Target:
    """Return the target that a path or URL names, without a request; `url` is where readers find a folder.

    Raises UsageError for what cannot be one.
    """
    if not is_url(text):
        return FolderTarget(Path(text).absolute(), None if url is None else plain_url(url))
    if url is not None:
        raise UsageError("--url is for a folder: what is published at a URL is read there.")
    scheme = text.partition("://")[0]
    if scheme not in ("s3", "hf"):
        raise UsageError(f"moewh publishes to a folder, s3:// or hf://datasets/, not to {text}.")
    place = remote(text)
    if scheme == "s3":
        return StoreTarget(place)
    target = HubTarget(place)
    assert target.repo  # which refuses a URL that names more
    return target
