"""The text diffusion model while it drafts.

Shapes: B rows, K places of the block, M guesses for each, V tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hasten.errors import RefusedError
from hasten.pipelines.decode_own.diffusion_draft import DiffusionDraft
from hasten.pipelines.text_models.families import choose
from hasten.pipelines.text_models.host import TextHost
from hasten.pipelines.text_models.loading import open_text
from hasten.pipelines.tiny_models import names, path
from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Context, Facts
from hasten.samplers.drafters.contexts import Contexts
from hasten.samplers.drafters.host_tree import HostState, HostTree
from hasten.samplers.drafters_own.lattice import Guesses, best_paths

TOKENIZER = "tokenizer.json"


class DiffusionState(HostState):
    """The state of a `DiffusionDraft`."""

    def __init__(self, part: DiffusionDraft, facts: Facts) -> None:
        self.part, self.sources = part, (part.kind,)
        if part.model not in facts.kept:
            facts.kept[part.model] = opened(part.model, facts)
        self.host: TextHost = facts.kept[part.model]
        self.proxies = [Contexts(1, 3) for _ in range(facts.rows)]
        self.lattice: list[list[Guesses]] = []

    def propose(self, context: Context, nodes: int) -> Proposal:
        self.lattice = self._lattice(context, max(1, min(self.part.masks, nodes, context.reach)))
        return super().propose(context, nodes)

    def grow(self, row: int, text: list[int], tree: HostTree) -> None:
        proxy, part = self.proxies[row], self.part
        proxy.read(text)
        lattice = self.lattice[row][: tree.depth]
        found = best_paths(lattice, text[-3:], lambda tail: dict(proxy.after(tail[-3:], 16)), part.beam, part.weight)
        chances = [dict(guesses) for guesses in lattice]
        for line, _ in found[: part.paths]:
            at: int | None = 0
            for place, token in enumerate(line):
                at = None if at is None else tree.child(at, token, chances[place][token])

    def _lattice(self, context: Context, masks: int) -> list[list[Guesses]]:
        """What the model says of `masks` places behind each row. Rows of one length are evaluated together, without padding."""
        found: list[list[Guesses]] = [[] for _ in context.texts]
        shown = [text[-self.part.reads :] for text in context.texts]
        facts = self.host.facts
        for length in sorted({len(text) for text, active in zip(shown, context.active, strict=True) if active}):
            mine = [row for row, text in enumerate(shown) if len(text) == length and context.active[row]]
            ids = torch.tensor([shown[row] + [facts.mask_id] * masks for row in mine], device=self.host.device)
            said: Tensor = self.host.own(ids)  # type: ignore[attr-defined]  # a family, see `opened`
            said = said[:, length - 1 : -1] if facts.shifted else said[:, length:]
            said = said.float().index_fill(2, torch.tensor(sorted(facts.forbidden), device=said.device), -torch.inf)
            chances, tokens = said.softmax(-1).topk(self.part.width, -1)
            for row, each, likely in zip(mine, tokens.tolist(), chances.tolist(), strict=True):
                found[row] = [list(zip(*place, strict=True)) for place in zip(each, likely, strict=True)]
        return found


def opened(model: str, facts: Facts) -> TextHost:
    """The drafting model, on the verifying one's device. Raises `RefusedError` where their tokens are not the same."""
    network, tokenizer = open_text(model, None, str(facts.device), None)
    host = choose(network.requires_grad_(False), tokenizer)
    if not hasattr(host, "own"):
        raise RefusedError(f"diffusion-draft: {type(network).__name__} gives no logits of whole texts, so that it cannot draft.")
    mine = _tokenizer(facts.host.config.name_or_path)
    theirs = _tokenizer(model)
    same = mine == theirs if mine and theirs else facts.vocabulary == network.config.vocab_size
    if not same:
        raise RefusedError(
            f"diffusion-draft: {model!r} has another tokenizer than this {type(facts.host).__name__}, and its tokens mean nothing"
            " here. Take a drafter with the same one, or look-up, which needs no model."
        )
    return host


def _tokenizer(name: str) -> bytes | None:
    """The tokenizer file of a model, None where it is not known."""
    folder = path(name) if name in names() else Path(name or "nowhere").expanduser()
    file = folder / TOKENIZER
    return file.read_bytes() if file.is_file() else None
