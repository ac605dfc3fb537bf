"""Fetching a remote model: the only work that ever asks another machine, and only when a person has asked for it."""

from __future__ import annotations

import shutil
from typing import Any

from hasten.errors import ModelError, OutputError, RefusedError
from hasten.ui.engine.desk import Desk
from hasten.ui.engine.models import GB, REMOTE, fetched, is_offline
from hasten.ui.engine.report import Report
from hasten.ui.engine.request import Download

WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.md", "LICENSE*"]
"""Files that a pipeline is loaded from. No pickles and no code."""

LEFT_OUT = ["*.fp16.safetensors", "*non_ema*", "flux1-*.safetensors", "v1-5-*.safetensors"]
"""Second copies of the same weights."""


def download(ask: Download, desk: Desk, report: Report) -> dict[str, Any]:
    """Result: {"model", "folder_bytes"}. Raises `RefusedError` offline, `ModelError` for what is not on the list of remote ones or
    cannot be fetched, `OutputError` where the disk has no room."""
    card = desk.models.card(ask.model)
    if card.where != "remote":
        raise ModelError(f"{ask.model} is on this disk already; there is nothing to fetch.")
    if is_offline(desk.place):
        raise RefusedError(f"{ask.model} is not fetched: hasten works offline here (HF_HUB_OFFLINE, or --offline). Start it without, or copy the model's folder below the models folder.")
    free = shutil.disk_usage(desk.place.home).free
    if fetched(ask.model) is None and free < card.bytes:
        raise OutputError(f"{ask.model} takes about {card.bytes / GB:.0f} GB and {free / GB:.0f} GB are free. Make room, or set HF_HOME to another disk.")
    report.phase(f"Fetching about {REMOTE[ask.model].size:.0f} GB")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(ask.model, allow_patterns=WANTED, ignore_patterns=LEFT_OUT)
    except Exception as error:
        said = " ".join(str(error).split())[:240]
        raise ModelError(f"Fetching {ask.model} failed ({type(error).__name__}: {said}). Check the network and your access rights; what has come stays.") from error
    from hasten.pipelines.loading import check_name

    check_name(folder)
    return {"model": ask.model}
