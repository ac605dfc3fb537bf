"""The progress bar: step, time left, and what was skipped so far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hasten.cli.output import Output

if TYPE_CHECKING:
    from hasten.pipelines.generate import OnProgress
    from hasten.pipelines.generate import Progress as Where


@contextmanager
def bar(out: Output, title: str, *, shown: bool = True) -> Iterator[OnProgress | None]:
    """A callback that draws where a request stands, on standard error; None without a terminal."""
    if not shown or not out.errors.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[skipped]}"),
    )
    with Progress(*columns, console=out.errors, transient=True) as progress:
        task = progress.add_task(title, total=None, skipped="")

        def show(where: Where) -> None:
            # Steps of all prompts in one bar, so that "time left" is that of the whole command.
            prompt = f"{title} ({where.done + 1}/{where.prompts})" if where.prompts > 1 else title
            progress.update(
                task,
                description=prompt,
                total=where.steps * where.prompts,
                completed=where.done * where.steps + where.step,
                skipped=f"{100 * where.skipped:.0f} % skipped",
            )

        yield show
