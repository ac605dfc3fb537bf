"""Train a text model from scratch: encode the sources, then one plateau of Muon and AdamW; an ordinary folder.

What comes out is a `LlamaForCausalLM` with its tokenizer, as `save_pretrained` writes them, in 16 bits. A model that
reads both ways is the same class under a 4-D attention mask: `config.hasten_diffusion` says which mask, and
`config.mask_token_id` which token stands for "not yet written".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.state import claimed, replace_folder
from hasten.distill.pretrain.task import Stages, Task, Weights, step_seed
from hasten.distill.pretrain.text_config import TextPretrainConfig, TrainingConfig
from hasten.distill.pretrain.text_data import encode_code
from hasten.distill.pretrain.text_objective import TextObjective
from hasten.distill.pretrain.text_tokenizer import SHA256, load_tokenizer
from hasten.errors import UsageError

STDLIB = "stdlib"


def pretrain_text(
    config: TextPretrainConfig,
    *,
    out: Path,
    data: str = STDLIB,
    resume: bool = False,
    threads: int | None = None,
    checkpoint_seconds: float = 180.0,
    progress: bool = True,
    stop_after: int | None = None,
) -> Path:
    """Train `config` on list tasks and on `data` (`stdlib`, or a folder of .py files); the finished model's folder.

    `out` receives `code.safetensors`, `checkpoints/text/` (with the log), `latest/` (a complete model of the averaged
    weights, renewed at every checkpoint) and finally `model/`. `resume` goes on from there, bit-identically on the
    CPU; the configuration may then differ in `training.steps` only. `stop_after` ends early, as a kill right after
    a checkpoint would. `threads` sets PyTorch's CPU threads.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    root = None if data == STDLIB else Path(data)
    if root is not None and not root.is_dir():
        raise UsageError(f"There is no data folder {data}. Name one with .py files, or say {STDLIB}.")
    stages = Stages(out, checkpoint_seconds, progress)
    wanted = {"tokenizer": SHA256, "source": STDLIB if root is None else "folder", **config.model_dump(mode="json")}
    with claimed(out, wanted, resume, ("training.steps",)):
        tokenizer = load_tokenizer()
        code = encode_code(tokenizer, out, root)["train"] if config.code is not None else None
        objective = TextObjective(config, tokenizer, code, stages.device)
        return _train(config, out, tokenizer, objective, stages, resume, stop_after)


def _train(
    config: TextPretrainConfig,
    out: Path,
    tokenizer: Any,
    objective: TextObjective,
    stages: Stages,
    resume: bool,
    stop_after: int | None,
) -> Path:
    c = config.training
    torch.manual_seed(step_seed(config.seed, "text", -1))
    model = build_model(config, tokenizer).to(stages.device).train()

    def export(weights: Weights, step: int, folder: Path = out / "latest") -> None:
        replace_folder(folder, lambda part: save_model(config, tokenizer, weights, step, part))

    def loss(step: int) -> Tensor:
        return objective(model, step)

    task = Task("text", model, optimizers(model, c), loss, settings(c), export, lambda: objective.last)
    weights = stages.run(task, resume, stop_after)
    if stop_after is not None and stop_after < c.steps:
        return out / "latest"
    export(weights, c.steps, out / "model")
    return out / "model"


def build_model(config: TextPretrainConfig, tokenizer: Any) -> Any:
    """The transformer with fresh weights from PyTorch's global generator, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = config.model
    diffusion: dict[str, Any] = {"kind": c.attention, "shifted": c.shifted}
    if c.block is not None:
        diffusion["block"] = c.block
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=c.width,
            intermediate_size=c.ffn,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.heads,
            max_position_embeddings=c.positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            mask_token_id=tokenizer.mask_token_id,
            hasten_diffusion=diffusion,
        )
    )


def save_model(
    config: TextPretrainConfig, tokenizer: Any, weights: Weights, step: int, folder: Path
) -> None:
    """Weights, configuration and tokenizer as transformers reads them. Stored in float16, loaded as float32."""
    twin = build_model(config, tokenizer)
    twin.load_state_dict(weights)
    twin.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # 16 bits are for the disk: the values compute in float32 unless asked otherwise
    _amend(folder / "config.json", dtype="float32")
    # transformers 4 does not know the name that 5 writes here
    _amend(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=config.model.positions,
    )
    (folder / "training.json").write_text(json.dumps({"step": step}))


def _amend(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2) + "\n")


def optimizers(model: nn.Module, c: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embeddings and norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(inner, lr=c.muon_lr, weight_decay=c.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=c.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def settings(c: TrainingConfig) -> TrainSettings:
    """Of the trainer."""
    return TrainSettings(
        steps=c.steps, batch=1, lr=c.lr, warmup=c.warmup, cooldown=c.cooldown, clip=c.clip, average=c.ema, precision=c.precision,
    )  # fmt: skip
