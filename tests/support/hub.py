"""A stand-in for the Hugging Face Hub: one data set in memory, as much of its API as reading and committing take.

Files above LARGE go by Git LFS, as the Hub has it for Parquet: their content is sent first, then a commit names it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.serving import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/name"
_REVISIONS = ("main", "v1", COMMIT)


LARGE = 4_000
"""Bytes."""


@dataclass
class Store:
    """What the stand-in holds, and what it was asked to do."""

    files: dict[str, bytes]
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Contents that were sent for a commit, by sha256."""
    commits: list[list[str]] = field(default_factory=list)
    """The paths of each commit, in order."""
    refusal: int | None = None
    """The HTTP status of every answer, as for a token that has expired (401) or reads nothing here (403)."""
    refuse_after: int | None = None
    """Refuse everything that writes once there are so many blobs and commits."""

    def listed(self) -> list[dict[str, Any]]:
        """Every file as the tree has it."""
        return [_entry(path, data) for path, data in self.files.items()]

    def refuses(self) -> bool:
        """Tell whether it takes nothing more."""
        return self.refuse_after is not None and len(self.blobs) + len(self.commits) >= self.refuse_after

    def commit(self, lines: list[dict[str, Any]]) -> None:
        """Do what the lines of a commit say."""
        paths = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
            paths.append(value.get("path", ""))
        self.commits.append(paths)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return {"type": "file", "path": path, "size": len(data), "oid": oid} | ({"lfs": lfs} if len(data) > LARGE else {})


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Files below a folder and its folders; only what lies in it directly unless recursive."""
    names: dict[str, dict[str, Any]] = {path: _entry(path, data) for path, data in files.items()}
    for path in files:
        for place, character in enumerate(path):
            if character == "/":
                names[path[:place]] = {"type": "directory", "path": path[:place], "oid": "1" * 40}
    below = {path: item for path, item in names.items() if path.startswith(f"{folder}/" if folder else "")}
    depth = folder.count("/") + 1 if folder else 0
    return [item for path, item in below.items() if recursive or path.count("/") == depth]


def _handler(store: Store) -> type[BaseHTTPRequestHandler]:
    files = store.files

    class Handler(BaseHTTPRequestHandler):
        """Answers by the path alone."""

        def do_GET(self) -> None:
            if store.refusal is not None:
                self._answer(store.refusal, {}, b'{"error": "Invalid credentials"}')
                return
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            api = parts[:4] == ["api", "datasets", *REPO.split("/")]
            revision = parts[5] if api and len(parts) > 5 else "main"
            if revision not in _REVISIONS:
                self._answer(404, {"X-Error-Code": "RevisionNotFound"})
            elif api and parts[4:5] in ([], ["revision"]):
                siblings = [{"rfilename": path} for path in files]
                self._json({"id": REPO, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
            elif api and parts[4] == "tree":
                below = _tree(files, "/".join(parts[6:]), "recursive=true" in self.path.lower())
                self._json(below) if below or not parts[6:] else self._answer(404, {"X-Error-Code": "EntryNotFound"})
            elif parts[:4] == ["datasets", *REPO.split("/"), "resolve"]:
                self._file("/".join(parts[5:]))
            else:
                self._answer(404, {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}"
            if path.endswith("/commit/main"):
                if store.refuses():
                    self._answer(403, {}, b"{}")
                    return
                store.commit([json.loads(line) for line in body.splitlines()])
                self._json(
                    {"commitUrl": f"https://huggingface.co/datasets/{REPO}/commit/{COMMIT}", "commitOid": COMMIT}
                )
                return
            asked = json.loads(body)
            if path == "/api/repos/create":
                self._json({"url": f"https://huggingface.co/datasets/{REPO}", "name": REPO})
            elif path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                modes = [(file["path"], "lfs" if file["size"] > LARGE else "regular") for file in asked["files"]]
                self._json({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]})
            elif path.endswith("/info/lfs/objects/batch"):
                self._json({"transfer": "basic", "objects": [self._upload(item) for item in asked["objects"]]})
            else:  # paths-info
                self._json([item for item in store.listed() if item["path"] in asked.get("paths", [])])

        def do_PUT(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if store.refuses():
                self._answer(403, {})
                return
            store.blobs[self.path.rpartition("/")[2]] = data
            self._answer(200, {"ETag": '"x"'})

        def _upload(self, item: dict[str, Any]) -> dict[str, Any]:
            if item["oid"] in store.blobs:
                return item
            address = f"http://{self.headers['Host']}/upload/{item['oid']}"
            return {**item, "actions": {"upload": {"href": address, "header": {}}}}

        def _file(self, path: str) -> None:
            if path not in files:
                self._answer(404, {"X-Error-Code": "EntryNotFound"})
                return
            data, status, headers = files[path], 200, {"ETag": f'"{path}-{len(files[path])}"', "X-Repo-Commit": COMMIT}
            if asked := self.headers.get("Range"):
                first, last = asked.removeprefix("bytes=").split("-")
                data, status = data[int(first) : int(last or len(data) - 1) + 1], 206
                headers["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{len(files[path])}"
            self._answer(status, headers, data)

        def _json(self, value: Any) -> None:
            self._answer(200, {"Content-Type": "application/json", "X-Repo-Commit": COMMIT}, json.dumps(value).encode())

        def _answer(self, status: int, headers: dict[str, str], data: bytes = b"") -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, format: str, *_: object) -> None:
            """Say nothing."""

    return Handler


@contextmanager
def hub(files: dict[str, bytes] | Store) -> Iterator[str]:
    """Serve these files as the data set `REPO`; yields the address for HF_ENDPOINT."""
    store = files if isinstance(files, Store) else Store(files)
    with serving(_handler(store)) as address:
        yield address
