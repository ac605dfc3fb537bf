"""One thread per process: the tensors of the tests are so small that threads would only wait for each other.

What a user has kept of tuned recipes is not looked at by tests, and theirs is not kept.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

NUMBERS = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def kept_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of tuned recipes for the session's own fixtures."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASTEN_HOME", str(folder / "session"))
        yield folder


@pytest.fixture(autouse=True)
def kept_folder(kept_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one for each test, which does not exist yet."""
    monkeypatch.setenv("HASTEN_HOME", str(kept_folders / str(next(NUMBERS))))
