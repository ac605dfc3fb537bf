"""`/v1`: the usual calls work, errors have the usual shape, and no JSON whatever makes it fail."""

from __future__ import annotations

import base64
import inspect
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten.ui.engine import Engine, Limits, RequestError, read
from hasten.ui.server import Address, Site
from hasten.ui.server.openai import Api
from hasten.ui.server.openai_ask import IMAGE, VIDEO, ApiError, body_of, form_of, frames_for, images, video
from tests.ui.sites import bare, client

PICTURE = {"model": "tiny-image", "prompt": "a seven", "steps": 2, "recipe": "plain"}
CLIP = {"model": "tiny-video", "prompt": "a seven moving left, slowly", "steps": 2, "recipe": "plain", "size": "32x32", "frames": 5}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("v1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "files"))
        with Engine(folder / "home") as engine, Site(engine, Address(port=0), bare()) as site, client(site.url) as found:
            yield found


def over(web: httpx.Client, job: str) -> dict[str, Any]:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found: dict[str, Any] = web.get(f"/v1/videos/{job}").json()
        if found["status"] not in ("queued", "in_progress"):
            return found
        time.sleep(0.1)
    raise AssertionError(found)


def refused(answer: httpx.Response, status: int, param: str | None = None) -> str:
    """The message of an error of that status, in the usual shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param
    return str(error["message"])


# --- models and pictures ------------------------------------------------------------------------------------


def test_models_are_listed(web: httpx.Client) -> None:
    found = web.get("/v1/models").json()
    assert found["object"] == "list"
    assert {"tiny-image", "tiny-video", "tiny-flux"} <= {row["id"] for row in found["data"]}
    assert "tiny-dllm" not in {row["id"] for row in found["data"]}


def test_a_picture_comes_back_in_the_answer_or_by_address(web: httpx.Client) -> None:
    inside = web.post("/v1/images/generations", json={**PICTURE, "response_format": "b64_json"})
    assert inside.status_code == 200, inside.text
    [row] = inside.json()["data"]
    data = base64.b64decode(row["b64_json"])
    assert data.startswith(b"\x89PNG")
    [other] = web.post("/v1/images/generations", json={**PICTURE, "size": "auto"}).json()["data"]
    fetched = httpx.get(other["url"], trust_env=False)
    assert fetched.headers["content-type"] == "image/png"
    from io import BytesIO

    from PIL import Image

    first, second = (Image.open(BytesIO(each)) for each in (data, fetched.content))
    assert first.tobytes() == second.tobytes(), "the same seed gives the same picture"


def test_several_pictures_have_seeds_of_their_own(web: httpx.Client) -> None:
    found = web.post("/v1/images/generations", json={**PICTURE, "n": 2, "seed": 5, "extra_body": {"recipe": "every-other"}}).json()["data"]
    assert [row["seed"] for row in found] == [5, 6]
    assert {row["recipe"] for row in found} == {"every-other"}
    assert len({row["url"] for row in found}) == 2


# --- clips --------------------------------------------------------------------------------------------------


def test_a_clip_is_made_looked_at_and_deleted(web: httpx.Client) -> None:
    begun = web.post("/v1/videos", json=CLIP).json()
    assert begun["object"] == "video" and begun["status"] in ("queued", "in_progress")
    done = over(web, begun["id"])
    assert (done["status"], done["progress"], done["size"], done["error"]) == ("completed", 100, "32x32", None)
    content = web.get(f"/v1/videos/{begun['id']}/content")
    assert content.headers["content-type"] == "video/mp4" and content.content[4:8] == b"ftyp"
    part = web.get(f"/v1/videos/{begun['id']}/content", headers={"range": "bytes=0-9"})
    assert part.status_code == 206 and len(part.content) == 10
    assert web.get(f"/v1/videos/{begun['id']}/content?variant=thumbnail").headers["content-type"] == "image/png"
    assert begun["id"] in [row["id"] for row in web.get("/v1/videos").json()["data"]]
    assert web.delete(f"/v1/videos/{begun['id']}").json()["deleted"] is True
    refused(web.get(f"/v1/videos/{begun['id']}"), 404)
    refused(web.get(f"/v1/videos/{begun['id']}/content"), 404)


def test_a_running_clip_is_cancelled(web: httpx.Client) -> None:
    first, second = (web.post("/v1/videos", json={**CLIP, "steps": 200, "frames": 17}).json()["id"] for _ in range(2))
    refused(web.get(f"/v1/videos/{second}/content"), 409)
    for job in (second, first):
        assert web.delete(f"/v1/videos/{job}").status_code == 200
    assert over(web, first)["status"] == over(web, second)["status"] == "cancelled"


def test_a_form_is_understood(web: httpx.Client) -> None:
    values = {key: str(value) for key, value in CLIP.items() if key != "frames"} | {"seconds": "1", "seed": "3"}
    for sent in (web.post("/v1/videos", data=values), web.post("/v1/videos", files={key: (None, value) for key, value in values.items()})):
        assert sent.status_code == 200, sent.text
        assert over(web, sent.json()["id"])["status"] == "completed"


@pytest.mark.parametrize(("seconds", "frames"), [(1, 9), ("2", 17), (3.0, 25), (4, 65), ("8", 129)])
def test_seconds_are_frames(seconds: Any, frames: int) -> None:
    assert frames_for(seconds) == frames


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "param", "words"), [
    ({"prompt": None}, "prompt", "needed"), ({"n": 99}, "n", "1 to 4"), ({"size": "big"}, "size", "WIDTHxHEIGHT"),
    ({"size": "9999x9999"}, "width", "4,096"), ({"recipe": "balancd"}, "recipe", "balanced"), ({"recipe": "/etc/passwd"}, "recipe", "path"),
    ({"steps": 0}, "steps", "1 to 200"), ({"seed": 1.5}, "seed", "integer"), ({"response_format": "svg"}, "response_format", "b64_json"),
    ({"recipies": "fast"}, "'recipies'", "recipe"), ({"model": 5}, "model", "text"), ({"prompt": "a" * 5000}, "prompt", "4,000"),
    ({"model": "tiny-video"}, "model", "/v1/videos"), ({"guidance": 1e400}, "guidance", ""), ({"extra_body": [1]}, "extra_body", "object"),
    ({"save_path": "/tmp/x"}, "'save_path'", "not known"), ({"lora": "../../x"}, "lora", ""), ({"trust_remote_code": True}, "'trust_remote_code'", "not known"),
])  # fmt: skip
def test_what_is_wrong_is_said(web: httpx.Client, change: dict[str, Any], param: str, words: str) -> None:
    body = json.dumps({**PICTURE, **change}).replace("Infinity", "1e400")
    assert words in refused(web.post("/v1/images/generations", content=body), 400, param)


def test_models_and_paths_that_are_not_there(web: httpx.Client) -> None:
    refused(web.post("/v1/videos", json={**CLIP, "model": "../../etc"}), 404, "model")
    refused(web.post("/v1/images/generations", json={**PICTURE, "model": "Wan-AI/nothing"}), 404, "model")
    for path in ("/v1/videos/nothing", "/v1/videos/..%2f..%2fetc/content", "/v1/images/0123456789abcdef/content", "/v1/images/..%2f/content", "/v1/x"):
        refused(web.get(path), 404)
    refused(web.put("/v1/videos"), 405)


def test_broken_bodies(web: httpx.Client) -> None:
    for body in (b"", b"{", b"[]", b"1", b"\xff", b"[" * 100_000, b'"a"', b"null"):
        refused(web.post("/v1/videos", content=body), 400)


def test_a_full_queue_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    engine = Engine(tmp_path_factory.mktemp("full"), limits=Limits(max_queue=1))
    with TestClient(Api(engine).app()) as web:
        assert web.post("/videos", json=CLIP).status_code == 200
        refused(web.post("/videos", json=CLIP), 429, "queue")
    engine.close()


def test_nobody_waits_for_a_server_that_stops(tmp_path_factory: pytest.TempPathFactory) -> None:
    import threading

    ended, engine = threading.Event(), Engine(tmp_path_factory.mktemp("stopping"))  # which does not work on its queue
    with TestClient(Api(engine, ended).app()) as web:
        threading.Timer(0.5, ended.set).start()
        assert "next start" in refused(web.post("/images/generations", json=PICTURE), 503)
    engine.close()


def test_no_route_can_hold_up_the_page(tmp_path_factory: pytest.TempPathFactory) -> None:
    engine = Engine(tmp_path_factory.mktemp("routes"))
    endpoints = [route.endpoint for route in Api(engine).app().routes if hasattr(route, "endpoint")]
    assert len(endpoints) >= 8
    assert not [each for each in endpoints if inspect.iscoroutinefunction(each)], "a slow one would stop every page"
    engine.close()


# --- any JSON -----------------------------------------------------------------------------------------------

ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["tiny-video", "32x32", "auto", "plain", "4"])
ANYTHING = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8)


def nearly(keys: tuple[str, ...], right: dict[str, Any]) -> st.SearchStrategy[Any]:
    """A good body with some keys replaced by anything; or anything."""
    return st.dictionaries(st.sampled_from(keys) | st.text(max_size=6), ANYTHING, max_size=4).map(lambda change: {**right, **change}) | ANYTHING


@settings(max_examples=200, deadline=None)
@given(nearly(IMAGE, PICTURE))
def test_any_body_of_pictures_is_a_request_or_a_clear_error(body: Any) -> None:
    try:
        asked, _ = images(body_of(json.dumps(body).encode()))
        for each in asked:
            read(each)
    except (ApiError, RequestError) as error:
        assert str(error)


@settings(max_examples=200, deadline=None)
@given(nearly(VIDEO, CLIP))
def test_any_body_of_clips_is_a_request_or_a_clear_error(body: Any) -> None:
    try:
        read(video(body_of(json.dumps(body).encode())))
    except (ApiError, RequestError) as error:
        assert str(error)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(VIDEO), st.text(max_size=30), max_size=5))
def test_any_form_is_a_request_or_a_clear_error(fields: dict[str, str]) -> None:
    try:
        read(video(form_of({**CLIP, **fields})))
    except (ApiError, RequestError) as error:
        assert str(error)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(nearly(VIDEO, CLIP))
def test_any_body_is_answered(any_api: TestClient, body: Any) -> None:
    answer = any_api.post("/videos", content=json.dumps(body))
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    assert ("error" in answer.json()) is (answer.status_code != 200) or answer.json()["object"] == "video"


@pytest.fixture(scope="module")
def any_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    engine = Engine(tmp_path_factory.mktemp("any"), limits=Limits(max_queue=60))
    with TestClient(Api(engine).app()) as found:
        yield found
    engine.close()
