"""`hasten ui`: the page in a browser, on this machine alone unless told otherwise. Ends with Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli.options import Device, Dtype
from hasten.cli.output import Output
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.ui.engine import Engine

WHO = "Who may come"
GRACE = 10.0
"""Seconds in which a running job has to stop when the page does."""

Home = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where jobs and results lie. Default: HASTEN_HOME, or hasten's part of the user's cache.")
]


def ui(
    host: Annotated[str, typer.Option(metavar="NAME", help="Where to listen; others than this machine only with --auth.", rich_help_panel=WHO)] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(metavar="N", help="Default: the first free one from 7860 on. 0: any.", min=0, max=65535, rich_help_panel=WHO)
    ] = None,
    auth: Annotated[str | None, typer.Option(metavar="USER:PASSWORD", help="Ask for it.", rich_help_panel=WHO)] = None,
    home: Home = None,
    models: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Models of your own, a folder each.")] = None,
    loras: Annotated[Path | None, typer.Option(metavar="FOLDER", help="LoRAs, .safetensors. Default: loras in the models folder.")] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Fetch nothing, not even by the download button.")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Open the page: generate, compare what was left out, tune, train, export. Nothing is sent anywhere."""
    output = Output("ui", None)
    with output.open():
        check_installed()
        if home is not None:  # also of what a tuning keeps
            os.environ["HASTEN_HOME"] = str(home.expanduser().absolute())
        folders = [_folder(name, each) for name, each in (("--models", models), ("--loras", loras))]
        output.note("Starting...")
        from hasten.ui.engine import Engine
        from hasten.ui.server.address import Address
        from hasten.ui.server.surroundings import prepared

        address = Address(host, port, auth)
        engine = Engine(home, models=folders[0], loras=folders[1], offline=offline, device=device, dtype=dtype)
        with prepared(engine.place.folder, offline), told_to_end() as ended:
            from hasten.ui.server.site import Site

            with Site(engine.start(), address) as site:
                output.say(f"hasten is at {site.url}  (Ctrl-C ends it; results are in {engine.place.outputs})")
                if not no_browser:
                    webbrowser.open(site.url)
                ended.wait()
                output.note("Stopping; a running job can be tried again later.")
            closed = _closed(engine)
        if not closed:
            sys.stdout.flush()
            os._exit(0)  # a thread that loads a model can be neither stopped nor left to an interpreter that goes


def check_installed() -> None:
    """Raise `UsageError` where the page's packages are not there."""
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise UsageError("The page needs gradio, which is not installed. Run: pip install 'hasten[ui]'")


@contextmanager
def told_to_end() -> Iterator[threading.Event]:
    """Set by Ctrl-C and SIGTERM while open. A second one ends the process at once."""
    ended = threading.Event()

    def end(number: int, _: object) -> None:
        ended.set()
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _closed(engine: Engine) -> bool:
    """Stop it; False where its job does not stop soon (a model that is being loaded). The next start marks that job interrupted."""
    closing = threading.Thread(target=engine.close, name="hasten-closing", daemon=True)
    closing.start()
    closing.join(GRACE)
    return not closing.is_alive()


def _folder(option: str, folder: Path | None) -> Path | None:
    """Raise `UsageError` for one that is not there: an empty list of models would not say why."""
    if folder is not None and not folder.expanduser().is_dir():
        raise UsageError(f"{option} {folder}: there is no such folder. Make it, or name another one.")
    return folder
