"""What a command shows and writes: tables for people, JSON for programs, never both on one stream."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hasten.atomic import atomic_write
from hasten.errors import OutputError

JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Also write the result as JSON; - for standard output."),
]

COLUMNS = {
    "recipe": "recipe",
    "control": "control",
    "seconds": "seconds",
    "speedup": "speed-up",
    "computed_fraction": "computed",
    "nfe": "evaluations",
    "density": "density",
    "rho": "mass read",
    "psnr_median": "PSNR dB",
    "psnr_worst": "worst",
    "psnr_converged": "to converged",
    "ssim_median": "SSIM",
    "latent_error": "latent error",
    "prompt_accuracy": "accuracy",
    "frechet": "Frechet",
    "recall": "recall",
    "overhead": "overhead",
    "overhead_worst": "worst",
    "identical": "identical",
    "skipped": "left out",
    "reads": "judge reads",
    "bytes_held": "caches held",
    "n": "runs",
    "note": "note",
}
"""Row key -> heading, in the order tables show them. Keys are fixed in the design; headings are not."""


class Output:
    """The streams of one command.

    say, table: for people; on standard output, or on standard error when `--json -` claims the former.
    progress goes to standard error always. finish writes the JSON.
    """

    def __init__(self, command: str, target: str | None) -> None:
        self.command = command
        self.target = target
        self._stdout: IO[str] = sys.stdout
        stream = sys.stderr if target == "-" else sys.stdout
        self.console = _console(stream)
        self.errors = _console(sys.stderr)

    @contextlib.contextmanager
    def open(self) -> Iterator[Output]:
        """Check that the JSON can be written before any work starts, and keep stray prints off its stream."""
        if self.target not in (None, "-"):
            assert self.target is not None
            check_writable(Path(self.target).absolute().parent)
        aside = contextlib.redirect_stdout(sys.stderr) if self.target == "-" else contextlib.nullcontext()
        with aside, warnings.catch_warnings():
            # hasten's own warnings are the report's notes, which commands show as sentences.
            warnings.filterwarnings("ignore", message="hasten: ")
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield self

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """A line about progress, on standard error."""
        self.errors.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.errors.print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)

    def table(self, rows: Sequence[dict[str, Any]], columns: dict[str, str] | None = None) -> None:
        """The rows as a table of those columns that any row has."""
        headings = shown(rows, columns)
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for key, heading in headings.items():
            numbers = all(isinstance(row.get(key), int | float | None) for row in rows)
            table.add_column(heading, justify="right" if numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell(key, row)) for key in headings))
        self.console.print(table, highlight=False)

    def finish(self, rows: Sequence[dict[str, Any]], *, lines: bool = False, **more: Any) -> None:
        """Write the JSON document, where one was asked for. lines: one for each row, where there are many."""
        if self.target is None:
            return
        document = {"command": self.command, "versions": versions(), "hardware": hardware(), **more, "rows": list(rows)}
        text = _by_lines(strict(document)) if lines else json.dumps(strict(document), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        if self.target == "-":
            self._stdout.write(text)
            self._stdout.flush()
        else:
            atomic_write(Path(self.target), text)

    def keep(self, rows: Sequence[dict[str, Any]], **more: Any) -> None:
        """Write what is there so far, so that a run that is interrupted loses no more than what it was at. Standard output gets
        one document only, by `finish`."""
        if self.target != "-":
            self.finish(rows, lines=True, **more)


def _by_lines(document: dict[str, Any]) -> str:
    """The document with each of its rows on a line of its own."""
    head = json.dumps({key: value for key, value in document.items() if key != "rows"}, indent=1, allow_nan=False, ensure_ascii=False)
    rows = ",\n  ".join(json.dumps(row, allow_nan=False, ensure_ascii=False) for row in document["rows"])
    return f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'


def strict(value: Any) -> Any:
    """`value` with what JSON cannot say replaced: non-finite numbers by null, paths and the like by text."""
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def shown(rows: Sequence[dict[str, Any]], columns: dict[str, str] | None = None) -> dict[str, str]:
    """Key -> heading of the columns in which any row says something."""
    headings = columns or COLUMNS
    return {key: headings[key] for key in headings if any(cell(key, row) for row in rows)}


def cell(key: str, row: dict[str, Any]) -> str:
    """One value as a table shows it."""
    value = row.get(key)
    if key.startswith("psnr") and value is None and row.get("exact_match") is True:  # for texts it is a share
        return "identical"
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number(key, value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _number(key: str, value: float) -> str:
    if key.startswith("speedup"):
        return f"{value:.2f}x"
    if key in ("computed_fraction", "density", "rho", "prompt_accuracy", "exact_match", "recall", "overhead", "overhead_worst"):
        return f"{100 * value:.1f} %" if key.startswith(("overhead", "exact_match")) else f"{100 * value:.0f} %"
    if key.startswith("psnr"):
        return f"{value:.1f}"
    if key == "bytes_held":
        return f"{value / 2**20:.1f} MiB"
    if key.startswith("ssim"):
        return f"{value:.4f}"
    if isinstance(value, int):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def check_writable(folder: Path) -> None:
    """Make `folder` and prove that files can be put into it; `OutputError` with the reason otherwise."""
    probe = folder / f".hasten-probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"Cannot write into the folder {folder}: {error.strerror or error}. Name another folder, or change its rights."
        ) from None


def versions() -> dict[str, str]:
    """Versions of what decides the numbers; packages that are absent are left out."""
    from hasten import __version__
    from hasten.report_forms import installed_versions

    found = {**installed_versions(), "hasten": __version__}
    for name in ("accelerate", "gradio", "triton", "xformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """The machine in the words a table needs: processor, cores, memory, accelerators. No names, no paths."""
    import torch

    found: dict[str, Any] = {"cpu": _processor(), "cores": len(_cores()), "threads": torch.get_num_threads()}
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    elif torch.backends.mps.is_available():
        found["gpus"] = ["Apple MPS"]
    return found


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _console(stream: IO[str]) -> Console:
    # Without a terminal rich would cut tables at 80 columns, which makes logs useless.
    return Console(file=stream, width=None if stream.isatty() else 160)
