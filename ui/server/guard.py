"""The door in front of the page: every request passes here first, every answer last. No request to another host is let through.

A page on this machine is reached by any web site that this machine's browser shows: under a name that its owner points at
127.0.0.1 (DNS rebinding), or by forms and images that send without asking (cross-site requests). So the Host must be one of
ours, whatever says where it comes from must say from here, and a password, where there is one, is asked for each request.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hasten.ui.engine import Limits
from hasten.ui.server.address import Address

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""

NOT_FORWARDED = (b"x-forwarded-", b"x-gradio-server", b"forwarded")
"""Headers by which a caller could tell Gradio another address to put into its pages."""

WRONG = 0.5
"""Seconds that a wrong password costs."""

UPLOAD_ROOM = 64 * 2**10
"""Bytes around an uploaded file: the parts of a form."""

POLICY = (
    "default-src 'self'",
    # Gradio starts by inline scripts, and makes functions of its components' code.
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
    "style-src 'self' 'unsafe-inline'",
    "img-src 'self' data: blob:",
    "media-src 'self' data: blob:",
    "font-src 'self' data:",
    "connect-src 'self' data: blob:",
    "worker-src 'self' blob:",
    "frame-src 'none'",
    "object-src 'none'",
    "base-uri 'self'",
    "form-action 'self'",
    "frame-ancestors 'none'",
)

HEADERS = {
    "Content-Security-Policy": "; ".join(POLICY),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not answered. status: of HTTP. sentence: what and why. code: a word for programs."""

    status: int
    sentence: str
    code: str


class Guard:
    """An ASGI application around another one.

    address: whose names are accepted, and whose password is asked for. limits: `max_upload` for files, `max_request` (four times,
    for what Gradio sends along) for everything else.
    """

    def __init__(self, app: ASGIApp, address: Address, limits: Limits | None = None) -> None:
        self.app, self.address, self.limits = app, address, limits or Limits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # nothing here speaks by web sockets
            return await send({"type": "websocket.close", "code": 1008})
        answer = _Answer(scope, send)
        headers = Headers(scope=scope)
        refusal = self._where_from(scope, headers)
        if refusal is None and not self._knows(headers):
            await anyio.sleep(WRONG if "authorization" in headers else 0)
            refusal = Refusal(401, "A name and a password are needed here.", "unauthorized")
        if refusal is not None:
            return await answer.refuse(refusal)
        body = _Body(receive, self._room(scope))
        if body.declared(headers):
            return await answer.refuse(body.refusal)
        if scope["method"] not in SAFE and not _is_upload(scope) and not scope["path"].startswith("/v1/"):
            called = await body.whole()
            if body.full:
                return await answer.refuse(body.refusal)
            if names_address(called):
                return await answer.refuse(Refusal(403, "Files are not fetched from other hosts. Upload the file itself.", "foreign_address"))
        scope = {**scope, "headers": [pair for pair in scope["headers"] if not pair[0].lower().startswith(NOT_FORWARDED)]}
        answer.body = body
        await self.app(scope, body.receive, answer.send)

    # --- checks -----------------------------------------------------------------------------------

    def _where_from(self, scope: Scope, headers: Headers) -> Refusal | None:
        """Whether the browser that sends this looks at our page, as far as it says."""
        host = headers.get("host", "").lower()
        if not self.address.answers_to(_name(host)):
            return Refusal(400, f"This page is not called {host[:80]!r}. Use its own address, such as 127.0.0.1.", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host:
            return Refusal(403, f"A page of {origin[:80]!r} may not ask this one.", "wrong_origin")
        if scope["method"] not in SAFE and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return Refusal(403, "Another site may not send this.", "wrong_origin")
        if "file=http:" in (path := scope["path"].lower()) or "file=https:" in path or "/proxy=" in path:
            return Refusal(403, "Files are not fetched from other hosts.", "foreign_address")
        return None

    def _knows(self, headers: Headers) -> bool:
        """Does it bring the password, where there is one? As a browser does (Basic) or as an API's client does (Bearer)."""
        if self.address.auth is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() not in ("basic", "bearer"):
            return False
        try:
            said = base64.b64decode(given, validate=True) if scheme.lower() == "basic" else given.encode("latin-1")
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(said, self.address.auth.encode())

    def _room(self, scope: Scope) -> int:
        return self.limits.max_upload + UPLOAD_ROOM if _is_upload(scope) else 4 * self.limits.max_request


def names_address(body: bytes) -> bool:
    """Does a call of Gradio hand over a file by its address? Gradio would fetch it."""
    if b"path" not in body and b"\\u" not in body:
        return False
    try:
        waiting: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        return False  # Gradio cannot read it either
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and path.strip().lower().startswith(("http:", "https:")):
                return True
            waiting += value.values()
    return False


def _is_upload(scope: Scope) -> bool:
    return bool(scope["path"].rstrip("/").endswith("/upload"))


def _name(host: str) -> str:
    """A Host header without its port."""
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]


