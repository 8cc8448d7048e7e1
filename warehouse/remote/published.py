"""A published warehouse for readers: a place and its listing, which is read again when it may have changed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.folders import real_path
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import LISTING, glob_literal
from moewh.warehouse.remote.place import Folder, Place, Remote, is_url, local_folder, remote

if TYPE_CHECKING:
    import duckdb

    from moewh.warehouse.files import schema
    from moewh.warehouse.files.listing import Listing

_REQUESTS = 16
"""Small files that are fetched at the same time."""


@dataclass
class Published:
    """A published warehouse, which is read-only."""

    place: Place
    _listing: Listing | None = field(default=None, repr=False)
    bound: Listing | None = field(default=None, repr=False)
    """The listing from which the views were last created."""

    @property
    def root(self) -> str:
        """Its path or URL in SQL and messages."""
        return self.place.root

    @property
    def listing(self) -> Listing:
        """Its listing, read on first use. Raises MoewhError."""
        return self._listing if self._listing is not None else self.read_again()

    def read_again(self) -> Listing:
        """Read the current listing. Raises MoewhError if there is none or it is invalid."""
        from moewh.warehouse.files.listing import ListingError, parse_listing

        try:
            self._listing = parse_listing(self.place.read(LISTING))
        except FileNotFoundError as error:
            private = " If it is private, run `hf auth login` first." * self.root.startswith("hf://")
            raise MoewhError(
                f"there is no published warehouse at {self.root}: it has no {LISTING}. Make one with `moewh publish`."
                f"{private}"
            ) from error
        except ListingError as error:
            raise MoewhError(f"{self.root}/{LISTING} {error}") from error
        return self._listing

    def require(self) -> Published:
        """Return self if there is a warehouse here that this moewh can read; otherwise raise MoewhError."""
        if self._listing is None:
            self.read_again()
        return self

    def folders(self) -> list[str]:
        """Return the folders that SQL may read, as DuckDB's allowed directories (see `Layout.folders`)."""
        return [self.root, glob_literal(self.root)]

    def has_table(self, table: schema.Table) -> bool:
        """Return whether there are files of a table; a warehouse older than the table has none."""
        return bool(self.listing.files_of(table))

    def connect(self, connection: duckdb.DuckDBPyConnection) -> str:
        """Let a connection read the listed files, and no others at this place.

        Returns the path of the zero-row files of every table, for `moewh_root` while views are created.
        """
        from concurrent.futures import ThreadPoolExecutor

        from moewh.warehouse.remote.listed import ListedFiles

        self.bound = self.listing
        files = ListedFiles(self.place, self.bound)
        with ThreadPoolExecutor(_REQUESTS) as pool:
            list(pool.map(files.fetch, self.bound.zero_rows))
        connection.register_filesystem(files)
        return files.zero_rows


Readable = Layout | Published
"""A warehouse to read: one that moewh writes on this machine, or a published one at any place."""


def readable(place: str | os.PathLike[str]) -> Readable:
    """Return the warehouse at a path or URL, without checking that it exists. Raises UsageError for what is neither."""
    text = os.fspath(place) if isinstance(place, os.PathLike) else place
    if isinstance(text, str) and is_url(text):
        return Published(remote(text))
    root = local_folder(text, "warehouse")
    return Published(Folder(root)) if (root / LISTING).is_file() else Layout(root)


def writable(place: str | os.PathLike[str]) -> Layout:
    """Return the warehouse at a path, for writing. Raises UsageError for a published one and for a URL."""
    return only_written(readable(place))


def only_written(warehouse: Readable) -> Layout:
    """Return the warehouse if moewh can write it. Raises UsageError for a published one."""
    if isinstance(warehouse, Layout):
        if (outer := Layout(real_path(warehouse.root)).inside_of()) is not None:
            raise UsageError(f"{warehouse.root} is among the files of the warehouse {outer}. Name another folder.")
        return warehouse
    if isinstance(warehouse.place, Remote):
        raise UsageError(f"{warehouse.root} is not on this machine and is read-only. Name a folder instead.")
    raise UsageError(
        f"{warehouse.root} is a published warehouse, which is read-only. Name another folder, or remove its {LISTING} "
        "and run `moewh refresh` to make it writable."
    )
