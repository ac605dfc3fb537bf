"""Images written token by token in any order, on the loop that writes texts: classes in, images out.

Shapes: B images of L tokens, S x S grey pixels; K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from hasten import noise
from hasten.caching.kv import TokenKV
from hasten.caching.kv_scattered import Groups
from hasten.caching.store import KVStore, Pass
from hasten.canvas import Canvas
from hasten.errors import ModelError, UsageError
from hasten.pipelines.masked_codes import Codebook, Words
from hasten.pipelines.text.loop import Tally, TextLoop
from hasten.pipelines.text_models.families import choose
from hasten.pipelines.text_models.host import TextHost
from hasten.recipe import Recipe
from hasten.samplers.commit import Unmask
from hasten.samplers.commit_images import Annealed, Curve
from hasten.samplers.scores import Draw
from hasten.samplers.text_blocks import InBlocks, Whole

Output = Literal["pil", "np", "pt"]


def maskgit(steps: int = 12, temperature: float = 4.5, power: float | None = None, kv: TokenKV | None = None) -> Recipe:
    """MaskGIT: a cosine (or 1 - r^power) of open slots, the surest first with noise that fades out, everything computed."""
    commit = Unmask(rule=Curve(steps=steps, power=power), score=Annealed(steps=steps, temperature=temperature))
    return Recipe(commit=commit, blocks=InBlocks(rule=Whole()), kv=kv, paper="MaskGIT, arXiv 2202.04200")


def recap(
    steps: int = 16, temperature: float = 4.5, power: float | None = None, local: int = 1, full: int | None = None
) -> Recipe:
    """ReCAP: the same, and behind the first `full` steps (half of them) only those slots whose turn it is are computed."""
    groups = Groups(local=local, full=steps // 2 if full is None else full)
    return maskgit(steps, temperature, power, groups).model_copy(update={"paper": "ReCAP, arXiv 2505.19089"})


@dataclass(frozen=True, slots=True)
class MaskedImageOutput:
    """images: as `output_type` says. codes int64 [B, L]. tally: what it cost, evaluations without a class not among it
    (they cost as much again where there is guidance)."""

    images: Any
    codes: Tensor
    tally: Tally


class MaskedImagePipeline:
    """A masked image model with its codebook. The model is used as it is, and is the caller's afterwards."""

    def __init__(self, model: Any, codebook: Codebook) -> None:
        """Raises `ModelError` where the model's config does not say which tokens are classes, or the codebook has other
        numbers of codes."""
        says = getattr(model.config, "hasten_images", None)
        if not isinstance(says, dict) or not {"codes", "classes"} <= set(says):
            raise ModelError(
                f"The config of this {type(model).__name__} does not say how its tokens make images: hasten_images ="
                ' {"codes": ..., "classes": ...} is missing. Take a model that `hasten train pretrain --config tiny-mask` made.'
            )
        self.words = Words(says["codes"], says["classes"])
        if len(codebook.patches) != self.words.codes:
            raise ModelError(
                f"The model has {self.words.codes} codes and the codebook {len(codebook.patches)}. They belong together:"
                " load both from one folder."
            )
        self.model, self.codebook = model, codebook
        self.host: TextHost = choose(model)
        self.host.facts = replace(self.host.facts, forbidden=self.words.never)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """From a folder that `hasten train pretrain --config tiny-mask` wrote. Raises `ModelError` where it is none."""
        from transformers import AutoModelForCausalLM

        codebook = Codebook.load(Path(folder))
        library: Any = AutoModelForCausalLM
        return cls(library.from_pretrained(str(folder), local_files_only=True, use_safetensors=True).eval(), codebook)

    @torch.no_grad()
    def __call__(
        self, classes: Sequence[int] | int, *, recipe: Recipe | None = None, guidance_scale: float = 1.0,
        temperature: float = 1.0, generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: Output = "pil", callback: Callable[[int, Canvas], None] | None = None,
    ) -> MaskedImageOutput:  # fmt: skip
        """An image for each of `classes` (0 .. C - 1; C: no class).

        recipe: `maskgit` by default. guidance_scale: logits are those without a class plus this times what the class
        adds; 1 costs nothing. temperature: of the tokens, 0 takes the most probable. generator: one, or one for each
        image; an image does not depend on the others of its batch. output_type: PIL images, float32 array [B, S, S, 1]
        or tensor [B, 1, S, S] in [0, 1]. callback: after each step, with its number and the canvas.

        Raises `UsageError` for classes that there are none of, a negative scale or temperature, another output_type.
        """
        told = [classes] if isinstance(classes, int) else list(classes)
        self._check(told, guidance_scale, temperature, output_type)
        device = self.host.device
        prompts = [torch.tensor([self.words.codes + number]) for number in told]
        canvas = Canvas.of(prompts, [self.codebook.slots] * len(told), self.host.facts, device)
        draw = Draw(noise.seeds(generator, len(told)).to(device), temperature)
        guided = None if guidance_scale == 1 else Guided(self.host, self.words, canvas, guidance_scale)
        loop = TextLoop(self.host, recipe or maskgit(), canvas, draw, evaluate=guided)
        loop.run((lambda number, state, *_: callback(number, state)) if callback is not None else None)
        codes = loop.canvas.ids[:, 1:]
        return MaskedImageOutput(shown(self.codebook.decode(codes), output_type), codes, loop.tally)

    def _check(self, told: list[int], scale: float, temperature: float, output_type: str) -> None:
        odd = [number for number in told if not 0 <= number <= self.words.classes]
        if odd or not told:
            raise UsageError(
                f"classes must be numbers from 0 to {self.words.classes - 1} ({self.words.classes}: none), got {odd or told}."
            )
        if not scale >= 0 or not temperature >= 0:
            raise UsageError(
                f"guidance_scale and temperature must not be negative, got {scale} and {temperature}."
            )
        if output_type not in ("pil", "np", "pt"):
            raise UsageError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}.")


class Guided:
    """Classifier-free guidance in place of one evaluation: the same slots without a class, with a store of their own."""

    def __init__(self, host: TextHost, words: Words, canvas: Canvas, scale: float) -> None:
        self.host, self.words, self.scale = host, words, scale
        self.store = KVStore(len(canvas.ids), canvas.slots, canvas.ids.device)

    def __call__(self, now: Pass, store: KVStore) -> Tensor:
        """Logits [m, R, K + C + 2]."""
        told = (now.ids >= self.words.codes) & (now.ids < self.words.nothing)
        given = self.host.run(now, store)
        without = self.host.run(replace(now, ids=torch.where(told, self.words.nothing, now.ids)), self.store)
        return without + self.scale * (given - without)


def shown(images: Tensor, output_type: Output) -> Any:
    """[B, S, S] in the form that is asked for."""
    images = images.clamp(0, 1).float()
    if output_type == "pt":
        return images[:, None]
    array = images.cpu().numpy()
    if output_type == "np":
        return array[..., None]
    from PIL import Image

    return [Image.fromarray((image * 255).round().astype("uint8")) for image in array]
