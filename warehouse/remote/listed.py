"""A remote warehouse as DuckDB sees it: a file system with the files of its listing and nothing else.

DuckDB has no other access to the network (moewh loads no extension), so SQL cannot reach another bucket, host or file.
Files are read in blocks, which are cached: DuckDB opens a file several times per query and reads its end first.
"""

from __future__ import annotations

import io
import re
import threading
from collections import OrderedDict
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem

from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.listing import Listing
from moewh.warehouse.files.names import RUN_FOLDER, SCHEMA_RUN, SEGMENT_FOLDER
from moewh.warehouse.remote.place import Place, Remote

BLOCK = 1 << 20
"""Bytes of one request for a small part of a file; a larger part is read in one request of its own size."""
_KEPT = 64
"""Blocks kept in the cache."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ListedFiles(AbstractFileSystem):  # type: ignore[misc] # fsspec has no types
    """The files of a listing under their own URLs; read-only.

    Below `zero_rows`, every path maps to the zero-row file of its table, so that views are bound without requests. For
    a folder on this machine this is the only use: DuckDB reads the files themselves by their paths.
    """

    cachable = False

    def __init__(self, place: Place, listing: Listing) -> None:
        super().__init__()
        self._root = place.root if isinstance(place, Remote) else "published://here"
        self.protocol = self._root.partition("://")[0]
        self.zero_rows = f"{self._root}/.zero-rows"
        self._place, self._listing = place, listing
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, path: str, mode: str = "rb", **_: Any) -> RangeFile:
        """Open a listed file. Raises FileNotFoundError for any other file, and PermissionError for writing."""
        if mode != "rb":
            raise PermissionError(f"{path} is read-only")
        return RangeFile(self, self._below(path), self.size(path))

    def glob(self, path: str, **_: Any) -> list[str]:
        """Return the path itself if it is listed: views list every file by its path."""
        return [path] if self.exists(path) else []

    def exists(self, path: str, **_: Any) -> bool:
        """Return whether a path is listed."""
        try:
            self._below(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        """Return a file's size in bytes."""
        return self._listing.files[self._below(path)].bytes

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return the facts about a file that DuckDB asks for."""
        return {"name": path, "size": self.size(path), "type": "file"}

    def modified(self, path: str) -> datetime:  # noqa: ARG002 - the same for all
        """Return a constant time: listed files do not change."""
        return _EPOCH

    def unstrip_protocol(self, name: str) -> str:
        """Return a path unchanged: paths are whole URLs here."""
        return name

    def fetch(self, path: str) -> None:
        """Prefetch a small file, by its path below the root."""
        self.read_range(path, 0, self._listing.files[path].bytes)

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Return the bytes of a listed file from start to end; end must not exceed its size."""
        if end - start > BLOCK:
            return self._request(path, start, end)
        first, last = start // BLOCK, max(start, end - 1) // BLOCK
        data = b"".join(self._block(path, number) for number in range(first, last + 1))
        return data[start - first * BLOCK : end - first * BLOCK]

    def _block(self, path: str, number: int) -> bytes:
        with self._lock:
            if (path, number) in self._blocks:
                self._blocks.move_to_end((path, number))
                return self._blocks[path, number]
        end = min((number + 1) * BLOCK, self._listing.files[path].bytes)
        data = self._request(path, number * BLOCK, end)
        with self._lock:
            self._blocks[path, number] = data
            while len(self._blocks) > _KEPT:
                self._blocks.popitem(last=False)
        return data

    def _request(self, path: str, start: int, end: int) -> bytes:
        """Read from the place. Raises MoewhError if the file is missing or shorter than listed."""
        url = f"{self._place.root}/{path}"
        try:
            data = self._place.read_range(path, start, end, self._listing.files[path].bytes) if end > start else b""
        except FileNotFoundError as error:
            raise MoewhError(f"{url} is gone, but published.json lists it. See `moewh verify`.") from error
        if len(data) != end - start:
            raise MoewhError(
                f"{url} returned {len(data):,} of the {end - start:,} bytes that published.json lists. "
                "See `moewh verify`."
            )
        return data

    def _below(self, path: str) -> str:
        """Return a URL's path below the root. Raises FileNotFoundError for a path that is not listed."""
        if path.startswith(f"{self.zero_rows}/"):
            below = re.sub(f"{RUN_FOLDER}[^/]*", f"{RUN_FOLDER}{SCHEMA_RUN}", path.removeprefix(f"{self.zero_rows}/"))
            below = re.sub(f"{SEGMENT_FOLDER}[^/]*", f"{SEGMENT_FOLDER}0", below)
        else:
            below = path.removeprefix(f"{self._root}/")
        if below not in self._listing.files:
            raise FileNotFoundError(f"{path} is not a file of this warehouse")
        return below


class RangeFile(io.RawIOBase):
    """A listed file, open for reading. Each thread has its own position, because DuckDB's threads share one file."""

    def __init__(self, files: ListedFiles, path: str, size: int) -> None:
        self._files, self._path, self._size = files, path, size
        self._at = threading.local()

    def readable(self) -> bool:
        """Return True: the file can be read."""
        return True

    def seekable(self) -> bool:
        """Return True: any position can be read."""
        return True

    def tell(self) -> int:
        """Return the position of this thread."""
        position: int = getattr(self._at, "position", 0)
        return position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position of this thread."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._size}[whence]
        self._at.position = base + offset
        return self.tell()

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes from the position on; fewer only at the end of the file."""
        start = min(self.tell(), self._size)
        end = self._size if size < 0 else min(start + size, self._size)
        data = self._files.read_range(self._path, start, end)
        self._at.position = end
        return data
