"""The page's named endpoints, asked as a program does: by `gradio_client`, on a page that is really served."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from hasten.ui.engine import ENDED, Engine
from tests.ui.pages import launched
from tests.ui.students import trained

SMALL = {"kind": "compare", "model": "tiny-video", "prompt": "a seven moving left", "recipes": ["balanced"], "steps": 4}
"""In place of the first comparison, which takes longer."""

ENDPOINTS = {"/generate", "/compare", "/text", "/decode", "/tune", "/status", "/result", "/cancel", "/queue", "/pause", "/resume", "/move"}
PATIENT = 240.0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, str]]:
    with launched(tmp_path_factory, SMALL) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: tuple[Engine, str]) -> Client:
    return Client(served[1], verbose=False, httpx_kwargs={"timeout": PATIENT})


def over(client: Client, job: str) -> dict[str, Any]:
    """The job's standing when it is over."""
    until = time.monotonic() + PATIENT
    while time.monotonic() < until:
        found: dict[str, Any] = client.predict(job=job, api_name="/status")
        if found["state"] in ENDED:
            return found
        time.sleep(0.2)
    raise AssertionError(f"{job} is not over in time")


def test_the_endpoints_are_those_and_no_others(client: Client) -> None:
    found = client.view_api(return_format="dict", print_info=False)
    assert set(found["named_endpoints"]) == ENDPOINTS
    assert not found["unnamed_endpoints"]


@pytest.mark.long
def test_a_clip_comes_back_as_the_very_bytes_that_were_kept(client: Client, served: tuple[Engine, str]) -> None:
    job = client.predict(prompt="a three moving up", steps=4, api_name="/generate")
    assert over(client, job)["state"] == "done"
    told, files = client.predict(job, api_name="/result")
    clip = next(Path(file) for file in files if file.endswith(".mp4"))
    engine = served[0]
    kept = engine.outputs.file(told["result"]["output"], told["result"]["media"])
    assert clip.read_bytes() == kept.read_bytes()
    assert engine.restore(clip.read_bytes()).prompt == "a three moving up"  # type: ignore[union-attr]


def test_results_name_files_and_no_folders(client: Client, served: tuple[Engine, str]) -> None:
    job = client.predict(prompt="a three", model="tiny-image", steps=3, recipe="plain", api_name="/generate")
    assert over(client, job)["state"] == "done"
    told, _ = client.predict(job, api_name="/result")
    assert str(served[0].place.home) not in str(told)


def test_a_comparison_has_a_row_for_each_run(client: Client) -> None:
    job = client.predict(prompt="a seven moving left", recipes=["balanced"], steps=4, api_name="/compare")
    assert over(client, job)["state"] == "done"
    told, files = client.predict(job, api_name="/result")
    assert [run["row"]["recipe"] for run in told["result"]["runs"]] == ["plain", "balanced"]
    assert sum(file.endswith(".mp4") for file in files) == 2


def test_a_text_says_which_step_wrote_each_token(client: Client) -> None:
    job = client.predict(prompt="sort: i p m d n k j . =", length=8, api_name="/text")
    assert over(client, job)["state"] == "done"
    told, _ = client.predict(job, api_name="/result")
    written = [token for token in told["result"]["tokens"] if not token["given"]]
    assert written and all(token["step"] is not None for token in written)


def test_a_drafted_text_says_who_guessed_each_token_and_whose_it_is(client: Client) -> None:
    job = client.predict(prompt="a b c d a b c d a b", recipe="look-up:every=true", length=16, api_name="/decode")
    assert over(client, job)["state"] == "done"
    told, files = client.predict(job, api_name="/result")
    found = told["result"]
    assert found["exact"]["verdict"] == "same" and {token["by"] for token in found["tokens"] if not token["given"]} <= {"", "look-up"}
    assert next(Path(file) for file in files if file.endswith("text.txt")).read_text(encoding="utf-8") == found["text"] + "\n"


def test_a_student_that_was_trained_here_draws_in_one_call_and_the_report_says_so(client: Client, served: tuple[Engine, str]) -> None:
    recipe = trained(served[0])
    job = client.predict(prompt="a three", model="tiny-image", recipe=recipe, api_name="/generate")
    assert over(client, job)["state"] == "done"
    told, files = client.predict(job, api_name="/result")
    trace = json.loads(next(Path(file) for file in files if file.endswith("trace.json")).read_text())
    assert told["result"]["row"]["nfe"] == trace["nfe"] == 1 < told["result"]["usual_steps"]


def test_the_queue_is_paused_put_in_another_order_and_goes_on(client: Client) -> None:
    assert client.predict(api_name="/pause")["paused"]
    first, second = (client.predict(prompt="a three", model="tiny-image", steps=3, recipe="plain", api_name="/generate") for _ in range(2))
    assert client.predict(job=second, to="first", api_name="/move") == {"paused": True, "waiting": [second, first]}
    with pytest.raises(AppError, match="cannot be moved 'aside'"):
        client.predict(job=second, to="aside", api_name="/move")
    assert client.predict(job=first, api_name="/status")["note"] == "1 before it, the queue is paused"
    assert not client.predict(api_name="/resume")["paused"]
    assert {over(client, job)["state"] for job in (first, second)} == {"done"}
    assert client.predict(api_name="/queue") == {"paused": False, "waiting": []}


def test_a_study_is_started_and_stopped(client: Client) -> None:
    prompts = ["a one moving left", "a two moving up", "a three moving right", "a four moving down"]
    job = client.predict(model="tiny-video", prompts=prompts, seconds=600, steps=10, api_name="/tune")
    client.predict(job=job, api_name="/cancel")
    assert over(client, job)["state"] == "cancelled"


def test_what_is_not_allowed_is_told_in_words(client: Client) -> None:
    with pytest.raises(AppError, match="steps: got 0; allowed: 1 to"):
        client.predict(prompt="a three", steps=0, api_name="/generate")
    with pytest.raises(AppError, match="There is no model"):
        client.predict(prompt="a three", model="tiny-vidio", api_name="/generate")
    with pytest.raises(AppError, match="model: got"):
        client.predict(prompt="a three", model="../../etc/passwd", api_name="/generate")


@pytest.mark.parametrize("job", ["../../etc/passwd", "", "0" * 16, "<img src=x onerror=1>"])
def test_ids_are_looked_up_and_never_opened(client: Client, job: str) -> None:
    for name in ("/status", "/cancel"):
        with pytest.raises(AppError, match="There is no job"):
            client.predict(job=job, api_name=name)
    with pytest.raises(AppError, match="There is no job"):
        client.predict(job, api_name="/result")
