"""A stand-in for the Hugging Face Hub: serves one data set from memory, as much of its API as reading takes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/name"
_REVISIONS = ("main", "v1", COMMIT)


def _handler(files: dict[str, bytes]) -> type[BaseHTTPRequestHandler]:
    listed = [{"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in files.items()]

    def _tree(folder: str, recursive: bool) -> list[dict[str, Any]]:
        """Files below a folder and its folders; only what lies in it directly unless recursive."""
        names: dict[str, dict[str, Any]] = dict(zip(files, listed, strict=True))
        for path in files:
            for place, character in enumerate(path):
                if character == "/":
                    names[path[:place]] = {"type": "directory", "path": path[:place], "oid": "1" * 40}
        below = {path: item for path, item in names.items() if path.startswith(f"{folder}/" if folder else "")}
        depth = folder.count("/") + 1 if folder else 0
        return [item for path, item in below.items() if recursive or path.count("/") == depth]

    class Handler(BaseHTTPRequestHandler):
        """Answers by the path alone."""

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            api = parts[:4] == ["api", "datasets", *REPO.split("/")]
            revision = parts[5] if api and len(parts) > 5 else "main"
            if revision not in _REVISIONS:
                self._answer(404, {"X-Error-Code": "RevisionNotFound"})
            elif api and parts[4:5] in ([], ["revision"]):
                siblings = [{"rfilename": path} for path in files]
                self._json({"id": REPO, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
            elif api and parts[4] == "tree":
                below = _tree("/".join(parts[6:]), "recursive=true" in self.path.lower())
                self._json(below) if below else self._answer(404, {"X-Error-Code": "EntryNotFound"})
            elif parts[:4] == ["datasets", *REPO.split("/"), "resolve"]:
                self._file("/".join(parts[5:]))
            else:
                self._answer(404, {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}").get("paths", [])
            self._json([item for item in listed if item["path"] in wanted])

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
def hub(files: dict[str, bytes]) -> Iterator[str]:
    """Serve these files as the data set `REPO`; yields the address for HF_ENDPOINT."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(files)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
