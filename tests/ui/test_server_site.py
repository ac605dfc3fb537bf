"""`hasten ui` and `hasten jobs` as processes: they start, say what is wrong, end cleanly, and share one queue."""

from __future__ import annotations

import json
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hasten.cli import main
from hasten.errors import UsageError
from hasten.ui.engine import Engine
from hasten.ui.server import Address, Site
from tests.ui.processes import page
from tests.ui.sites import bare, client

CLIP = {"kind": "generate", "model": "tiny-video", "prompt": "a seven moving left, slowly", "steps": 200, "recipe": "plain", "preview": False}


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))


def test_a_port_in_use_is_said_in_words(tmp_path: Path) -> None:
    with Engine(tmp_path) as engine, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"Port {port} on 127.0.0.1 is in use.*--port {port + 1}"):
            Site(engine, Address(port=port), bare()).start()


def test_without_a_port_the_next_free_one_is_taken(tmp_path: Path) -> None:
    with Engine(tmp_path) as engine, Site(engine, page=bare()) as first, Site(engine, page=bare()) as second:
        assert first.url != second.url
        assert all(client(each.url).get("/v1/videos").status_code == 200 for each in (first, second))


def test_a_site_leaves_no_thread_behind(tmp_path: Path) -> None:
    import threading

    with Engine(tmp_path) as engine:
        for _ in range(2):
            with Site(engine, Address(port=0), bare()) as site:
                client(site.url).get("/")
        time.sleep(0.5)
        assert not [each.name for each in threading.enumerate() if each.name == "hasten-site"]


@pytest.mark.parametrize("arguments", [
    ["--host", "0.0.0.0"], ["--host", "::"], ["--auth", "nobody"], ["--models", "/nowhere"], ["--host", "0.0.0.0", "--auth", ":"], ["--port", "99999"],
])  # fmt: skip
def test_wrong_usage_is_one_sentence(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--no-browser", "--home", str(tmp_path), *arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "--" in said[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.long
def test_it_ends_cleanly_and_its_job_can_be_tried_again(number: int, tmp_path: Path) -> None:
    with page(tmp_path / "home") as served:
        assert (tmp_path / "home" / "ui").stat().st_mode & 0o077 == 0
        [web] = (tmp_path / "home" / "ui").glob("web-*")
        assert all(stat.S_IMODE(each.stat().st_mode) == 0o700 for each in (web, web / "files", web / "empty"))
        assert Path(f"/proc/{served.process.pid}/cwd").resolve() == web / "empty" or sys.platform != "linux"
        with client(served.url) as found:
            assert found.get("/").status_code == 200
            running = _running(served.home)
        assert served.end(number) == 0, served.log.read_text()
        said = served.log.read_text()
        assert "Traceback" not in said and "Stopping" in said
        assert not list((tmp_path / "home" / "ui").glob("web-*")), "temporary files are gone"
    engine = Engine(tmp_path / "home")
    assert engine.job(running).state == "interrupted"
    engine.close()


def _running(home: Path) -> str:
    """Submit a long job from another process, and wait until the page is at work on it."""
    engine = Engine(home)
    for each in engine.jobs.list(states=("queued", "running")):
        engine.cancel(each.id)
    job = engine.submit(CLIP).id
    until = time.monotonic() + 120
    while engine.job(job).state == "queued" and time.monotonic() < until:
        time.sleep(0.1)
    assert engine.job(job).state == "running"
    engine.close()
    return job


def test_jobs_from_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home, file = ["--home", str(tmp_path / "home")], tmp_path / "job.json"
    file.write_text(json.dumps(CLIP | {"steps": 2, "frames": 5, "prompt": "a [red] seven\nmoving left"}))

    def rows(*arguments: str) -> list[dict[str, object]]:
        assert main(["jobs", *arguments, *home, "--json", "-"]) == 0
        found: list[dict[str, object]] = json.loads(capsys.readouterr().out)["rows"]
        return found

    [first] = rows("submit", str(file))
    assert first["state"] == "queued"
    assert rows("cancel", str(first["id"]))[0]["state"] == "cancelled"
    [again] = rows("retry", str(first["id"]))
    assert again["again_of"] == first["id"]
    assert [(row["id"], row["state"]) for row in rows("run")] == [(again["id"], "done")]
    assert [row["id"] for row in rows("list")] == [again["id"], first["id"]]
    assert [row["id"] for row in rows("list", "--state", "cancelled")] == [first["id"]]
    assert rows("pause") == []
    waiting = [str(rows("submit", str(file))[0]["id"]) for _ in range(2)]
    assert [row["id"] for row in rows("move", waiting[1], "first")] == waiting[::-1]
    assert main(["jobs", "run", *home]) == 1 and "The queue is paused" in capsys.readouterr().err
    assert [row["id"] for row in rows("resume")] == waiting[::-1]
    assert main(["jobs", "move", waiting[0], "aside", *home]) == 2 and "first, up, down, last" in capsys.readouterr().err
    for job in waiting:
        rows("cancel", job)
        rows("remove", job)
    rows("remove", str(first["id"]))
    assert [row["id"] for row in rows("list")] == [again["id"]]
    assert main(["jobs", "list", *home]) == 0
    assert "a [red] seven moving left" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "words"), [
    (["cancel", "nothing"], "no job"), (["retry", "../x"], "no job"), (["remove", "x"], "no job"), (["submit", "/nowhere"], "No such file"),
    (["submit", "{bad}"], "tiny"), (["list", "--state", "lost"], "queued"),
])  # fmt: skip
def test_wrong_usage_of_jobs(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"kind": "generate", "model": "nothing", "prompt": "a"}')
    arguments = [each.format(bad=bad) for each in arguments]
    assert main(["jobs", *arguments, "--home", str(tmp_path / "home")]) == 2
    assert words in capsys.readouterr().err


def test_help_does_not_import_the_page() -> None:
    code = "import sys; from hasten.cli import main; main(['ui', '--help']); main(['jobs', '--help']); sys.exit('gradio' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
