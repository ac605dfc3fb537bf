"""Texts whose tokens may stand in another order: of those that the teacher takes for as good, what the student is surest of.

Where many texts are right (any order of a list), the teacher's own is one of them at random, and nobody can know it before
it is written: a student that is to write it at once learns nothing. So the student proposes: it is shown a block of masks, and
the block's own tokens are dealt to the slots where it finds them likeliest. The teacher judges: it reads both orders under the
same masks, and the proposal is learned where it is as likely, up to a tolerance.

Shapes: B texts of at most L tokens, n slots of a block; V logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.distill.text.roles import TextRole, Texts


@torch.no_grad()
def reordered(
    student: TextRole, teacher: TextRole, texts: Texts, words: Tensor, first: Tensor, mask: int, slack: float
) -> tuple[Tensor, Tensor]:
    """ids int64 [B, L] with the tokens of `words` (bool [B, L]: those of a block that may change places) in another order where
    that is as good; and in which rows they are, bool [B]. What is behind the last of them is masked for both.

    first: bool [B, L] within `words`; the teacher is asked for these tokens, and then for the others. slack: nats per token.
    """
    behind = (words.long().cumsum(1) == words.sum(1, keepdim=True)) & ~words
    shown = texts.ids.masked_fill(behind, mask)
    proposed = dealt(student.logits(shown.masked_fill(words, mask), texts.end, words), shown, words)
    asked, both = torch.cat([first, words & ~first]).repeat(2, 1), torch.cat([shown, shown, proposed, proposed])
    said = teacher.logits(both.masked_fill(asked, mask), texts.end.repeat(4), asked)
    cross = F.cross_entropy(said, both[asked], reduction="none")
    old, new = cross.new_zeros(len(both)).index_add(0, asked.nonzero()[:, 0], cross).view(2, 2, -1).sum(1)
    taken = (new - old) / words.sum(1).clamp(min=1) <= slack
    ids = torch.where(words & taken[:, None], proposed, texts.ids)
    return ids, (ids != texts.ids).any(1)


def dealt(logits: Tensor, ids: Tensor, inside: Tensor) -> Tensor:
    """ids int64 [B, L] with the tokens of `inside` dealt anew: again and again, the surest of all pairs of a slot and a token.

    logits float32 [slots of all rows, V], row after row.
    """
    rows, most = len(ids), int(inside.sum(1).max())
    row, at = inside.nonzero(as_tuple=True)
    number = inside.long().cumsum(1)[inside] - 1  # of a slot within its row
    tokens = torch.zeros(rows, most, dtype=torch.int64, device=ids.device)
    tokens[row, number] = ids[inside]
    there = torch.zeros(rows, most, dtype=torch.bool, device=ids.device)
    there[row, number] = True
    sure = torch.full((rows, most, most), -torch.inf, device=ids.device)
    sure[row, number] = logits.log_softmax(1).gather(1, tokens[row])
    sure = sure.masked_fill(~there[:, None], -torch.inf)
    found, every = tokens.clone(), torch.arange(rows, device=ids.device)
    for _ in range(most):
        best = sure.flatten(1).argmax(1)
        slot, token = best // most, best % most
        real = torch.isfinite(sure[every, slot, token])
        found[every, slot] = torch.where(real, tokens[every, token], found[every, slot])
        sure[every, slot] = -torch.inf
        sure[every, :, token] = -torch.inf
    dealt_out = ids.clone()
    dealt_out[row, at] = found[row, number]
    return dealt_out
