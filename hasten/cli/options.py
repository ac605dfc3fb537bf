"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

MACHINE = "Machine and model"

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A bundled model, a folder with a model, or a hub id (the only one fetched)."
    ),
]
Call = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Further arguments of the pipeline, such as true_cfg_scale=4 or, for texts, max_new_tokens=64."),
]
Fps = Annotated[int, typer.Option(metavar="N", help="Frames per second of the files.", min=1, max=240)]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="cpu, cuda, cuda:1, mps. Default: first accelerator.", rich_help_panel=MACHINE
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="float32, bfloat16, float16. Default: bfloat16 on CUDA, else float32.",
        rich_help_panel=MACHINE,
    ),
]
Offload = Annotated[
    str,
    typer.Option(
        metavar="HOW", help="none, model or group: keep weights in main memory.", rich_help_panel=MACHINE
    ),
]
Lora = Annotated[
    str | None, typer.Option(metavar="PATH", help="LoRA weights as safetensors.", rich_help_panel=MACHINE)
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Branch, tag or commit of a hub model.", rich_help_panel=MACHINE),
]
