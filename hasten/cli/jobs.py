"""`hasten jobs`: the queue of the page from a terminal. Jobs are done by whichever `hasten ui` or `hasten jobs run` has the lease."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hasten.cli.output import JsonOption, Output
from hasten.cli.ui import Home, told_to_end
from hasten.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from hasten.ui.engine import Engine, Job
    from hasten.ui.engine.jobs import Where

app = typer.Typer(no_args_is_help=True, help="The queue behind `hasten ui`: list, submit, move, pause, resume, cancel, retry, remove, run.")
JobId = Annotated[str, typer.Argument(metavar="ID", help="Of a job, as `hasten jobs list` shows it.")]
Models = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Models of your own, as for `hasten ui`.")]

COLUMNS = {"id": "id", "kind": "kind", "state": "state", "where": "where", "seconds": "seconds", "model": "model", "what": "what"}
LONGEST = 60
"""Characters of a prompt that a table shows."""


@app.command("list")
def list_(
    state: Annotated[str | None, typer.Option(metavar="NAME", help="Only these: queued, running, done, failed, cancelled, interrupted.")] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="At most so many, the newest.", min=1)] = 30,
    home: Home = None,
    json: JsonOption = None,
) -> None:
    """Jobs, the newest first."""
    with _queue("jobs list", home, json) as (output, engine):
        from typing import get_args

        from hasten.ui.engine import State

        known = get_args(State)
        if state is not None and state not in known:
            raise UsageError(f"--state {state}: allowed are {', '.join(known)}.")
        if engine.jobs.paused:
            output.say("The queue is paused; hasten jobs resume lets it go on.")
        rows = [row_of(job) for job in engine.jobs.list(limit, (state,) if state else known)]
        if rows:
            output.table(rows, COLUMNS)
        else:
            output.say("There are no jobs.")
        output.finish(rows)


@app.command("submit")
def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A request as JSON, or a PNG, MP4 or YAML that hasten made; - for standard input.")],
    wait: Annotated[bool, typer.Option("--wait", help="Until it is over; done here, unless another process is at work.")] = False,
    home: Home = None,
    models: Models = None,
    json: JsonOption = None,
) -> None:
    """Put a request at the end of the queue, for example {"kind": "generate", "model": "tiny-video", "prompt": "a seven"}."""
    with _queue("jobs submit", home, json, models) as (output, engine):
        job = engine.submit(engine.restore(_bytes(file, engine.limits.max_upload)))
        output.say(f"Job {job.id} waits.")
        if wait:
            job = _done(output, engine, [job.id])[0]
        output.finish([row_of(job)], result=job.result, error=job.error)
        if job.state not in ("queued", "running", "done"):
            raise RefusedError(job.error.get("sentence") or f"The job was {job.state}.")


@app.command("cancel")
def cancel(job: JobId, home: Home = None, json: JsonOption = None) -> None:
    """Stop a job: at once where it waits, within one block of work where it runs."""
    with _queue("jobs cancel", home, json) as (output, engine):
        found = engine.cancel(job)
        output.say(f"Job {job} is told to stop." if found.state == "running" else f"Job {job} is {found.state}.")
        output.finish([row_of(found)])


@app.command("retry")
def retry(job: JobId, home: Home = None, json: JsonOption = None) -> None:
    """The same again, as a new job."""
    with _queue("jobs retry", home, json) as (output, engine):
        found = engine.retry(job)
        output.say(f"Job {found.id} waits; it is {job} again.")
        output.finish([row_of(found)])


@app.command("remove")
def remove(job: JobId, home: Home = None, json: JsonOption = None) -> None:
    """Forget a job that does not run. Its results stay."""
    with _queue("jobs remove", home, json) as (output, engine):
        engine.remove(job)
        output.say(f"Job {job} is forgotten.")
        output.finish([])


@app.command("pause")
def pause(home: Home = None, json: JsonOption = None) -> None:
    """Begin nothing more, in whatever process, until `resume`; what runs goes on."""
    with _queue("jobs pause", home, json) as (output, engine):
        engine.pause()
        output.say(f"The queue is paused; {len(engine.jobs.queue())} jobs wait.")
        output.finish([row_of(job) for job in engine.jobs.queue()])


@app.command("resume")
def resume(home: Home = None, json: JsonOption = None) -> None:
    """Go on with what waits."""
    with _queue("jobs resume", home, json) as (output, engine):
        engine.resume()
        output.say(f"The queue goes on; {len(engine.jobs.queue())} jobs wait.")
        output.finish([row_of(job) for job in engine.jobs.queue()])


@app.command("move")
def move(job: JobId, to: Annotated[str, typer.Argument(metavar="WHERE", help="first, up, down or last.")], home: Home = None, json: JsonOption = None) -> None:
    """Another turn for a job that waits."""
    with _queue("jobs move", home, json) as (output, engine):
        engine.move(job, cast("Where", to))
        rows = [row_of(found) for found in engine.jobs.queue()]
        output.table(rows, COLUMNS)
        output.finish(rows)


@app.command("run")
def run(home: Home = None, models: Models = None, json: JsonOption = None) -> None:
    """Work on the queue until nothing waits, without a page."""
    with _queue("jobs run", home, json, models) as (output, engine):
        waiting = [job.id for job in (*engine.jobs.list(1, ("running",)), *engine.jobs.queue())]
        done = _done(output, engine, waiting)
        output.finish([row_of(job) for job in done])


def row_of(job: Job) -> dict[str, Any]:
    """What a table and JSON show of a job."""
    asked, where = job.asked, job.snapshot
    seconds = (job.ended or time.time()) - job.began if job.began else None
    steps = f"{where.get('phase', '')} {where['step']} of {where['steps']}" if job.state == "running" and where.get("steps") else ""
    what = " ".join(str(asked.get("prompt") or asked.get("method") or " / ".join(asked.get("prompts", []))).split())
    return {
        "id": job.id, "kind": job.kind, "state": job.state, "where": steps or job.error.get("sentence", ""), "seconds": seconds,
        "model": asked.get("model"), "what": what if len(what) <= LONGEST else f"{what[: LONGEST - 3]}...", "output": job.result.get("output"),
        "again_of": job.again_of, "request": asked,
    }  # fmt: skip


@contextmanager
def _queue(command: str, home: Path | None, json: str | None, models: Path | None = None) -> Iterator[tuple[Output, Engine]]:
    """The queue, with nobody at work on it here."""
    output = Output(command, json)
    with output.open():
        from hasten.ui.engine import Engine

        engine = Engine(home, models=models)
        try:
            yield output, engine
        finally:
            engine.close()


def _done(output: Output, engine: Engine, jobs: list[str]) -> list[Job]:
    """Work, or let others, until these are over. Ctrl-C stops what runs here, and leaves the rest in the queue."""
    with told_to_end() as ended:
        engine.start()
        for job in jobs:
            while not (found := engine.job(job)).over:
                if found.state == "queued" and engine.jobs.paused:
                    raise RefusedError(f"The queue is paused, and job {job} waits in it. hasten jobs resume lets it go on.")
                if ended.wait(0.2):
                    engine.stop()
                    raise KeyboardInterrupt
            note = found.error.get("sentence") or found.result.get("output", "")
            output.say(f"Job {job}: {found.state}. {note}".rstrip())
    return [engine.job(job) for job in jobs]


def _bytes(file: Path, most: int) -> bytes:
    try:
        if str(file) == "-":
            return sys.stdin.buffer.read(most + 1)
        with file.open("rb") as stream:
            return stream.read(most + 1)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}. Name a file that can be read.") from None
