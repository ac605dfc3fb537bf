"""Fixtures of the command line's tests: a model folder, and a way to run a command in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hasten.cli import main
from tests.hosts import PIXART_CALL, WAN_CALL, saved, small_pixart, small_wan


@dataclass
class Ran:
    """What a command gave: exit code, both streams, and the JSON document where standard output is one."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    @property
    def sentence(self) -> str:
        """The one line of an expected failure."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def hasten(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Ran]:
    """Run `hasten ARGS` in an empty folder of its own."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HASTEN_TRACEBACK", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*args: object) -> Ran:
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    return run


def _model(folder: Path, pipe: Any, call: dict[str, Any]) -> Path:
    saved(pipe, folder)
    (folder / "hasten.json").write_text(json.dumps({"call": call}))
    return folder


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small WanPipeline and its usual call."""
    return _model(tmp_path_factory.mktemp("models") / "wan", small_wan(), WAN_CALL)


@pytest.fixture(scope="session")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small image pipeline and its usual call."""
    return _model(tmp_path_factory.mktemp("models") / "pixart", small_pixart(), PIXART_CALL)
