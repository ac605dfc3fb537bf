"""Looking at a student while it learns: sheets of its pictures beside the teacher's, and whether they become alike.

Both start from the same noise and prompts, which follow from the seed. The student has its averaged weights, which are what is
exported. The teacher's samples are made once.

Shapes: S samples; z, x0 [S, ...] in the network's scale; pictures float [H, W, 3] in [0, 1], of a clip several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hasten.atomic import replacing
from hasten.distill.data.encode import decode
from hasten.distill.data.store import Store
from hasten.distill.data.teach import make_pairs
from hasten.distill.loop import processes
from hasten.distill.loop.draw import Draw
from hasten.distill.loop.trainer import Trainer
from hasten.distill.network import few_steps
from hasten.distill.network.hint import Hinted
from hasten.distill.network.roles import Role
from hasten.pipelines.judge import recall
from hasten.session import Attachment

FRAMES = 6
"""Of a clip so many frames are shown, evenly."""

GAP = 2
"""White pixels between pictures."""


@dataclass
class Samples:
    """What `Trainer.watch` may be: every `settings.samples_every` steps and at the end, `out/samples/STEP.png` (upper rows the
    teacher, lower ones the student), and `recall` for the log where `settings.recall` samples are asked for.

    pipe: the teacher's pipeline; call: how it is called; prompts: of which the first ones are shown.
    """

    pipe: Any
    call: Mapping[str, Any]
    prompts: Sequence[str]
    shown: Store | None = None

    def __call__(self, step: int, trainer: Trainer) -> dict[str, float]:
        s = trainer.settings
        alone = processes.rank() > 0 and not s.shard  # weights in parts are whole only while all evaluate
        if alone or not s.samples_every or ((step + 1) % s.samples_every and step + 1 < s.steps):
            return {}
        with torch.no_grad(), trainer.players["student"].averaged():
            self._sheet(step, trainer)
            return self._recall(trainer) if s.recall else {}

    def _sheet(self, step: int, trainer: Trainer) -> None:
        if self.shown is None:
            with trainer.roles["teacher"].playing():
                few = tuple(self.prompts[: trainer.settings.samples])
                self.shown = make_pairs(self.pipe, few, len(few), seed=trainer.settings.seed, **self.call)
        assert self.shown.z is not None and self.shown.x0 is not None
        made = self._made(trainer, self.shown)
        rows = [decode(self.pipe, x0, self.call) for x0 in (self.shown.x0, made)]
        if processes.rank() == 0:
            folder = trainer.out / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / f"{step + 1:06d}.png") as aside:
                sheet([[_frames(picture) for picture in row] for row in rows]).save(aside)

    def _made(self, trainer: Trainer, data: Store) -> Tensor:
        """The student's samples x0 [S, ...] of the noise of `data`."""
        steps, device = trainer.state.sampler(), next(trainer.roles["teacher"].host.network.parameters()).device
        assert data.z is not None
        if steps is None:
            return self._by_pipeline(trainer.state.student(), data)
        draw = Draw(trainer.settings.seed, 0, range(len(data)), device)
        condition = data.conditions.rows(data.prompt).to(device)
        return few_steps.sample(
            trainer.state.student(), data.z.to(device).float(), condition, steps, lambda call, x: draw.normal(f"sheet.{call}", x)
        ).cpu()

    def _by_pipeline(self, student: Any, data: Store) -> Tensor:
        """Samples of a student that is sampled like its teacher: the pipeline, with the student in the teacher's place. One
        that guides itself is called without guidance."""
        role: Role = student.role if isinstance(student, Hinted) else student
        assert data.z is not None
        off = {name: 1.0 for name in ("guidance_scale", "true_cfg_scale") if name in self.call and role is not student}
        hold = Attachment()
        hold.replace(self.pipe, role.host.site, role.host.network)
        try:
            with role.playing():
                made = self.pipe(**{**self.call, **off}, prompt=[data.prompts[row] for row in data.prompt], latents=data.z.to(role.host.dtype),
                                 output_type="latent")[0]  # fmt: skip
        finally:
            hold.restore()
        return torch.as_tensor(made).cpu()

    def _recall(self, trainer: Trainer) -> dict[str, float]:
        """Share of the data's latents that lie within the student's, by nearest neighbours."""
        data = trainer.data
        if not isinstance(data, Store) or data.x0 is None or trainer.state.sampler() is None:
            return {}
        count = min(trainer.settings.recall, len(data))
        rows = Draw(trainer.settings.seed, 0, ()).order("recall", len(data))[:count]
        like = data.x0[rows]
        z = Draw(trainer.settings.seed, 0, range(count)).normal("recall.noise", like.float())
        asked = Store(data.prompts, data.conditions, data.empty, data.prompt[rows], None, z, data.shape)
        made = self._made(trainer, asked)
        return {"recall": recall(like.float().flatten(1), made.float().flatten(1))}


def sheet(rows: Sequence[Sequence[np.ndarray[Any, Any]]]) -> Image.Image:
    """Pictures [T, H, W, 3] in [0, 1] as one: a line for each row where they are still, otherwise a line of frames for each
    sample of each row, the rows' samples in turn."""
    moving = any(len(picture) > 1 for row in rows for picture in row)
    lines = [list(picture) for pair in zip(*rows, strict=True) for picture in pair] if moving else [
        [picture[0] for picture in row] for row in rows
    ]  # fmt: skip
    height, width = lines[0][0].shape[:2]
    step = (height + GAP, width + GAP)
    whole = np.ones((len(lines) * step[0] - GAP, len(lines[0]) * step[1] - GAP, 3))
    for y, line in enumerate(lines):
        for x, picture in enumerate(line):
            whole[y * step[0] : y * step[0] + height, x * step[1] : x * step[1] + width] = picture
    return Image.fromarray((whole.clip(0, 1) * 255).round().astype(np.uint8))


def _frames(picture: Any) -> np.ndarray[Any, Any]:
    """[T, H, W, 3] of a picture, or of some frames of a clip."""
    found: np.ndarray[Any, Any] = np.asarray(picture, dtype=np.float32)
    if found.ndim == 3:
        return found[None]
    shown: np.ndarray[Any, Any] = found[np.linspace(0, len(found) - 1, min(FRAMES, len(found))).round().astype(int)]
    return shown
