"""`hasten train METHOD`: one command for each way of training a student."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.cli.output import JsonOption, Output
from hasten.cli.places import writable
from hasten.cli.train_help import MethodCommand
from hasten.cli.values import assignments
from hasten.errors import UsageError

METHODS = {
    "lora": "Learn from your own pictures or clips: the plainest fine-tuning, a LoRA or (--full) all weights.",
    "pairs": "Learn what the teacher makes of stored noise, in one call or a few: the plainest distillation.",
    "lcm": "Consistency along the guided teacher's trajectory, step by step, with an averaged target (LCM).",
    "lcm-lora": "The same with the student as its own target (LCM-LoRA).",
    "scm": "Consistency without steps, by exact tangents (sCM).",
    "meanflow": "Mean velocities between any two times (MeanFlow): a flow map for any number of calls.",
    "guidance": "One evaluation in place of two: the student says at once what the guided teacher says.",
    "progressive": "Two of the teacher's steps in one, halved stage by stage.",
    "dmd": "Match the distribution of the teacher's samples, from prompts alone (DMD2): a critic models what the student makes.",
    "dmd-gan": "The same with a judge on the critic's features, who knows data.",
    "causal": "A video student that makes chunk after chunk of frames, regressed on the teacher's clips (CausVid's first stage).",
    "self-forcing": "The same student trained on clips that it has made itself, by distribution matching (Self-Forcing).",
    "magic141": "A first frame from a text, then a clip from the frame: both tasks of Magic 1-For-1 in one student.",
    "ladd": "Adversarial distillation: heads on the frozen teacher's features tell the student's samples from data.",
    "sana-sprint": "Continuous-time consistency with such heads beside it (SANA-Sprint).",
    "dydit": "Run fewer heads, channels and tokens at the times that allow it, with routers that are trained beside (DyDiT).",
    "qalora": "Weights and activations of few bits, with adapters inside the rounding (EfficientDM); no data.",
    "quest": "The same bits, with only the most sensitive layers tuned, then those that carry the time (QuEST).",
    "dcgen": "Move a model of pictures to a deeper autoencoder (DC-Gen): fewer tokens in every evaluation.",
    "block": "Turn a causal model (tiny-lm) into one that writes blocks of tokens in any order (Fast-dLLM v2).",
    "dparallel": "Make a text diffusion model sure of many tokens at once (tiny-dllm): fewer evaluations for the same text.",
    "learn2pd": "A small filter that tells which tokens of a text diffusion model (tiny-dllm) are final already (Learn2PD).",
    "medusa": "Heads on a causal model (tiny-lm) that say the tokens behind the next one; the model itself verifies them.",
    "mtp": "An adapter for mask tokens alone: a causal model (tiny-lm) says several tokens at once and stays what it was.",
    "ppd": "Prompt tokens behind a text say the tokens behind the next one (PPD); the causal model (tiny-lm) is frozen.",
    "first": "Routers that read the prompt decide which layers of a causal model (tiny-lm) its text is written with (FiRST).",
    "sorted-exits": "The first layers of a causal model (tiny-lm) are a model, too: all exits in one run (Sorted LLaMA).",
}
"""Method -> what it does, for --help; a test compares it with the methods that there are."""

EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


def add(app: typer.Typer) -> None:
    """Put a command for each method on `hasten train`."""
    for method, what in METHODS.items():
        app.command(method, cls=MethodCommand, help=what, context_settings=EXTRA)(_command(method))
    app.command("chain", context_settings=EXTRA)(_chain)


def _chain(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for data, a folder per stage, and the student.")],
    config: Annotated[Path, typer.Option(help="YAML file with model, stages (each method and train), student, data.")],
    model: Annotated[str | None, typer.Option(help="Teacher: a bundled model, a folder, or a hub id.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any value but those of stages: data.count=64.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    json: JsonOption = None,
) -> None:
    """Trainings one after the other, each beginning with the student of the one before: pairs and then dmd, say."""
    output = Output("train chain", json)
    with output.open():
        from hasten.distill.chain import load_chain, train_chain
        from hasten.distill.loop import processes

        named = _named(context.args) | ({"model": model} if model is not None else {})
        settings = load_chain(config, named | assignments(set_ or [], "--set"))
        started = time.perf_counter()
        with writable(out.absolute()):
            train_chain(settings, out, resume=resume, say=output.note)
        seconds = time.perf_counter() - started
        if not processes.first():
            return
        steps = sum(stage.train.steps for stage in settings.stages)
        output.say(_where(settings.model, out, steps, seconds))
        output.finish([{"model": settings.model, "method": "chain", "folder": str(out), "seconds": seconds}])


def _command(method: str) -> Any:
    def command(
        context: typer.Context,
        out: Annotated[Path, typer.Option("--out", "--output_dir", help="Folder for data, checkpoints and the student.")],
        config: Annotated[Path | None, typer.Option(help="YAML file with model, method, student, data, train.")] = None,
        model: Annotated[str | None, typer.Option(help="Teacher: a bundled model, a folder, or a hub id.")] = None,
        set_: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any value: train.lr=1e-4, method.calls=4.")
        ] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
        json: JsonOption = None,
    ) -> None:
        output = Output(f"train {method}", json)
        with output.open():
            from hasten.distill.loop import processes
            from hasten.distill.train_config import load_config
            from hasten.distill.training import train
            from hasten.pipelines.loading import silence

            silence()
            named = _named(context.args)
            resume = _resumed(named) or resume
            named |= {"model": model} if model is not None else {}
            settings = load_config(method, config, named | assignments(set_ or [], "--set"))
            started = time.perf_counter()
            with writable(out.absolute()):
                done = train(settings, out, resume=resume, say=output.note)
            seconds = time.perf_counter() - started
            if not processes.first():
                return
            output.say(_where(settings.model, out, settings.train.steps, seconds, settings.method))
            output.finish([{"model": settings.model, "method": method, "folder": str(out), "seconds": seconds,
                            "rows": len(done.data)}])  # fmt: skip

    return command


def _where(model: str, out: Path, steps: int, seconds: float, method: Any = None) -> str:
    """Where the student is, and how it is used. method: one that knows better (`TextMethod.used`)."""
    student = out / "student"
    if not student.is_dir():
        return f"The weights are in {out / 'latest'} after {steps} steps ({seconds:.0f} s)."
    if hasattr(method, "used"):
        return f"The student is in {student} after {steps} steps ({seconds:.0f} s). Use it: {method.used(model, student)}"
    use = f" Use it: hasten generate {model} --prompt TEXT --recipe {student / 'recipe.yaml'}"
    return f"The student is in {student} after {steps} steps ({seconds:.0f} s).{use if (student / 'recipe.yaml').is_file() else ''}"


def _resumed(named: dict[str, Any]) -> bool:
    """Whether diffusers' option for going on was among the words, which it is taken out of."""
    given = named.pop("resume_from_checkpoint", None)
    if given not in (None, "latest"):
        raise UsageError(f"--resume_from_checkpoint {given}: only 'latest' is kept, in --out. Say --resume.")
    return given is not None


def _named(words: list[str]) -> dict[str, Any]:
    """`--learning_rate 1e-4 --rank=8 --full` as a mapping; values are read as YAML. `UsageError` for stray words."""
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UsageError(f"{word!r} belongs to no option. Options are --name value or --set key=value.")
        if "=" not in word and rest and not rest[0].startswith("--"):
            word = f"{word}={rest.pop(0)}"
        found.append(word.removeprefix("--") if "=" in word else f"{word.removeprefix('--')}=true")
    return assignments(found, "option")
