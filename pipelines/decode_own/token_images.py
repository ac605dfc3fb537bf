"""Images written token by token, row by row, by a causal language model on a codebook: `generate` of transformers, and any drafter.

Shapes: B images of L tokens, S x S grey pixels; K codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

import torch
from torch import Tensor

from hasten.errors import ModelError, UsageError
from hasten.pipelines import tiny_models
from hasten.pipelines.masked_codes import Codebook, Words
from hasten.pipelines.masked_images import Output, shown
from hasten.pipelines.quiet import no_bars, quiet
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.recipe import Recipe


@dataclass(frozen=True, slots=True)
class TokenImageOutput:
    """images: as `output_type` says. codes int64 [B, L]. report: of the drafts; None without a recipe."""

    images: Any
    codes: Tensor
    report: Any = None

    @property
    def forwards(self) -> int:
        """Of the model, for the whole batch; the first one reads the classes."""
        return self.codes.shape[1] if self.report is None else len(self.report.rounds) + 1


class TokenImagePipeline:
    """A causal language model of image tokens with its codebook. The model is used as it is."""

    def __init__(self, model: Any, codebook: Codebook) -> None:
        """Raises `ModelError` where the model's config does not say which tokens are classes, or the codebook has other numbers of
        codes."""
        says = getattr(model.config, "hasten_images", None)
        if not isinstance(says, dict) or not {"codes", "classes"} <= set(says) or hasattr(model.config, "hasten_diffusion"):
            raise ModelError(
                f"The config of this {type(model).__name__} does not say that its tokens make images row by row. Take a model that"
                " `hasten train pretrain --config tiny-tokens` made; MaskedImagePipeline opens those of tiny-mask."
            )
        self.words = Words(says["codes"], says["classes"], tuple(says.get("names", ())))
        if len(codebook.patches) != self.words.codes:
            raise ModelError(
                f"The model has {self.words.codes} codes and the codebook {len(codebook.patches)}. They belong together: load both"
                " from one folder."
            )
        self.model, self.codebook = model, codebook

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """A bundled model, or a folder that `hasten train pretrain --config tiny-tokens` wrote; nothing is fetched.

        device: None is the CPU. dtype: None is float32. Raises `ModelError` where it is no such model.
        """
        from transformers import AutoModelForCausalLM

        folder = tiny_models.path(str(name_or_path)) if str(name_or_path) in tiny_models.names() else Path(name_or_path)
        codebook, library = Codebook.load(folder), AutoModelForCausalLM
        more: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": dtype or torch.float32}
        with quiet("transformers.utils.import_utils"), no_bars():
            model: Any = library.from_pretrained(str(folder), **more)
        return cls(model.eval().to(device or "cpu"), codebook)

    @property
    def config(self) -> Any:
        """The model's; `tiny_models.call_defaults` finds a bundled model's call by it."""
        return self.model.config

    @property
    def row(self) -> int:
        """Tokens of a row of the image: `SpeculativeJacobi.row`."""
        return int(self.codebook.side // self.codebook.patch)

    @torch.no_grad()
    def __call__(
        self, classes: Sequence[int | str] | int | str, *, recipe: str | Path | Recipe | None = None, temperature: float = 1.0,
        top_k: int = 0, seed: int | None = None, output_type: Output = "pil",
    ) -> TokenImageOutput:  # fmt: skip
        """An image for each of `classes`: numbers from 0 to C - 1 (C: no class), or words that name one ("a seven").

        recipe: one that drafts, by name or as a `Recipe`; None writes token by token. temperature: of the tokens, 0 takes the
        most probable. top_k: tokens that are drawn from, 0 for all. seed: of PyTorch's generator, which is put back afterwards;
        None goes on with it. output_type: PIL images, float32 array [B, S, S, 1] or tensor [B, 1, S, S] in [0, 1].

        Raises `UsageError` for classes that there are none of, a negative temperature or top_k, and another output_type.
        """
        given = [classes] if isinstance(classes, int | str) else list(classes)
        told = [self.words.class_of(one) if isinstance(one, str) else one for one in given]
        self._check(told, temperature, top_k, output_type)
        ids = torch.tensor(told, device=self.model.device)[:, None] + self.words.codes
        call: dict[str, Any] = {"do_sample": temperature > 0, "suppress_tokens": list(self.words.never), "pad_token_id": self.words.mask}
        if temperature > 0:
            call |= {"temperature": temperature, "top_k": top_k}
        slots = self.codebook.slots
        call |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": slots, "min_new_tokens": slots}
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            codes, report = self._write(ids, recipe, call)
        return TokenImageOutput(shown(self.codebook.decode(codes), output_type), codes, report)

    def _check(self, told: list[int], temperature: Any, top_k: Any, output_type: str) -> None:
        odd = [number for number in told if not 0 <= number <= self.words.classes]
        if odd or not told:
            raise UsageError(
                f"classes must be numbers from 0 to {self.words.classes - 1} ({self.words.classes}: none), got {odd or told}."
            )
        if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
            raise UsageError(f"temperature must be a number, 0 or more (1: the model's own law), got {temperature!r}.")
        if not isinstance(top_k, int) or top_k < 0:
            raise UsageError(f"top_k must be a whole number, 0 (all tokens) or more, got {top_k!r}.")
        if output_type not in get_args(Output):
            raise UsageError(f"output_type must be one of {', '.join(get_args(Output))}, got {output_type!r}.")

    def _write(self, ids: Tensor, recipe: str | Path | Recipe | None, call: dict[str, Any]) -> tuple[Tensor, Any]:
        """Codes int64 [B, L], and the report."""
        if recipe is None:
            return self.model.generate(ids, **call)[:, 1:], None
        from hasten.pipelines.decode.attach import attach

        with attach(self.model, find_recipe(recipe)) as run:
            codes = self.model.generate(ids, **call)[:, 1:]
            return codes, run.report()
