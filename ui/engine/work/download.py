"""Fetching a remote model: the only work that ever asks another machine, and only when a person has asked for it.

Files come one by one, each whole and with its checksum or not at all; the one that makes a folder a model comes last, so that
what was stopped half way is never taken for one. Files that have come are not fetched again.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hasten.errors import HastenError, ModelError, OutputError, RefusedError
from hasten.ui.engine.desk import Desk
from hasten.ui.engine.models import GB, INDEX, cache, endpoint, is_offline
from hasten.ui.engine.report import Report
from hasten.ui.engine.request import Download

WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.md", "LICENSE*"]
"""Files that a pipeline is loaded from. No pickles and no code."""

LEFT_OUT = ["*.fp16.safetensors", "*non_ema*", "flux1-*.safetensors", "v1-5-*.safetensors"]
"""Second copies of the same weights."""

PIECE = 2**22
"""Bytes that are read at once."""


def download(ask: Download, desk: Desk, report: Report) -> dict[str, Any]:
    """Result: {"model", "bytes", "files"}. Raises `RefusedError` offline, `ModelError` for what is not on the list of remote ones,
    cannot be fetched or comes damaged, `OutputError` where the disk has no room."""
    card = desk.models.card(ask.model)
    if card.where != "remote":
        raise ModelError(f"{ask.model} is on this disk already; there is nothing to fetch.")
    if is_offline(desk.place):
        raise RefusedError(f"{ask.model} is not fetched: hasten works offline here (HF_HUB_OFFLINE, or --offline). Start it without, or copy the model's folder below the models folder.")
    report.phase(f"Asking what {ask.model} consists of")
    try:
        return _fetched(ask.model, report)
    except HastenError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"The disk is full: {ask.model} is not here as a whole. {_KEPT} Make room, or set HF_HOME to another disk.") from error
        raise ModelError(f"Fetching {ask.model} failed ({_why(error)}). {_KEPT} Check the network and your access rights, then try again.") from error


_KEPT = "Files that have come whole are kept; what was half there is removed."


def _fetched(model: str, report: Report) -> dict[str, Any]:
    """Ask for the list, then for file after file, the index last."""
    from huggingface_hub import HfApi, hf_hub_download

    found = HfApi(endpoint=endpoint()).model_info(model, files_metadata=True)
    files = _wanted(found.siblings or [])
    if not files or files[-1].rfilename not in INDEX:
        raise ModelError(f"{model} has none of {', '.join(INDEX)}: it is no pipeline of diffusers and no model of transformers.")
    whole = sum(file.size or 0 for file in files)
    _check_room(model, files)
    report.phase(f"Fetching {whole / GB:.2g} GB" if whole >= GB else f"Fetching {whole / 1e6:.3g} MB", _megabytes(whole))
    counted = _Counted(report, whole)
    for file in files:
        report.check()
        counted.begin(file.rfilename)
        # The last one goes by the branch's name, so that the cache knows what its newest state is.
        revision = "main" if file is files[-1] else found.sha
        here = hf_hub_download(model, file.rfilename, revision=revision, cache_dir=cache(), endpoint=endpoint(), tqdm_class=counted.bar())
        counted.came(file.size or 0)
        _check_sum(Path(here), file, report.check)
    return {"model": model, "bytes": whole, "files": len(files)}


def _wanted(siblings: list[Any]) -> list[Any]:
    """The files that are needed, an index of the whole last."""

    def one_of(name: str, patterns: list[str]) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    found = [file for file in siblings if one_of(file.rfilename, WANTED) and not one_of(file.rfilename, LEFT_OUT)]
    order = {name: number for number, name in enumerate(reversed(INDEX), 1)}
    return sorted(found, key=lambda file: (order.get(file.rfilename, 0), file.rfilename))


def _check_room(model: str, files: list[Any]) -> None:
    """Raise `OutputError` unless what is not here yet has room, with the names and sizes that the hub has told."""
    from huggingface_hub import try_to_load_from_cache

    missing = sum(file.size or 0 for file in files if not isinstance(try_to_load_from_cache(model, file.rfilename, cache_dir=cache()), str))
    folder = next(place for place in (cache(), *cache().parents) if place.is_dir())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise OutputError(f"{model} takes {missing / GB:,.1f} GB more and {free / GB:,.1f} GB are free. Make room, or set HF_HOME to another disk.")


def _check_sum(place: Path, file: Any, check: Callable[[], None]) -> None:
    """Raise `ModelError`, and remove the file, unless it is what the hub says it is. check: asked between pieces."""
    blob = hashlib.sha256() if file.lfs is not None else hashlib.sha1(f"blob {place.stat().st_size}\0".encode(), usedforsecurity=False)
    told = file.lfs.sha256 if file.lfs is not None else file.blob_id
    with place.open("rb") as stream:
        while piece := stream.read(PIECE):
            check()
            blob.update(piece)
    if told is not None and blob.hexdigest() != told:
        place.resolve().unlink(missing_ok=True)
        place.unlink(missing_ok=True)
        raise ModelError(f"{file.rfilename} came damaged: its checksum is {blob.hexdigest()[:12]}..., and the hub says {told[:12]}... It is removed. Try again.")


class _Counted:
    """Megabytes that have come, of all files."""

    def __init__(self, report: Report, whole: int) -> None:
        self.report, self.whole = report, whole
        self._before = self._here = 0

    def begin(self, name: str) -> None:
        self._here = 0
        self.report.note(name)

    def more(self, size: int) -> None:
        """So many bytes of the present file."""
        self.report.check()
        self._here += size
        self._tell()

    def came(self, size: int) -> None:
        """The present file is here, fetched now or before."""
        self._before, self._here = self._before + size, 0
        self._tell()

    def _tell(self) -> None:
        self.report.step(min(_megabytes(self._before + self._here), _megabytes(self.whole)), _megabytes(self.whole))

    def bar(self) -> type:
        """A class that huggingface_hub shows progress by; it is told here, and stops the fetching."""
        from tqdm.auto import tqdm

        counted = self

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "disable": True})

            def update(self, n: float | None = 1) -> None:
                counted.more(int(n or 0))

        return Bar


def _megabytes(size: int) -> int:
    return max(1, round(size / 1e6))


def _why(error: Exception) -> str:
    """In one line; the usual ones in our own words."""
    name = type(error).__name__
    if name == "GatedRepoError":
        return "it is gated: accept its terms on its page, and log in with hf auth login"
    if name == "RepositoryNotFoundError":
        return "the hub does not know it, or does not let you in"
    return f"{name}: {' '.join(str(error).split())[:240]}"
