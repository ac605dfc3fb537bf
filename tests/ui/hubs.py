"""A hub for tests on this machine: the two routes that fetching a model needs, with what may go wrong."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + "0" * 34


class Hub:
    """Files of one model by name. asked: names of the files that were sent. lies: name -> checksum that is told in place of the
    true one. slow: the name of a file that stops half way until `go` is set. sizes: name -> size that is told."""

    def __init__(self, model: str, files: dict[str, bytes]) -> None:
        self.model, self.files = model, files
        self.asked: list[str] = []
        self.lies: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.slow, self.go = "", threading.Event()

    def listed(self) -> dict[str, Any]:
        """What the hub tells of the model."""
        siblings = [
            {"rfilename": name, "size": self.sizes.get(name, len(data)), "blobId": blob(data), **self._lfs(name, data)} for name, data in self.files.items()
        ]
        return {"id": self.model, "modelId": self.model, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}

    def _lfs(self, name: str, data: bytes) -> dict[str, Any]:
        if not name.endswith(".safetensors"):
            return {}
        told = self.lies.get(name, hashlib.sha256(data).hexdigest())
        return {"lfs": {"sha256": told, "size": self.sizes.get(name, len(data)), "pointerSize": 130}}


def blob(data: bytes) -> str:
    """git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def of_folder(model: str, folder: Path) -> Hub:
    """A hub with what lies in a folder."""
    return Hub(model, {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()})


@contextmanager
def served(hub: Hub) -> Iterator[str]:
    """Its address."""

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, whole: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{hub.model}"):
                return self._send(200, json.dumps(hub.listed()).encode(), whole)
            name = path.removeprefix(f"/{hub.model}/resolve/").partition("/")[2]
            if name not in hub.files:
                return self._send(404, b"", whole)
            if whole:
                hub.asked.append(name)
            data = hub.files[name]
            self._send(200, data, whole, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, halting=name == hub.slow)

        def _send(self, code: int, data: bytes, whole: bool, more: dict[str, str] | None = None, *, halting: bool = False) -> None:
            self.send_response(code)
            for key, value in {"Content-Length": str(len(data)), **(more or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if not whole:
                return
            try:
                self.wfile.write(data[: len(data) // 2])
                if halting:
                    hub.go.wait(60)
                self.wfile.write(data[len(data) // 2 :])
            except (BrokenPipeError, ConnectionResetError):  # it does not want the rest any more
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        hub.go.set()
        server.shutdown()
        server.server_close()
        thread.join()
