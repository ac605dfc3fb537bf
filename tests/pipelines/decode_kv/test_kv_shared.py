"""Shared prefixes: exact, computed once, held once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.caching.decode.amount import Share
from hasten.caching.decode.kept import KeptCache, Shared
from hasten.errors import RefusedError
from hasten.pipelines.decode_kv.session import attach
from hasten.pipelines.decode_kv.shared import in_stages
from tests.pipelines.causal_models import build
from tests.pipelines.decode_kv.kv_contract import generated, model, open_session, text

PART = KeptCache(shared=Shared(least=8))


def prompts(rows: int, common: int, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows that begin alike, padded in front."""
    head, longest = text(1, common, seed=3)[0], max(lengths)
    ids, mask = torch.zeros(rows, longest, dtype=torch.int64), torch.zeros(rows, longest, dtype=torch.int64)
    for row, length in enumerate(lengths):
        own = torch.cat([head, text(1, length - common, seed=row + 20)[0]])
        ids[row, longest - length :], mask[row, longest - length :] = own, 1
    return ids, mask


def tokens_computed(host: Any) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    host.model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[:2])))
    return seen


CASES: dict[str, tuple[Tensor, Tensor, int]] = {
    "samples of one prompt": (*prompts(1, 10, (30,)), 4),
    "samples of two": (*prompts(2, 3, (30, 22)), 3),
    "one beginning": (*prompts(3, 16, (30, 22, 25)), 1),
    "a beginning, and samples": (*prompts(2, 16, (30, 25)), 3),
    "nothing": (*prompts(2, 2, (30, 25)), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_shared_prefixes_are_exact(name: str) -> None:
    ids, mask, times = CASES[name]
    more = {"num_return_sequences": times, "do_sample": True} if times > 1 else {}
    torch.manual_seed(1)
    plain = generated(model(), ids, mask, **more)
    torch.manual_seed(1)
    with open_session(PART) as run:
        ours = generated(model(), ids, mask, **more)
        held, each = run.last.bytes, 2 * 2 * 8 * 4 * 3  # type: ignore[union-attr]
    assert torch.equal(plain[0], ours[0])
    torch.testing.assert_close(plain[1], ours[1], atol=2e-5, rtol=2e-5)
    rows = len(ids) * times
    if name != "nothing":
        assert held < rows * (ids.shape[1] + 9) * each


def test_what_is_shared_is_computed_once() -> None:
    host = build("qwen3")
    seen = tokens_computed(host)
    ids, mask, times = CASES["a beginning, and samples"]
    with attach(host, PART):
        generated(host, ids, mask, num_return_sequences=times, do_sample=True, max_new_tokens=2)
    assert seen == [(1, 16), (2, 13), (6, 1), (6, 1)]


def test_beams_of_one_prompt_share_it() -> None:
    ids = text()
    call = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        plain = model().generate(ids, **call)
        with open_session(PART):
            assert torch.equal(plain, model().generate(ids, **call))


def test_stages_cover_each_prompt_once() -> None:
    for ids, mask, times in CASES.values():
        ids, mask = ids.repeat_interleave(times, 0), mask.repeat_interleave(times, 0).bool()
        stages = in_stages(ids, mask, 8)
        texts: list[list[int]] = [[]]
        for stage in stages:
            valid = torch.ones_like(stage.ids, dtype=torch.bool) if stage.valid is None else stage.valid
            texts = [before + row[real].tolist() for before, row, real in zip(texts * (len(stage.ids) // len(texts)) if len(texts) == 1
                     else texts, stage.ids, valid, strict=True)]  # fmt: skip
            texts = [one for one in texts for _ in range(stage.times)]
        assert texts == [row[real].tolist() for row, real in zip(ids, mask, strict=True)]


def test_what_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="without amount"):
        KeptCache(shared=Shared(), amount=Share())
    with pytest.raises(RefusedError, match="sliding window"):
        attach(build("mistral-window"), PART)
