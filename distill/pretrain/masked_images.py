"""Train a model of images as tokens from scratch: a codebook by k-means, then tokens; an ordinary transformers folder.

What comes out is an unmodified `LlamaForCausalLM` that sees both ways, with its codebook and with the judge's features of
real images that it has not seen. A sample is one class token and L masked slots (MaskGIT, arXiv 2202.04200); the shares
that are masked in training are even, where MaskGIT draws them from a cosine. Positions are rotary over the row of slots.

Of kind image-tokens it is an ordinary causal `LlamaForCausalLM` that is asked for every slot, in reading order.

Shapes: n images, b of them in a batch, L slots.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.distill.data.moving_digits import Digits, Split, load_digits, render
from hasten.distill.loop.state import claimed, replace_folder
from hasten.distill.pretrain.masked_images_config import CANVAS, CLASSES, MaskedImageConfig
from hasten.distill.pretrain.task import Stages, Task, Weights, step_seed
from hasten.distill.pretrain.text_objective import masked, predict
from hasten.distill.pretrain.texts import optimizers, settings
from hasten.pipelines.judge import DIGITS, Judge
from hasten.pipelines.masked_codes import Codebook, Words

REFERENCE = 512
"""Unseen real images whose features are kept with the model."""


def pretrain_masked(
    config: MaskedImageConfig, *, out: Path, data: str = "sklearn", resume: bool = False, threads: int | None = None,
    checkpoint_seconds: float = 60.0, progress: bool = True, stop_after: int | None = None,
) -> Path:  # fmt: skip
    """Train `config` on the digits of `data` (`sklearn`, or a folder with MNIST); the finished model's folder.

    `out` receives `codes.safetensors`, `checkpoints/image/` (with the log), `latest/` (a complete model of the averaged
    weights, renewed at every checkpoint) and finally `model/`. `resume`, `stop_after`, `threads`: as in `pretrain_text`.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    stages = Stages(out, checkpoint_seconds, progress)
    wanted = {"source": "sklearn" if data == "sklearn" else "folder", **config.model_dump(mode="json")}
    with claimed(out, wanted, resume, ("training.steps",)):
        stored = prepare(config, out, data)
        return _train(config, out, stored, stages, resume, stop_after)


def _train(
    config: MaskedImageConfig, out: Path, stored: dict[str, Tensor], stages: Stages, resume: bool, stop_after: int | None
) -> Path:
    c = config.training
    torch.manual_seed(step_seed(config.seed, "image", -1))
    model = build_model(config).to(stages.device).train()

    def export(weights: Weights, step: int, folder: Path = out / "latest") -> None:
        replace_folder(folder, lambda part: save_model(config, stored, weights, step, part))

    task = Task("image", model, optimizers(model, c), lambda step: objective(config, stored, model, step), settings(c), export)
    weights = stages.run(task, resume, stop_after)
    if stop_after is not None and stop_after < c.steps:
        return out / "latest"
    export(weights, c.steps, out / "model")
    return out / "model"


# --- data -------------------------------------------------------------------------------------------


def draw_images(digits: Digits, count: int, size: int, split: Split, seed: int) -> tuple[Tensor, Tensor]:
    """`count` random digits of a split near the centre: images float32 [count, S, S] in [0, 1], classes int64 [count]."""
    g = torch.Generator().manual_seed(seed)
    rows = digits.indices(split)
    index = torch.randint(len(rows), (count,), generator=g) + rows.start
    glyphs = F.interpolate(digits.images[index].float()[:, None] / 255, size=(size, size), mode="area")[:, 0]
    place = (CANVAS - size) / 2 - 1 + 2 * torch.rand(count, 2, generator=g)
    parts = [
        render(glyph, at[:, :1], at[:, 1:], CANVAS)[:, 0]
        for glyph, at in zip(torch.split(glyphs, 4096), torch.split(place, 4096), strict=True)
    ]
    return torch.cat(parts), digits.labels[index]


def prepare(config: MaskedImageConfig, out: Path, data: str) -> dict[str, Tensor]:
    """patches [K, p * p], codes int16 [n, L], classes int64 [n], features [512, 48] of unseen images; made once."""
    file = out / "codes.safetensors"
    if not file.is_file():
        digits, c = load_digits(data), config.digits
        images, classes = draw_images(digits, c.images, c.size, "train", step_seed(config.seed, "draw", 0))
        g = torch.Generator().manual_seed(step_seed(config.seed, "codes", 0))
        book = Codebook.fit(
            images[:4000], config.codes.count, config.codes.patch, config.codes.sample, config.codes.rounds, g
        )
        unseen, _ = draw_images(digits, REFERENCE, c.size, "test", step_seed(config.seed, "reference", 0))
        stored = {
            "patches": book.patches, "codes": book.encode(images).to(torch.int16), "classes": classes,
            "features": features(unseen), "features.coded": features(book.decode(book.encode(unseen))),
        }  # fmt: skip
        aside = file.with_suffix(".part")
        save_file(stored, aside)
        aside.rename(file)
    return load_file(file)


def features(images: Tensor) -> Tensor:
    """What the judge sees in grey images [n, S, S]: [n, 48]."""
    return Judge.load().features(images[..., None].expand(-1, -1, -1, 3))


# --- model ------------------------------------------------------------------------------------------


def objective(config: MaskedImageConfig, stored: dict[str, Tensor], model: Any, step: int) -> Tensor:
    """Mean cross-entropy of the slots of a batch that are asked for, in nats; the batch is a function of seed and step."""
    c, words = config.digits, Words(config.codes.count, CLASSES)
    seed = step_seed(config.seed, "image", step)
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(len(stored["codes"]), (c.batch,), generator=g)
    dropped = torch.rand(c.batch, generator=g) < c.drop_class
    told = torch.where(dropped, words.nothing, words.codes + stored["classes"][index])
    clean = torch.cat([told[:, None], stored["codes"][index].long()], 1)
    answer = torch.ones_like(clean, dtype=torch.bool)
    answer[:, 0] = False
    asked = answer if config.kind == "image-tokens" else masked(config.model, answer, g)
    given = clean if config.kind == "image-tokens" else clean.masked_fill(asked, words.mask)
    device = next(model.parameters()).device
    logits = predict(model, config.model, given.to(device), asked.to(device))
    return F.cross_entropy(logits.float(), clean[asked].to(device))


def build_model(config: MaskedImageConfig) -> Any:
    """The transformer with fresh weights from PyTorch's global generator, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c, words = config.model, Words(config.codes.count, CLASSES)
    causal = config.kind == "image-tokens"
    own: dict[str, Any] = {} if causal else {"mask_token_id": words.mask, "hasten_diffusion": {"kind": "full", "shifted": False}}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words.size, hidden_size=c.width, intermediate_size=c.ffn, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, num_key_value_heads=c.heads, max_position_embeddings=c.positions,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=words.mask,
            **own, hasten_images={"codes": words.codes, "classes": words.classes, "names": list(DIGITS)},
        )
    )


def save_model(config: MaskedImageConfig, stored: dict[str, Tensor], weights: Weights, step: int, folder: Path) -> None:
    """Weights and configuration as transformers reads them, codebook and reference. Stored in float16."""
    twin = build_model(config)
    twin.load_state_dict(weights)
    twin.half().save_pretrained(folder)
    file = folder / "config.json"
    # 16 bits are for the disk: the values compute in float32 unless asked otherwise
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    Codebook(stored["patches"], CANVAS).save(folder)
    save_file({name: stored[name] for name in ("features", "features.coded")}, folder / "reference.safetensors")
    (folder / "training.json").write_text(json.dumps({"step": step}))
