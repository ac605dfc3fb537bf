"""One web server: the guard, `/v1` and the page, on one engine."""

from __future__ import annotations

import inspect
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import uvicorn
from fastapi import FastAPI

from hasten.errors import OutputError
from hasten.ui.engine import Engine
from hasten.ui.server.address import Address
from hasten.ui.server.guard import Guard
from hasten.ui.server.openai import Api

if TYPE_CHECKING:
    import gradio

PATIENCE = 60.0
"""Seconds in which the server has to begin."""

GOODBYE = 1
"""Seconds that open connections (pages that follow a job) are given when the server stops."""


class Site:
    """Serves an engine until it is stopped. The engine is started and closed by whoever made it.

    page: the Gradio page, None for hasten's own; options: what `launch` would be given with it.
    """

    def __init__(self, engine: Engine, address: Address | None = None, page: gradio.Blocks | None = None, options: dict[str, Any] | None = None) -> None:
        self.engine, self.address = engine, address or Address()
        self._ended = threading.Event()
        self._page, self._options = page, options or {}
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self.url = ""

    def start(self) -> Self:
        """Listen and answer. Raises `UsageError` where the address is taken."""
        socket = self.address.bind()
        port = socket.getsockname()[1]
        self.url = f"http://{self.address.shown}:{port}"
        config = uvicorn.Config(
            self.app(), log_level="critical", access_log=False, server_header=False, timeout_graceful_shutdown=GOODBYE, lifespan="on",
            proxy_headers=False,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [socket]}, name="hasten-site", daemon=True)
        self._thread.start()
        until = time.monotonic() + PATIENCE
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > until:
                raise OutputError(f"The page at {self.url} did not start. HASTEN_TRACEBACK=1 shows where.")
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        """Answer nobody any more. Safe to call twice."""
        self._ended.set()
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join()
        if self._page is not None:
            self._page.close(verbose=False)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    def app(self) -> Guard:
        """The whole as one ASGI application."""
        app = FastAPI(title="hasten", openapi_url=None, docs_url=None, redoc_url=None)
        app.mount("/v1", Api(self.engine, self._ended).app())
        if self._page is None:
            from hasten.ui.page import build, launch_options

            self._page, self._options = build(self.engine), launch_options(self.engine)
        mount(app, self._page, self._options, str(self.engine.place.outputs), self.engine.limits.max_upload)
        return Guard(app, self.address, self.engine.limits)


def mount(app: FastAPI, page: gradio.Blocks, options: dict[str, Any], outputs: str, largest: int) -> None:
    """Put the page at the root of `app`. options: of `launch`; those that are about its own web server do not apply.
    outputs: the one folder that is served. largest: bytes of an upload."""
    import gradio as gr

    known = set(inspect.signature(gr.mount_gradio_app).parameters) - {"app", "blocks", "path", "auth", "allowed_paths", "max_file_size"}
    chosen = {"ssr_mode": False, "run_history": False, "enable_monitoring": False} | {key: options[key] for key in options if key in known}
    page.state_session_capacity = options.get("state_session_capacity", 64)
    gr.mount_gradio_app(app, page, "/", allowed_paths=[outputs], max_file_size=largest, **chosen)
    # Gradio looks at the paths that callers name only on a page that was launched; a mounted one would copy any file.
    page.has_launched = True
