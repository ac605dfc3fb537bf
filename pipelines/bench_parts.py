"""The samples of a benchmark shared out over processes: a sample's runs stay neighbours in one of them."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch

from hasten.errors import HastenError, UsageError
from hasten.pipelines.candidates import Candidate, ours
from hasten.pipelines.shots import Column

if TYPE_CHECKING:
    from hasten.pipelines.bench_cache import Run


def in_parts(run: Run, oracle_of: str, jobs: int) -> list[Column]:
    """Fill the columns of `run` and return its oracles, in `jobs` forks (1: right here).

    Raises `UsageError` where a fork is not safe: beside other threads of PyTorch or with models on an accelerator.
    """
    if jobs == 1:
        run.measure()
        return run.oracles(oracle_of) if oracle_of else []
    if torch.get_num_threads() > 1 or str(getattr(run.pipe, "device", "cpu")) != "cpu":
        raise UsageError(
            f"{jobs} jobs need a model on the CPU and one thread each, got device {getattr(run.pipe, 'device', 'cpu')}"
            f" and {torch.get_num_threads()} threads. Set OMP_NUM_THREADS=1, or use one job."
        )
    context = multiprocessing.get_context("fork")
    started = []
    for number in range(jobs):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_part, args=(run, range(number, len(run.samples), jobs), oracle_of, there))
        process.start()
        there.close()
        started.append((process, here))
    parts = [_received(here) for _, here in started]
    for process, _ in started:
        process.join()
    return _joined(run, parts, jobs)


def _part(run: Run, indices: range, oracle_of: str, answer: Connection) -> None:
    """In the fork: measure these samples and send what was found. Candidates hold functions, so shots go by name."""
    part = copy.copy(run)
    part.samples = [run.samples[index] for index in indices]
    part.plain, part.failed = replace(run.plain, shots=[], plain_seconds=[]), []
    part.columns = [Column(column.candidate) for column in run.columns]
    part.best = {}
    part.measure()
    oracles = part.oracles(oracle_of) if oracle_of else []
    found = {c.candidate.recipe: (c.shots, c.plain_seconds) for c in (part.plain, *part.columns, *oracles)}
    failed = {candidate.recipe: reason for candidate, reason in part.failed}
    # Plain bytes: PyTorch's own pickling for processes would hold one file descriptor per tensor.
    answer.send_bytes(pickle.dumps((found, failed, [column.candidate.recipe for column in oracles])))
    answer.close()


def _received(answer: Connection) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    try:
        part: tuple[dict[str, Any], dict[str, str], list[str]] = pickle.loads(answer.recv_bytes())
    except EOFError:
        raise HastenError("A process of the benchmark ended before it was done; its message stands above.") from None
    return part


def _joined(run: Run, parts: list[Any], jobs: int) -> list[Column]:
    """Put the shots of all parts into the columns of `run`, in the order of the samples; the oracles are returned."""
    reasons = {name: reason for _, failed, _ in parts for name, reason in failed.items()}
    run.failed += [(c.candidate, reasons[c.candidate.recipe]) for c in run.columns if c.candidate.recipe in reasons]
    run.columns = [column for column in run.columns if column.candidate.recipe not in reasons]
    named = [name for name in parts[0][2] if all(name in oracles for _, _, oracles in parts)]
    made = [Column(Candidate(name, ours("oracle", "plain").apply, "oracle")) for name in named]
    for column in (run.plain, *run.columns, *made):
        shares = [found[column.candidate.recipe] for found, _, _ in parts]
        for index in range(len(run.samples)):
            shots, seconds = shares[index % jobs]
            column.shots.append(shots[index // jobs])
            column.plain_seconds.append(seconds[index // jobs])
    return made
