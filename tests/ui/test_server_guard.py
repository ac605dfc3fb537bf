"""The door in front of the page: what is refused, with which words, and that a plain visitor notices nothing."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hasten.errors import UsageError
from hasten.ui.engine import Engine, Limits
from hasten.ui.server import Address, Guard, Site
from hasten.ui.server.guard import names_address
from tests.ui.sites import bare, client

OURS = ("127.0.0.1", "localhost", "[::1]", "127.0.0.1:7860", "LOCALHOST:80")
FOREIGN = ("evil.com", "evil.com:7860", "127.0.0.1.evil.com", "localhost.evil.com", "", "0.0.0.0", "127.0.0.2", "[::2]")
FILE = {"meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("guarded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "files"))
        engine = Engine(folder / "home", limits=Limits(max_upload=200_000, max_request=20_000))
        with Site(engine, Address(port=0), bare()) as served:
            yield served
        engine.close()


@pytest.fixture
def web(site: Site) -> Iterator[httpx.Client]:
    with client(site.url) as found:
        yield found


def call(web: httpx.Client, name: str, *values: object, **headers: str) -> httpx.Response:
    return web.post(f"/gradio_api/call/{name}", json={"data": list(values)}, headers=headers)


def answer(web: httpx.Client, name: str, *values: object) -> str:
    begun = call(web, name, *values)
    assert begun.status_code == 200, begun.text
    return web.get(f"/gradio_api/call/{name}/{begun.json()['event_id']}").text


# --- hosts, origins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", OURS)
def test_own_names_are_answered(web: httpx.Client, host: str) -> None:
    assert web.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("path", ["/", "/v1/models", "/gradio_api/info"])
def test_rebound_names_are_refused(web: httpx.Client, host: str, path: str) -> None:
    found = web.get(path, headers={"host": host})
    assert found.status_code == 400
    assert "127.0.0.1" in found.json()["error"]["message"]


@pytest.mark.parametrize("headers", [
    {"origin": "http://evil.com"}, {"origin": "null"}, {"origin": "http://127.0.0.1:1"}, {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"}, {"origin": "http://localhost"},
])  # fmt: skip
@pytest.mark.parametrize("path", ["/gradio_api/call/say", "/gradio_api/upload", "/gradio_api/queue/join", "/v1/videos", "/login"])
def test_other_sites_may_change_nothing(web: httpx.Client, headers: dict[str, str], path: str) -> None:
    assert web.post(path, json={"data": ["hello"]}, headers=headers).status_code == 403
    assert web.request("DELETE", path, headers=headers).status_code == 403


def test_our_own_page_may(web: httpx.Client, site: Site) -> None:
    assert call(web, "say", "hello", origin=site.url, **{"sec-fetch-site": "same-origin"}).status_code == 200
    assert '"hello"' in answer(web, "say", "hello")


def test_other_origins_may_not_read_either(web: httpx.Client) -> None:
    assert web.get("/config", headers={"origin": "http://localhost:3000"}).status_code == 403


def test_links_from_elsewhere_open_the_page(web: httpx.Client) -> None:
    assert web.get("/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}).status_code == 200


def test_forwarded_names_do_not_get_into_the_page(web: httpx.Client) -> None:
    page = web.get("/config", headers={"x-forwarded-host": "evil.com", "x-gradio-server": "http://evil.com"})
    assert page.status_code == 200
    assert "evil.com" not in page.text


# --- headers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/v1/models", "/v1/nothing", "/gradio_api/nothing"])
def test_every_answer_says_what_browsers_may_do(web: httpx.Client, path: str) -> None:
    headers = web.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "http:" not in headers["content-security-policy"] and "*" not in headers["content-security-policy"]
    assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(("name", "inline"), [("x.svg", False), ("x.html", False), ("x.htm", False), ("x.xhtml", False), ("x.png", True), ("x.json", True)])
def test_pages_and_drawings_among_results_are_not_shown(web: httpx.Client, site: Site, name: str, inline: bool) -> None:
    file = site.engine.place.outputs / name
    file.write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    found = web.get(f"/gradio_api/file={file}")
    assert found.status_code == 200
    assert found.headers["content-disposition"].startswith("inline" if inline else "attachment")
    assert inline or found.headers["content-type"] == "application/octet-stream"


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [
    "/etc/passwd", "{outputs}/../jobs.sqlite", "{outputs}/../../../secret.txt", "{outputs}/link", "{home}/secret.txt", "..%2f..%2fetc/passwd",
    "http://example.com/a.png", "HTTPS://example.com/a.png",
])  # fmt: skip
def test_only_results_are_served(web: httpx.Client, site: Site, path: str) -> None:
    home, outputs = site.engine.place.home, site.engine.place.outputs
    (home / "secret.txt").write_text("secret")
    if not (outputs / "link").is_symlink():
        (outputs / "link").symlink_to(home / "secret.txt")
    found = web.get("/gradio_api/file=" + path.format(home=home, outputs=outputs))
    assert found.status_code in (403, 404), found.text
    assert "secret" != found.text


def test_a_caller_cannot_name_a_file_of_this_machine(web: httpx.Client, site: Site) -> None:
    secret = site.engine.place.home / "secret.txt"
    secret.write_text("the secret")
    for path in (str(secret), str(site.engine.place.jobs), "/etc/passwd"):
        assert "event: error" in answer(web, "take", {"path": path, **FILE})


def test_what_was_uploaded_is_taken(web: httpx.Client) -> None:
    [path] = web.post("/gradio_api/upload", files={"files": ("a.txt", b"some words")}).json()
    assert "some words" in answer(web, "take", {"path": path, **FILE})


@pytest.mark.parametrize("value", [
    {"path": "http://example.com/a.png"}, {"x": [{"path": "HTTPS://example.com"}]}, [[{"path": " https://example.com"}]],
])  # fmt: skip
def test_nothing_is_fetched_for_a_caller(web: httpx.Client, value: object) -> None:
    assert call(web, "take", value).status_code == 403
    escaped = json.dumps({"data": [value]}).replace("http", "\\u0068ttp").replace("path", "p\\u0061th")
    assert web.post("/gradio_api/call/take", content=escaped, headers={"content-type": "application/json"}).status_code == 403


def test_words_about_addresses_are_words() -> None:
    assert not names_address(b'{"data": ["path http://example.com", {"path": "/a"}, {"url": "http://127.0.0.1/a"}]}')
    assert not names_address(b"[" * 100_000)
    assert not names_address(b"\xff path")


# --- sizes --------------------------------------------------------------------------------------------------


def test_large_uploads_are_refused(web: httpx.Client) -> None:
    fits = web.post("/gradio_api/upload", files={"files": ("a.bin", b"0" * 199_000)})
    assert fits.status_code == 200
    assert web.post("/gradio_api/upload", files={"files": ("a.bin", b"0" * 201_000)}).status_code == 413
    assert web.post("/gradio_api/upload", files={"files": ("a.bin", b"0" * 5_000_000)}).status_code == 413


@pytest.mark.parametrize("path", ["/gradio_api/call/say", "/gradio_api/upload", "/v1/videos", "/gradio_api/queue/join"])
def test_bodies_that_do_not_say_how_long_they_are_end_at_the_limit(web: httpx.Client, path: str) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        while sent < 50_000_000:
            sent += 65_536
            yield b"0" * 65_536

    try:
        found = web.post(path, content=endless(), headers={"content-type": "multipart/form-data; boundary=x"})
        assert found.status_code in ((400, 413) if path == "/v1/videos" else (413,))  # 400: it takes no files, and says so at the first one
    except httpx.TransportError:  # the server has hung up, which is as good
        pass
    assert sent < 50_000_000


# --- passwords ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auth", [None, "me:pass word"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_other_machines_need_a_password(host: str, auth: str | None) -> None:
    if auth is not None:
        assert not Address(host, 0, auth).loopback
        return
    with pytest.raises(UsageError, match="--auth user:password"):
        Address(host, 0, auth)


@pytest.mark.parametrize("auth", ["", "me", ":", "me:", ":secret"])
def test_a_password_has_two_parts(auth: str) -> None:
    with pytest.raises(UsageError, match="user:password"):
        Address("127.0.0.1", 0, auth)


def test_names_that_are_answered_to() -> None:
    wide = Address("0.0.0.0", 0, "me:secret")
    assert wide.answers_to("192.168.1.5") and wide.answers_to("[2001:db8::1]") and wide.answers_to("localhost")
    assert not wide.answers_to("evil.com") and not wide.answers_to("")
    assert not Address().answers_to("192.168.1.5")


def test_the_password_is_asked_for_everything(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    with Site(engine, Address("127.0.0.1", 0, "me:söcret"), bare()) as site, client(site.url) as web:
        for path in ("/", "/config", "/v1/models", "/gradio_api/file=/etc/passwd", "/theme.css"):
            found = web.get(path)
            assert found.status_code == 401
            assert found.headers["www-authenticate"].startswith("Basic")
        right = base64.b64encode("me:söcret".encode()).decode()
        assert web.get("/", headers={"authorization": f"Basic {right}"}).status_code == 200
        assert web.get("/v1/models", headers={"authorization": "Bearer me:söcret".encode()}).status_code == 200  # type: ignore[dict-item]
        for wrong in ("Basic !!", f"Basic {base64.b64encode(b'me:secret').decode()}", "Bearer", f"Digest {right}"):
            assert web.get("/", headers={"authorization": wrong}).status_code == 401
    engine.close()


def test_gradio_clients_come_through(site: Site, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    (tmp_path / "words.txt").write_text("some words")
    with_a_client = Client(site.url, verbose=False)
    assert with_a_client.predict("hello", api_name="/say") == "hello"
    assert with_a_client.predict(handle_file(tmp_path / "words.txt"), api_name="/take") == "some words"


def test_a_password_lets_gradio_clients_in(tmp_path: Path) -> None:
    from gradio_client import Client

    engine = Engine(tmp_path)
    with Site(engine, Address(port=0, auth="me:secret"), bare()) as site:
        found = Client(site.url, headers={"Authorization": "Bearer me:secret"}, verbose=False)
        assert found.predict("hello", api_name="/say") == "hello"
        with pytest.raises(Exception, match="401|Could not"):
            Client(site.url, verbose=False)
    engine.close()


def test_a_pickle_is_no_lora_under_any_name(tmp_path: Path) -> None:
    import pickle

    from tests.ui.engines import VIDEO

    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "harm",))  # type: ignore[return-value]

    loras = tmp_path / "loras"
    loras.mkdir()
    (loras / "style.safetensors").write_bytes(pickle.dumps(Harm()))
    with Engine(tmp_path / "home", loras=loras) as engine:
        job = engine.wait(engine.submit({**VIDEO, "lora": "style", "steps": 2}).id)
        assert job.state == "failed" and job.error["kind"] == "refused", job.error
        assert "safetensors" in job.error["sentence"]
    assert not (tmp_path / "harm").exists()


def test_web_sockets_are_closed() -> None:
    import anyio

    sent: list[object] = []

    async def send(message: object) -> None:
        sent.append(message)

    async def never(*_: object) -> None:
        raise AssertionError("it got through")

    anyio.run(Guard(never, Address()), {"type": "websocket", "headers": [], "path": "/"}, never, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]
