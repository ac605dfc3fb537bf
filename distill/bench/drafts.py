"""What a causal text student drafts, and how much of it the model itself would have written.

Shapes: B texts of up to L tokens; drafts int64 [B, L]: accepted drafts behind each place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hasten.distill.methods import medusa, mtp, ppd
from hasten.distill.text.roles import TextCall, TextRole, Texts
from hasten.errors import UsageError
from hasten.pipelines.text_models.families import choose

MASKS = 4
"""Masks that a student of `mtp` is given."""


def medusa_drafts(folder: Path, network: Any, texts: Texts) -> Tensor:
    """Accepted drafts behind each place, int64 [B, L]; place t: the text up to there is written, the next one is the model's."""
    with safe_open(folder / medusa.FILE, framework="pt") as file:
        count = int(file.metadata()["heads"])
    call = TextCall.of(choose(network))
    heads = medusa.MedusaHeads(network.config.hidden_size, count)
    heads.load_state_dict(load_file(folder / medusa.FILE))
    found = torch.zeros_like(texts.ids)
    asked = (texts.place + 1 >= texts.start[:, None]) & (texts.place + 2 < texts.end[:, None])
    found[asked] = medusa.accepted(call, heads, texts)
    return found.roll(1, 1)


def mtp_drafts(folder: Path, network: Any, texts: Texts, masks: int) -> Tensor:
    """The same of masks behind each place."""
    from peft import PeftModel

    base = PeftModel.from_pretrained(network, str(folder)).get_base_model().eval()
    role = TextRole("student", TextCall.of(choose(base)), None, ("default",), False)
    head = mtp.SamplerHead(network.config.hidden_size)
    head.load_state_dict(load_file(folder / mtp.FILE))
    found = torch.zeros_like(texts.ids)
    for shift in range(int((texts.end - texts.start).max()) - 1):
        cut = texts.start + shift
        mine = (cut < texts.end - 1).nonzero()[:, 0]
        some = Texts(texts.ids[mine], texts.start[mine], texts.end[mine])
        found[mine, cut[mine]] = mtp.accepted(role, head, some, cut[mine], masks, network.config.mask_token_id)
    return found


def ppd_drafts(folder: Path, network: Any, texts: Texts) -> Tensor:
    """The same of prompt tokens behind each place."""
    prompts = load_file(folder / ppd.FILE)["weight"]
    call, found = TextCall.of(choose(network)), torch.zeros_like(texts.ids)
    for shift in range(int((texts.end - texts.start).max()) - 1):
        at = (texts.start - 1 + shift).minimum(texts.end - 1)
        mine = (at < texts.end - 2).nonzero()[:, 0]
        if len(mine):
            some = Texts(texts.ids[mine], texts.start[mine], texts.end[mine])
            found[mine, at[mine] + 1] = ppd.accepted(call, prompts, some, at[mine, None])[:, 0]
    return found


def drafted(folder: Path, network: Any, texts: Texts, masks: int = MASKS) -> Tensor:
    """By what is in the folder. Raises `UsageError` for one of another kind of student."""
    if (folder / medusa.FILE).exists():
        return medusa_drafts(folder, network, texts)
    if (folder / ppd.FILE).exists():
        return ppd_drafts(folder, network, texts)
    if (folder / mtp.FILE).exists():
        return mtp_drafts(folder, network, texts, masks)
    raise UsageError(f"'{folder}' holds no student that drafts tokens (medusa, mtp, ppd). Name the `student/` folder of a training.")
