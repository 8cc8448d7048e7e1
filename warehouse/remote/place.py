"""The location of a published warehouse, and reading bytes from it: a local folder, or a URL through fsspec.

fsspec comes with torch, and the Hub's file system with transformers; those for `s3://` and `https://` need an extra.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moewh.warehouse.errors import MoewhError, UsageError, short_message

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMES = ("s3", "hf", "https", "http")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_EXAMPLES = "s3://BUCKET/FOLDER, hf://datasets/ORG/NAME or https://HOST/FOLDER"


class Place(Protocol):
    """A folder whose files can be read in part."""

    @property
    def root(self) -> str:
        """Its name in SQL and messages: a path or a URL, without a trailing slash."""

    def read(self, path: str) -> bytes:
        """Return a whole file below the root. Raises FileNotFoundError if it is missing, otherwise MoewhError."""

    def read_range(self, path: str, start: int, end: int, size: int) -> bytes:
        """Return the bytes from start to end of a file of `size` bytes. Raises as `read` does."""


@dataclass(frozen=True)
class Folder:
    """A folder on this machine."""

    path: Path
    url: str | None = None
    """The URL where others can read it once it is served or copied there."""

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
        """Return a whole file in its current state."""
        self.fs.invalidate_cache()
        return self._fetch(path, self.fs.cat_file)

    def read_range(self, path: str, start: int, end: int, size: int) -> bytes:
        """Return a part of a file, in one request."""
        known = {} if self.fs.async_impl else {"size": max(size, end), "cache_type": "none"}
        data = self._fetch(path, lambda url: self.fs.cat_file(url, start=start, end=end, **known))
        return data[start:end] if len(data) == size else data  # from a server that sends whole files only

    def _fetch(self, path: str, read: Callable[[str], Any]) -> bytes:
        """Call the file system for one file, and turn its errors, which differ between libraries, into MoewhError."""
        url = f"{self.root}/{path}"
        try:
            data: bytes = read(url)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise MoewhError(f"cannot read {url}: {reason(error)}") from error
        return data


def local_folder(text: object, what: str) -> Path:
    """Return the absolute path of a folder that a user names. Raises UsageError for what names none.

    Also for one whose files DuckDB cannot find.
    """
    if not isinstance(text, str) or not text or "\0" in text:
        raise UsageError(f"the {what} is {text!r}. Give a path or a URL, or . for this folder.")
    if text == "~" or text.startswith("~/"):
        raise UsageError(f"the shell did not replace the ~ of {text}. Write the whole path, or ./~ for that name.")
    if text == "-":
        raise UsageError(f"the {what} is -, which is not a folder. Name one, or ./- for that name.")
    root = str(Path(text).absolute())
    if "\\" in root or root.encode(errors="replace").decode() != root:
        raise UsageError(f"{root!a} has a backslash or is not UTF-8: DuckDB cannot find files there. Choose another.")
    return Path(root)


def is_url(text: str) -> bool:
    """Return whether a text is a URL."""
    return _URL.match(text) is not None


def remote(url: str) -> Remote:
    """Return the place at a URL, without a request. Raises UsageError for an invalid URL, and MoewhError."""
    url = plain_url(url)
    return Remote(url, file_system(url.partition("://")[0]))


def plain_url(url: str) -> str:
    """Return a URL without a trailing slash. Raises UsageError for one that no published warehouse can have."""
    scheme = _URL.match(url)
    if scheme is None or scheme[1] not in SCHEMES:
        raise UsageError(f"cannot read {url}. Give a folder, {_EXAMPLES}.")
    below = url[scheme.end() :].rstrip("/")
    if not below or re.search(r"[*?\[\]#%\\\s]|(^|/)\.{0,2}(/|$)", below):
        raise UsageError(f"{url} is not a plain URL of a folder. Write it like {_EXAMPLES}.")
    if scheme[1] == "hf" and not re.fullmatch(r"datasets/[^/]+/[^/]+(/.*)?", below):
        raise UsageError(f"{url} is not a dataset on the Hub. Write hf://datasets/ORG/NAME.")
    return f"{scheme[0]}{below}"


def file_system(scheme: str) -> Any:
    """Return fsspec's file system for a scheme. Raises MoewhError if a package that it needs is not installed."""
    try:
        import fsspec

        return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        raise MoewhError(f"{scheme}:// needs another package. Run `pip install 'moewh[remote]'`.") from error


def reason(error: BaseException) -> str:
    """Return why a request failed, in one line: the library's message, or the name of its exception."""
    text, kind = short_message(error), type(error).__name__
    if isinstance(error, PermissionError):
        return f"access is denied ({text}). Check your credentials."
    if type(error).__module__.startswith("huggingface_hub") and _status(error) in (401, 403):
        return f"{text}. Check your token: `hf auth login`."
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return f"{text}. Set AWS_PROFILE or AWS_ACCESS_KEY_ID; for a public bucket, FSSPEC_S3_ANON=true."
    return f"{text}."


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of a response that became an error."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
