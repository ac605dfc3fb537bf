"""The queue and the lease: order, cancelling, trying again, processes that share a home, and those that are killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from hasten.errors import OutputError, UsageError
from hasten.ui.engine import Engine, Limits, RequestError, read
from hasten.ui.engine.database import Database
from hasten.ui.engine.jobs import Jobs
from hasten.ui.engine.lease import Lease
from tests.ui.engines import VIDEO

ASKED = read(VIDEO)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "jobs.sqlite")


@pytest.fixture
def jobs(database: Database) -> Jobs:
    return Jobs(database)


@pytest.fixture
def lease(database: Database) -> Lease:
    found = Lease(database)
    assert found.take()
    return found


def test_jobs_begin_in_the_order_in_which_they_came(jobs: Jobs, lease: Lease) -> None:
    names = [jobs.submit(ASKED).id for _ in range(3)]
    assert [jobs.ahead(name) for name in names] == [0, 1, 2]
    assert [jobs.start(lease.holder).id for _ in names] == names  # type: ignore[union-attr]
    assert jobs.start(lease.holder) is None
    assert [job.id for job in jobs.list()] == names[::-1]


def test_a_row_says_what_was_asked_and_what_came_of_it(jobs: Jobs, lease: Lease) -> None:
    name = jobs.submit(ASKED).id
    jobs.start(lease.holder)
    jobs.progress(name, {"job": name, "step": 3})
    jobs.finish(name, lease.holder, "done", {"output": "x"})
    found = jobs.get(name)
    assert found.request == ASKED and found.result == {"output": "x"} and found.snapshot["step"] == 3 and found.over
    assert found.made <= found.began <= found.ended  # type: ignore[operator]


def test_a_waiting_job_is_cancelled_at_once_and_never_begun(jobs: Jobs, lease: Lease) -> None:
    first, second = (jobs.submit(ASKED).id for _ in range(2))
    assert jobs.cancel(first).state == "cancelled"
    assert jobs.start(lease.holder).id == second  # type: ignore[union-attr]
    assert jobs.cancel(second).state == "running" and jobs.told_to_stop(second)
    jobs.finish(second, lease.holder, "cancelled")
    assert jobs.cancel(second).state == "cancelled"  # once more changes nothing


def test_cancelling_and_taking_at_once_has_one_winner(database: Database, jobs: Jobs, lease: Lease) -> None:
    """Whichever comes first, a cancelled job is either never begun, or it is begun and told to stop."""
    for _ in range(40):
        name = jobs.submit(ASKED).id
        begun: list[object] = []
        gate = threading.Barrier(2)

        def take() -> None:
            gate.wait()  # noqa: B023
            begun.append(jobs.start(lease.holder))  # noqa: B023

        thread = threading.Thread(target=take)
        thread.start()
        gate.wait()
        after = jobs.cancel(name)
        thread.join()
        if begun[0] is None:
            assert after.state == "cancelled"
        else:
            assert jobs.told_to_stop(name)
            jobs.finish(name, lease.holder, "cancelled")


def test_only_what_is_over_is_tried_again_and_only_what_rests_is_removed(jobs: Jobs, lease: Lease) -> None:
    name = jobs.submit(ASKED).id
    with pytest.raises(UsageError, match="queued"):
        jobs.retry(name)
    jobs.start(lease.holder)
    with pytest.raises(UsageError, match="running"):
        jobs.remove(name)
    jobs.finish(name, lease.holder, "failed", error={"sentence": "no"})
    again = jobs.retry(name)
    assert again.again_of == name and again.state == "queued" and again.request == ASKED
    jobs.remove(name)
    with pytest.raises(UsageError, match="no job"):
        jobs.get(name)


def test_finishing_is_for_the_holder_of_the_job_alone(jobs: Jobs, lease: Lease) -> None:
    name = jobs.submit(ASKED).id
    jobs.start(lease.holder)
    jobs.finish(name, "somebody else", "done")
    assert jobs.get(name).state == "running"


def test_no_more_wait_than_is_allowed(database: Database) -> None:
    jobs = Jobs(database, Limits(max_queue=2))
    for _ in range(2):
        jobs.submit(ASKED)
    with pytest.raises(RequestError, match="at most 2"):
        jobs.submit(ASKED)


def test_ids_are_looked_up_not_believed(jobs: Jobs) -> None:
    for wrong in ("", "../x", "' OR 1=1 --", "x" * 1000):
        with pytest.raises(UsageError, match="no job"):
            jobs.get(wrong)


def test_one_lease_among_engines_of_one_process(database: Database, lease: Lease, jobs: Jobs) -> None:
    other = Lease(database)
    assert not other.take() and other.other and not lease.other
    jobs.submit(ASKED)
    assert jobs.start(other.holder) is None  # nobody begins a job without it
    lease.release()
    assert other.take() and not lease.take()


HOLDER = """
import sys, time
from pathlib import Path
from hasten.ui.engine.database import Database
from hasten.ui.engine.jobs import Jobs
from hasten.ui.engine.lease import Lease
database = Database(Path(sys.argv[1]))
lease, jobs = Lease(database), Jobs(database)
assert lease.take()
print(jobs.start(lease.holder).id, flush=True)
time.sleep(300)
"""


def test_a_killed_process_leaves_interrupted_jobs_and_no_lease(tmp_path: Path) -> None:
    database = Database(tmp_path / "jobs.sqlite")
    jobs, lease = Jobs(database), Lease(database)
    name, waiting = jobs.submit(ASKED).id, jobs.submit(ASKED).id
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(database.file)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline().strip() == name
        lease.sweep()
        assert jobs.get(name).state == "running" and not lease.take()  # it lives
        os.kill(holder.pid, signal.SIGKILL)
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    lease.sweep()
    assert jobs.get(name).state == "interrupted"
    assert lease.take()
    assert jobs.start(lease.holder).id == waiting  # type: ignore[union-attr]
    assert jobs.retry(name).state == "queued"


def test_a_process_number_given_out_again_is_another_process(database: Database, lease: Lease) -> None:
    with database.transaction() as rows:
        rows.execute("UPDATE lease SET holder = 'gone', pid = 1, born = 5.0")  # process 1 lives, but was not born then
    assert Lease(database).take()


def test_a_holder_on_another_machine_is_known_by_its_heartbeat(database: Database, lease: Lease) -> None:
    with database.transaction() as rows:
        rows.execute("UPDATE lease SET holder = 'far', machine = 'elsewhere', beat = ?", (time.time(),))
    mine = Lease(database)
    assert not mine.take() and not mine.beat()
    with database.transaction() as rows:
        rows.execute("UPDATE lease SET beat = ?", (time.time() - 1000,))
    assert mine.take() and mine.beat()


def test_two_engines_never_work_at_once(tmp_path: Path) -> None:
    """Both see all jobs; one at a time does them, and jobs of both come to an end."""
    with Engine(tmp_path) as one, Engine(tmp_path) as two:
        names = [engine.submit({"kind": "download", "model": "tiny-video"}).id for engine in (one, two) * 3]
        states = {one.wait(name, 60).state for name in names}
        assert states == {"failed"} and all(two.job(name).over for name in names)  # there is nothing to fetch, and it says so
        rows = sorted((job.began, job.ended) for job in one.jobs.list())
        assert all(end <= begin for (_, end), (begin, _) in pairwise(rows))  # type: ignore[operator]


def test_a_broken_or_newer_table_is_said(tmp_path: Path) -> None:
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(b"this is no table" * 100)
    with pytest.raises(OutputError, match="cannot be opened"):
        Database(broken)
    newer = tmp_path / "newer.sqlite"
    with sqlite3.connect(newer) as opened:
        opened.execute("PRAGMA user_version = 99")
    with pytest.raises(OutputError, match="newer hasten"):
        Database(newer)


# --- turns and pauses ---------------------------------------------------------------------------------------


def test_a_waiting_job_is_moved_and_the_order_survives_a_restart(jobs: Jobs, database: Database, lease: Lease) -> None:
    running, one, two, three = (jobs.submit(ASKED).id for _ in range(4))
    assert jobs.start(lease.holder).id == running  # type: ignore[union-attr]

    def order() -> list[str]:
        return [job.id for job in Jobs(Database(database.file)).queue()]

    for moved, to, after in (
        (three, "first", [three, one, two]), (one, "down", [three, two, one]), (one, "up", [three, one, two]), (three, "up", [three, one, two]),
        (two, "down", [three, one, two]), (three, "last", [one, two, three]),
    ):  # fmt: skip
        jobs.move(moved, to)  # type: ignore[arg-type]
        assert order() == after
    assert jobs.ahead(three) == 3, "what runs is before all that wait"
    newest = jobs.submit(ASKED).id
    assert order()[-1] == newest and jobs.list(1)[0].id == newest, "a later one stands behind what was moved"
    assert [jobs.start(lease.holder).id for _ in range(4)] == [one, two, three, newest]  # type: ignore[union-attr]
    for wrong, to in ((running, "first"), ("0" * 16, "up"), (one, "aside")):
        with pytest.raises(UsageError):
            jobs.move(wrong, to)  # type: ignore[arg-type]


def test_a_paused_queue_begins_nothing_in_any_process_until_it_goes_on(jobs: Jobs, database: Database, lease: Lease) -> None:
    jobs.pause()
    jobs.pause()
    name = jobs.submit(ASKED).id
    others = Jobs(Database(database.file))
    assert others.paused and not others.waiting() and others.start(lease.holder) is None
    others.resume()
    assert not jobs.paused and jobs.waiting() and jobs.start(lease.holder).id == name  # type: ignore[union-attr]


def test_an_engine_does_its_jobs_in_the_new_order_and_stays_paused(tmp_path: Path) -> None:
    with Engine(tmp_path) as engine:
        engine.pause()
        asked = {"kind": "generate", "model": "tiny-image", "prompt": "a three", "steps": 3, "recipe": "plain", "preview": False}
        first, second = (engine.submit(asked).id for _ in range(2))
        time.sleep(1.0)
        assert [engine.snapshot(job).note for job in (first, second)] == ["the queue is paused", "1 before it, the queue is paused"]
        engine.move(second, "first")
        engine.resume()
        began = [engine.wait(job).began or 0.0 for job in (second, first)]
        assert began == sorted(began)
        engine.pause()
    again = Engine(tmp_path)
    assert again.jobs.paused
    again.close()
