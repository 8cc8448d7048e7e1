"""Where a published warehouse lies, and reading bytes of it: a folder here, or a URL through fsspec.

fsspec comes with torch, and the Hub's file system with transformers; those for `s3://` and `https://` are an extra.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moewh.warehouse.errors import MoewhError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMES = ("s3", "hf", "https", "http")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_EXAMPLES = "s3://BUCKET/FOLDER, hf://datasets/ORG/NAME or https://HOST/FOLDER"


class Place(Protocol):
    """A folder whose files can be read in part."""

    @property
    def root(self) -> str:
        """What SQL and messages call it: a path or a URL, without a slash at the end."""

    def read(self, path: str) -> bytes:
        """Return a whole file below the root. Raises FileNotFoundError if there is none, else MoewhError."""

    def read_range(self, path: str, start: int, end: int, size: int) -> bytes:
        """Return the bytes from start to end of a file that has `size` bytes. Raises as `read` does."""


@dataclass(frozen=True)
class Folder:
    """A folder on this machine."""

    path: Path
    url: str | None = None
    """Where others find it, once it is served or copied there."""

    @property
    def root(self) -> str:
        """Its URL for others if it has one, else its path."""
        return self.url or str(self.path)

    def read(self, path: str) -> bytes:
        """Return a whole file."""
        return (self.path / path).read_bytes()

    def read_range(self, path: str, start: int, end: int, size: int) -> bytes:  # noqa: ARG002 - remote places need it
        """Return a part of a file."""
        with (self.path / path).open("rb") as file:
            file.seek(start)
            return file.read(end - start)


@dataclass(frozen=True)
class Remote:
    """A folder of an object store, the Hub or a web server."""

    root: str
    fs: Any
    """The fsspec file system; it takes whole URLs."""

    def read(self, path: str) -> bytes:
        """Return a whole file, as it is now."""
        self.fs.invalidate_cache()
        return self._told(path, self.fs.cat_file)

    def read_range(self, path: str, start: int, end: int, size: int) -> bytes:
        """Return a part of a file, in one request."""
        known = {} if self.fs.async_impl else {"size": max(size, end), "cache_type": "none"}
        data = self._told(path, lambda url: self.fs.cat_file(url, start=start, end=end, **known))
        return data[start:end] if len(data) == size else data  # from a server that sends whole files only

    def _told(self, path: str, work: Callable[[str], Any]) -> bytes:
        """Do what a file system does for one file. Each raises its own errors, of its own libraries."""
        url = f"{self.root}/{path}"
        try:
            data: bytes = work(url)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise MoewhError(f"cannot read {url}: {reason(error)}") from error
        return data


def is_url(text: str) -> bool:
    """Tell whether a warehouse is named by a URL."""
    return _URL.match(text) is not None


def remote(url: str) -> Remote:
    """Return the place at a URL, without a request. Raises UsageError for a URL that cannot be one, and MoewhError."""
    url = plain_url(url)
    return Remote(url, file_system(url.partition("://")[0]))


def plain_url(url: str) -> str:
    """Return a URL without a slash at the end. Raises UsageError for one that no published warehouse can have."""
    scheme = _URL.match(url)
    if scheme is None or scheme[1] not in SCHEMES:
        raise UsageError(f"{url} is no place that moewh reads. Give a folder, {_EXAMPLES}.")
    below = url[scheme.end() :].rstrip("/")
    if not below or re.search(r"[*?\[\]#%\\\s]|(^|/)\.{0,2}(/|$)", below):
        raise UsageError(f"{url} is no plain URL of a folder. Write it like {_EXAMPLES}.")
    if scheme[1] == "hf" and not re.fullmatch(r"datasets/[^/]+/[^/]+(/.*)?", below):
        raise UsageError(f"{url} is no data set of the Hub. Write hf://datasets/ORG/NAME.")
    return f"{scheme[0]}{below}"


def file_system(scheme: str) -> Any:
    """Return fsspec's file system for a scheme. Raises MoewhError if what it needs is not installed."""
    import fsspec

    try:
        return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        raise MoewhError(f"{scheme}:// needs another package. Run `pip install 'moewh[remote]'`.") from error


def reason(error: BaseException) -> str:
    """Return why a request failed, in one line: the library's words, or what it calls the error."""
    text = " ".join(str(error).split()).removesuffix(".")
    kind = type(error).__name__
    if isinstance(error, PermissionError):
        return f"it is not allowed ({text or kind}). Check your credentials."
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return f"{text}. Set AWS_PROFILE or AWS_ACCESS_KEY_ID; for a public bucket, FSSPEC_S3_ANON=true."
    return f"{text or kind}."
