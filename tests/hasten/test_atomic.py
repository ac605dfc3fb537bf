"""A file is the old one or the new one; failures leave nothing behind and say what to do."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hasten.atomic import atomic_write, replacing
from hasten.errors import OutputError


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def failing(number: int, after: int):
    """Stands in for `os.fsync`/`os.replace`: the call numbered `after` fails with `number`."""
    calls = {"n": 0}

    def fail(*args: object, **kwargs: object) -> None:
        calls["n"] += 1
        if calls["n"] > after:
            raise OSError(number, os.strerror(number), str(args[0]))

    return fail


@pytest.mark.parametrize("data", [b"\x00\xff", "caf\u00e9\r\n", "", b""])
def test_writes_exactly(tmp_path: Path, data: bytes | str) -> None:
    path = atomic_write(tmp_path / "x.bin", data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert names(tmp_path) == ["x.bin"]


def test_replaces_and_keeps_rights(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    path.chmod(0o640)
    atomic_write(str(path), "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640


def test_new_file_has_the_users_default_rights(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    atomic_write(tmp_path / "x", "")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    atomic_write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_temporary_path_keeps_folder_and_suffix(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.mp4") as aside:
        assert aside.parent == tmp_path and aside.suffix == ".mp4" and aside.exists()
        assert not (tmp_path / "a.mp4").exists()
    assert names(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file(tmp_path: Path, kind: type[BaseException]) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(kind), replacing(tmp_path / "x") as aside:
        aside.write_text("half")
        raise kind
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "word"), [(errno.ENOSPC, "full"), (errno.EDQUOT, "quota"), (errno.EIO, "disk")]
)
def test_failures_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, word: str
) -> None:
    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, call, failing(number, 0))
    with pytest.raises(OutputError, match=word):
        atomic_write(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]


def test_full_disk_for_real() -> None:
    """/dev/full answers every write with ENOSPC; writing through it inside the body must be explained."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    target = folder / f"hasten-full-{os.getpid()}"
    with (
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(OutputError, match=r"full.*MiB free"),
        replacing(target),
    ):
        full.write(b"x")
    assert not target.exists()


def test_an_encoders_own_error_with_an_errno_is_explained(tmp_path: Path) -> None:
    class EncoderError(Exception):
        errno = errno.ENOSPC

    with pytest.raises(OutputError, match="full"), replacing(tmp_path / "x.mp4"):
        raise EncoderError


def test_an_error_about_another_file_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "x"):
        (tmp_path / "missing-input").read_text()
    assert names(tmp_path) == []


def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the refusal of the system is simulated."""
    monkeypatch.setattr(os, "open", failing(errno.EACCES, 0))
    with pytest.raises(OutputError, match="not writable. Choose another folder"):
        atomic_write(tmp_path / "x", "new")


def test_missing_parent(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist. Create the folder"):
        atomic_write(tmp_path / "no" / "x", "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is not a folder"):
        atomic_write(tmp_path / "file" / "x", "new")


def test_refuses_folders_and_devices(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="it is a folder"):
        atomic_write(tmp_path, "x")
    with pytest.raises(OutputError, match="not a regular file"):
        atomic_write("/dev/null", "x")


def test_name_too_long(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="too long"):
        atomic_write(tmp_path / ("x" * 300), "x")
    assert names(tmp_path) == []


def test_kill_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    program = (
        "import os, signal, sys\n"
        "from hasten.atomic import replacing\n"
        "with replacing(sys.argv[1]) as aside:\n"
        "    aside.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "x").read_text() == "old"
