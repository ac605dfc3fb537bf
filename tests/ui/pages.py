"""The page of an engine, served from this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hasten.ui.engine import Engine
from hasten.ui.page import build, launch_options


@contextmanager
def launched(folders: pytest.TempPathFactory, first: dict[str, Any]) -> Iterator[tuple[Engine, str]]:
    """An engine with one job in its queue, and the address of its page. first: a comparison in place of the page's own, which
    takes longer."""
    with pytest.MonkeyPatch.context() as keep:
        keep.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        keep.setenv("GRADIO_TEMP_DIR", str(folders.mktemp("gradio")))
        keep.chdir(folders.mktemp("empty"))
        with Engine(folders.mktemp("home")) as engine:
            engine.submit(first)
            page = build(engine)
            _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, inbrowser=False, **launch_options(engine))
            yield engine, url
            page.close(verbose=False)