class _Body:
    """What a request brings, counted."""

    def __init__(self, receive: Receive, room: int) -> None:
        self._receive, self._room, self._seen = receive, room, 0
        self._held: list[Message] = []
        self.full = self.ended = False

    @property
    def refusal(self) -> Refusal:
        return Refusal(413, f"This is too large: at most {self._room:,} bytes are taken here.", "too_large")

    def declared(self, headers: Headers) -> bool:
        """Does it say itself that it is too large?"""
        length = headers.get("content-length", "0")
        return not length.isdecimal() or len(length) > 18 or int(length) > self._room

    async def receive(self) -> Message:
        """The next part; where there have been too many bytes, the end."""
        return self._held.pop(0) if self._held else await self._next()

    async def whole(self) -> bytes:
        """All of it, which `receive` then gives again."""
        held: list[Message] = []
        while True:
            held.append(await self._next())
            if held[-1]["type"] != "http.request" or not held[-1].get("more_body", False):
                break
        self._held = held
        return b"".join(part.get("body", b"") for part in held)

    async def _next(self) -> Message:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen > self._room:
            self.full = True
            return {"type": "http.disconnect"}
        self.ended = not message.get("more_body", False)
        return message


class _Answer:
    """What goes back, with our headers."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._path, self._method, self._send = scope["path"], scope["method"], send
        self.body: _Body | None = None
        self._replaced = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self.body is not None and self.body.full:
                self._replaced = True
                return await self.refuse(self.body.refusal)
            self._dress(message)
        if not self._replaced:
            await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer in the form that `/v1` has everywhere."""
        text = json.dumps({"error": {"message": refusal.sentence, "type": "invalid_request_error", "param": None, "code": refusal.code}})
        raw = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
        if refusal.status == 401:
            raw.append((b"www-authenticate", b'Basic realm="hasten", charset="UTF-8"'))
        start: MutableMapping[str, Any] = {"type": "http.response.start", "status": refusal.status, "headers": raw}
        self._dress(start)
        await self._send(start)
        await self._send({"type": "http.response.body", "body": b"" if self._method == "HEAD" else text.encode()})

    def _dress(self, start: MutableMapping[str, Any]) -> None:
        headers = MutableHeaders(scope=start)
        for name, value in HEADERS.items():
            headers[name] = value
        unread = self.body is not None and self._method not in SAFE and not self.body.ended
        if start["status"] == 413 or unread:  # or the rest would still be read
            headers["Connection"] = "close"
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if "/file=" in self._path and kind in ("text/html", "image/svg+xml", "application/xhtml+xml", "text/xml", "application/xml"):
            headers["Content-Type"] = "application/octet-stream"
            headers["Content-Disposition"] = "attachment"
            headers["Content-Security-Policy"] = "sandbox; default-src 'none'"
