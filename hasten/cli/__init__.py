"""The command line. Commands import torch and diffusers only when they run, so that help is instant."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any

import typer

from hasten.cli import (
    bench,
    bench_attention,
    bench_compose,
    bench_decode,
    bench_distill,
    bench_dllm,
    compare,
    demo,
    doctor,
    export,
    generate,
    jobs,
    profile,
    recipes,
    train,
    tune,
    ui,
)
from hasten.errors import HastenError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="hasten",
    help="Makes diffusers and transformers models generate faster, and says exactly what it skipped.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("compare")(compare.compare)
app.command("recipes")(recipes.recipes)
app.command("doctor")(doctor.doctor)
app.command("profile")(profile.profile)
app.command("tune")(tune.tune)
app.command("ui")(ui.ui)
bench.app.command("attention")(bench_attention.attention)
bench.app.command("compose")(bench_compose.compose)
bench.app.command("decode")(bench_decode.decode)
bench.app.command("distill")(bench_distill.distill)
bench.app.command("dllm")(bench_dllm.dllm)
app.add_typer(bench.app, name="bench")
app.add_typer(export.app, name="export")
app.add_typer(train.app, name="train")
app.add_typer(jobs.app, name="jobs")


def _version(wanted: bool) -> None:
    if wanted:
        from hasten import __version__

        print(f"hasten {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Makes diffusers and transformers models generate faster, and says exactly what it skipped."""


def main(args: list[str] | None = None) -> int:
    """Run one command and give its exit code: 0 ok, 1 failed, 2 wrong usage, 130 interrupted.

    Expected failures print one sentence on standard error; `HASTEN_TRACEBACK=1` adds the traceback.
    """
    try:
        code = app(args, prog_name="hasten", standalone_mode=False)
        code = code if isinstance(code, int) else OK
        if code == INTERRUPTED:
            print("Interrupted. Finished files were kept, nothing half-written is left.", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print("Interrupted. Finished files were kept, nothing half-written is left.", file=sys.stderr)
        return INTERRUPTED
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        if os.environ.get("HASTEN_TRACEBACK") == "1":
            import traceback

            traceback.print_exc()
        message, code = explain(error)
        if message:
            print(message, file=sys.stderr)
        return code


def explain(error: BaseException) -> tuple[str, int]:
    """The sentence and the exit code for an exception."""
    if isinstance(error, HastenError):
        return f"error: {error}", error.exit_code
    if type(error).__name__ == "Abort":
        return "Interrupted.", INTERRUPTED
    if hasattr(error, "format_message"):  # typer's own and, before typer 0.20, click's usage errors
        return _usage(error), int(getattr(error, "exit_code", USAGE))
    if isinstance(error, BrokenPipeError):
        # Whoever read standard output has left; there is nobody to tell, and Python must not try to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "", FAILED
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            "error: The disk is full. Free some space, or name another folder; nothing half-written is left.",
            FAILED,
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            "error: Out of memory. Ask for a smaller size, fewer frames, --dtype bfloat16, or --offload model.",
            FAILED,
        )
    return (
        f"error: {type(error).__name__}: {_first_line(error)} This was not expected; HASTEN_TRACEBACK=1 shows where."
    ), FAILED


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0].strip()
    return f"{text}." if text and text[-1] not in ".!?" else text


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "hasten"
    message = error.format_message()
    return f"error: {message} Try '{path} --help'." if message else ""
