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
from hasten.caching.store import KVStore, Pass
from hasten.canvas import Canvas
from hasten.errors import ModelError, RefusedError, UsageError
from hasten.pipelines import tiny_models
from hasten.pipelines.masked_codes import Codebook, Words
from hasten.pipelines.quiet import quiet
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.recipes.text_images import maskgit
from hasten.pipelines.text.loop import Tally, TextLoop
from hasten.pipelines.text_models.families import choose
from hasten.pipelines.text_models.host import TextHost
from hasten.recipe import Recipe
from hasten.samplers.scores import Draw

Output = Literal["pil", "np", "pt"]

AXES = ("commit", "blocks", "kv")
"""Axes that act on images written token by token. Those that a recipe leaves open are `maskgit`'s."""


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
        self.words = Words(says["codes"], says["classes"], tuple(says.get("names", ())))
        if len(codebook.patches) != self.words.codes:
            raise ModelError(
                f"The model has {self.words.codes} codes and the codebook {len(codebook.patches)}. They belong together:"
                " load both from one folder."
            )
        self.model, self.codebook = model, codebook
        self.host: TextHost = choose(model)
        self.host.facts = replace(self.host.facts, forbidden=self.words.never)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """A bundled model, or a folder that `hasten train pretrain --config tiny-mask` wrote; nothing is fetched.

        device: None is the CPU. dtype: None is float32. Raises `ModelError` where it is no masked image model.
        """
        folder = tiny_models.path(str(name_or_path)) if str(name_or_path) in tiny_models.names() else Path(name_or_path)
        codebook = Codebook.load(folder)
        from transformers import AutoModelForCausalLM

        library: Any = AutoModelForCausalLM
        more = {"local_files_only": True, "use_safetensors": True}
        with quiet("transformers.utils.import_utils"):
            model = library.from_pretrained(str(folder), dtype=dtype or torch.float32, **more)
        return cls(model.eval().to(device or "cpu"), codebook)

    @property
    def config(self) -> Any:
        """The model's; `tiny_models.call_defaults` finds a bundled model's call by it."""
        return self.model.config

    @torch.no_grad()
    def __call__(
        self, classes: Sequence[int | str] | int | str, *, recipe: str | Path | Recipe | None = None,
        guidance_scale: float = 1.0, temperature: float = 1.0, generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: Output = "pil", callback: Callable[[int, Canvas], None] | None = None,
    ) -> MaskedImageOutput:  # fmt: skip
        """An image for each of `classes`: numbers from 0 to C - 1 (C: no class), or words that name one ("a seven").

        recipe: a name, a YAML file or a `Recipe`; None is `maskgit`. guidance_scale: logits are those without a class plus
        this times what the class adds; 1 costs nothing. temperature: of the tokens, 0 takes the most probable. generator:
        one, or one for each image; an image does not depend on the others of its batch. output_type: PIL images, float32
        array [B, S, S, 1] or tensor [B, 1, S, S] in [0, 1]. callback: after each step, with its number and the canvas.

        Raises `UsageError` for classes that there are none of, a negative scale or temperature, another output_type and a
        recipe for other models; `RefusedError` for guidance with a cache that follows one evaluation layer by layer.
        """
        given = [classes] if isinstance(classes, int | str) else list(classes)
        told = [self.words.class_of(one) if isinstance(one, str) else one for one in given]
        self._check(told, guidance_scale, temperature, output_type)
        found = fitting(find_recipe(recipe) if recipe is not None else maskgit(), guidance_scale != 1)
        device = self.host.device
        prompts = [torch.tensor([self.words.codes + number]) for number in told]
        canvas = Canvas.of(prompts, [self.codebook.slots] * len(told), self.host.facts, device)
        draw = Draw(noise.seeds(generator, len(told)).to(device), temperature)
        guided = None if guidance_scale == 1 else Guided(self.host, self.words, canvas, guidance_scale)
        loop = TextLoop(self.host, found, canvas, draw, evaluate=guided)
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


def fitting(recipe: Recipe, guided: bool) -> Recipe:
    """The recipe with `maskgit`'s parts on the axes that it leaves open, if it can act on images written token by token.

    Raises `UsageError` or `RefusedError`.
    """
    name = f"Recipe {recipe.name!r}" if recipe.name else "The recipe"
    others = [axis for axis in recipe.axes if axis not in AXES]
    if others:
        raise UsageError(
            f"{name} sets {' and '.join(others)}, and images written token by token have {', '.join(AXES)} only. Take maskgit,"
            " recap-tokens, or another way of text diffusion without revise and verify."
        )
    if guided and isinstance(recipe.kv, TokenKV) and recipe.kv.layered:
        raise RefusedError(
            f"guidance_scale evaluates each image twice, and the cache {recipe.kv.kind!r} decides layer by layer about one"
            " evaluation. Take another cache, or guidance_scale=1."
        )
    base = maskgit()
    return recipe.model_copy(update={axis: part for axis, part in base.axes.items() if axis not in recipe.axes})


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
