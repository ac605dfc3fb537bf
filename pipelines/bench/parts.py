"""The samples of a benchmark shared out over processes: all runs of one sample stay neighbours in one of them."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import torch

from hasten.errors import HastenError, UsageError
from hasten.pipelines.bench.candidates import Candidate, ours
from hasten.pipelines.bench.shots import Column, Shot

if TYPE_CHECKING:
    from hasten.pipelines.bench.cache import Run

Found = tuple[dict[str, tuple[Shot, float]], dict[str, str], list[str]]
"""Of one sample: recipe -> the run and the seconds of its neighbouring plain run; recipe -> why it failed; oracles."""


def in_parts(run: Run, oracle_of: str, jobs: int) -> list[Column]:
    """Measure every sample, fill the columns of `run` and return its oracles, in `jobs` forks (1: right here).

    Raises `UsageError` where a fork is not safe: beside other threads of PyTorch or with models on an accelerator.
    """
    if jobs > 1 and (torch.get_num_threads() > 1 or str(getattr(run.pipe, "device", "cpu")) != "cpu"):
        raise UsageError(
            f"{jobs} jobs need a model on the CPU and one thread each, got device {getattr(run.pipe, 'device', 'cpu')}"
            f" and {torch.get_num_threads()} threads. Set OMP_NUM_THREADS=1, or use one job."
        )
    numbers = range(len(run.samples))
    if jobs == 1:
        return _joined(run, {number: one_sample(run, number, oracle_of) for number in numbers})
    return _joined(run, dict(_forked(run, oracle_of, jobs)))


def one_sample(run: Run, number: int, oracle_of: str) -> Found:
    """All candidates on one sample, then its oracles. Candidates hold functions, so what was found goes by name."""
    part = copy.copy(run)
    part.samples, part.number = [run.samples[number]], number
    part.plain, part.failed, part.best = replace(run.plain, shots=[], plain_seconds=[]), [], {}
    part.columns = [Column(column.candidate) for column in run.columns]
    part.measure()
    oracles = part.oracles(oracle_of) if oracle_of else []
    shots = {
        c.candidate.recipe: (c.shots[0], c.plain_seconds[0]) for c in (part.plain, *part.columns, *oracles)
    }
    reasons = {candidate.recipe: reason for candidate, reason in part.failed}
    return shots, reasons, [column.candidate.recipe for column in oracles]


def _forked(run: Run, oracle_of: str, jobs: int) -> Iterator[tuple[int, Found]]:
    """The samples in the order in which they are done; each process takes the next one that nobody has taken."""
    context = multiprocessing.get_context("fork")
    taken = context.Value("i", 0)
    answers = []
    for _ in range(min(jobs, len(run.samples))):
        here, there = context.Pipe(duplex=False)
        context.Process(target=_work, args=(run, oracle_of, taken, there), daemon=True).start()
        there.close()
        answers.append(here)
    while answers:
        for answer in wait(answers):
            assert isinstance(answer, Connection)
            try:
                number, found = pickle.loads(answer.recv_bytes())
            except EOFError:
                raise HastenError(
                    "A process of the benchmark ended before it was done; its message stands above."
                ) from None
            if number is None:
                answers.remove(answer)
            else:
                yield number, found


def _work(run: Run, oracle_of: str, taken: Any, answer: Connection) -> None:
    """In the fork. Plain bytes are sent: PyTorch's own pickling for processes holds one file descriptor per tensor."""
    while True:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= len(run.samples):
            answer.send_bytes(pickle.dumps((None, None)))
            return
        answer.send_bytes(pickle.dumps((number, one_sample(run, number, oracle_of))))


def _joined(run: Run, found: dict[int, Found]) -> list[Column]:
    """Put what was found into the columns of `run`, in the order of the samples; the oracles are returned."""
    samples = [found[number] for number in sorted(found)]
    for column in list(run.columns):
        reason = next((r[column.candidate.recipe] for _, r, _ in samples if column.candidate.recipe in r), None)
        if reason is not None:
            run.columns.remove(column)
            run.failed.append((column.candidate, reason))
    named = [name for name in samples[0][2] if all(name in oracles for _, _, oracles in samples)]
    made = [Column(Candidate(name, ours("oracle", "plain").apply, "oracle")) for name in named]
    for column in (run.plain, *run.columns, *made):
        pairs = [shots[column.candidate.recipe] for shots, _, _ in samples]
        column.shots, column.plain_seconds = [shot for shot, _ in pairs], [seconds for _, seconds in pairs]
    return made
