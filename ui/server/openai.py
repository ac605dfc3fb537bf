"""`/v1`: images and videos for programs that know the usual APIs. The jobs are the page's jobs, in the same queue.

All routes are plain functions, which the server runs in threads: none can hold up the page. What waits for a picture is bounded.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException

from hasten.errors import HastenError, LimitError, ModelError, OutputError, UsageError
from hasten.ui.engine import Engine, Job, RequestError
from hasten.ui.server.openai_ask import ApiError, body_of, form_of, images, video

WAITING = 16
"""Calls that wait for their pictures at the same time; the next is told to come again."""

LOOK = 0.1
"""Seconds between two looks at a job that is waited for."""

STATUS = {
    "queued": "queued", "running": "in_progress", "done": "completed", "failed": "failed", "cancelled": "cancelled", "interrupted": "failed",
}  # fmt: skip
MEDIA = {".png": "image/png", ".mp4": "video/mp4"}


async def _body(request: Request) -> dict[str, Any]:
    """What was sent, of JSON or a form without files."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        async with request.form(max_files=0, max_fields=40) as form:
            return form_of(form)
    return body_of(await request.body())


Body = Annotated[dict[str, Any], Depends(_body)]


class Api:
    """The routes, on one engine. ended: set when the server stops, so that nobody waits on."""

    def __init__(self, engine: Engine, ended: threading.Event | None = None) -> None:
        self.engine, self.ended = engine, ended or threading.Event()
        self._places = threading.BoundedSemaphore(WAITING)

    def app(self) -> FastAPI:
        """To be mounted at `/v1`."""
        app = FastAPI(title="hasten", openapi_url=None, docs_url=None, redoc_url=None)
        app.get("/models")(self.models)
        app.post("/images/generations")(self.images)
        app.get("/images/{output}/content")(self.image)
        app.post("/videos")(self.make_video)
        app.get("/videos")(self.videos)
        app.get("/videos/{job}")(self.video)
        app.get("/videos/{job}/content")(self.content)
        app.delete("/videos/{job}")(self.delete)
        for kind in (ApiError, HastenError, HTTPException):
            app.add_exception_handler(kind, _explained)
        return app

    # --- models and pictures ----------------------------------------------------------------------

    def models(self) -> dict[str, Any]:
        """Those that are on this disk and make pictures or clips."""
        cards = [card for card in self.engine.models.cards() if card.ready and card.kind in ("image", "video", "masked-image")]
        rows = [{"id": card.id, "object": "model", "created": 0, "owned_by": card.where, "kind": card.kind, "licence": card.licence} for card in cards]
        return {"object": "list", "data": rows}

    def images(self, body: Body, request: Request) -> dict[str, Any]:
        """Make pictures, and answer when they are there."""
        asked, form = images(body)
        self._must_make("image", asked[0]["model"], "For clips there is /v1/videos.")
        with self._place():
            jobs = [self.engine.submit(each) for each in asked]
            done = [self._done(job.id) for job in jobs]
        return {"created": int(done[-1].made), "data": [self._picture(job, form, request) for job in done]}

    def image(self, output: str) -> FileResponse:
        """A picture by the id of its result."""
        return self._file(output)

    def _picture(self, job: Job, form: str, request: Request) -> dict[str, Any]:
        output = job.result["output"]
        about = {"seed": job.asked["seed"], "recipe": job.result["row"]["recipe"], "hasten": {"job": job.id, "row": job.result["row"]}}
        if form == "b64_json":
            return {"b64_json": base64.b64encode(self._path(output).read_bytes()).decode(), **about}
        return {"url": str(request.url_for("image", output=output)), **about}

    # --- clips ------------------------------------------------------------------------------------

    def make_video(self, body: Body) -> dict[str, Any]:
        """Put a clip into the queue, and say under which id."""
        asked = video(body)
        self._must_make("video", asked["model"], "For pictures there is /v1/images/generations.")
        return self._told(self.engine.submit(asked))

    def videos(self, limit: int = 20) -> dict[str, Any]:
        """The newest first."""
        found = self.engine.jobs.list(max(1, min(limit, 100)), kinds=("generate",))
        return {"object": "list", "data": [self._told(job) for job in found]}

    def video(self, job: str) -> dict[str, Any]:
        """Where it stands."""
        return self._told(self._job(job))

    def content(self, job: str, variant: str = "video") -> FileResponse:
        """The file; `variant=thumbnail` for a picture of it."""
        found = self._job(job)
        if found.state != "done":
            raise ApiError(409, f"Video {job} is {STATUS[found.state]}. Its content is there when it is completed.", code="not_ready")
        if variant not in ("video", "thumbnail"):
            raise ApiError(400, "variant: allowed are video and thumbnail.", "variant")
        return self._file(found.result["output"], "thumb" if variant == "thumbnail" else "media")

    def delete(self, job: str) -> dict[str, Any]:
        """Stop it where it is not over; forget it and its files where it is."""
        found = self.engine.cancel(self._job(job).id)
        if found.over and found.state != "cancelled":
            if output := found.result.get("output"):
                self.engine.outputs.remove(output)
            self.engine.remove(job)
        return {"id": job, "object": "video.deleted", "deleted": True}

    def _told(self, job: Job) -> dict[str, Any]:
        asked, where = job.asked, self.engine.snapshot(job.id)
        width, height, row = asked.get("width"), asked.get("height"), job.result.get("row", {})
        size = f"{row.get('width', width)}x{row.get('height', height)}" if row or (width and height) else "auto"
        share = 100 if job.state == "done" else min(99, round(100 * where.step / where.steps)) if where.steps and job.state == "running" else 0
        told = {
            "id": job.id, "object": "video", "model": asked.get("model"), "status": STATUS[job.state], "progress": share,
            "created_at": int(job.made), "completed_at": int(job.ended) if job.state == "done" and job.ended else None, "size": size,
            "prompt": asked.get("prompt"), "recipe": asked.get("recipe"), "error": None,
        }  # fmt: skip
        if row:
            told["hasten"] = {"row": row}
        if STATUS[job.state] == "failed":
            words = job.error.get("sentence") or "It was interrupted: the process that made it has ended. Send it again."
            told["error"] = {"code": job.error.get("kind", job.state), "message": words}
        return told

    def _job(self, job: str) -> Job:
        """Raises `ApiError` where it is none of ours to tell about."""
        try:
            found = self.engine.job(job)
        except UsageError as error:
            raise ApiError(404, str(error), code="not_found") from None
        if found.kind != "generate":
            raise ApiError(404, f"Job {job} is no video but a {found.kind}. It is on the page.", code="not_found")
        return found

    # --- shared -----------------------------------------------------------------------------------

    def _must_make(self, kind: str, model: Any, instead: str) -> None:
        if not isinstance(model, str):
            raise ApiError(400, "model: it must be text, one of /v1/models.", "model")
        try:
            found = self.engine.models.card(model).kind
        except ModelError:
            raise ApiError(404, "There is no such model here; /v1/models lists them.", "model", "model_not_found") from None
        if found.removeprefix("masked-") != kind:
            raise ApiError(400, f"{model} makes no {kind}s ({found}). {instead}", "model")

    @contextmanager
    def _place(self) -> Iterator[None]:
        if not self._places.acquire(blocking=False):
            raise ApiError(429, f"{WAITING} calls wait for their pictures already. Come again in a moment.", code="rate_limit_exceeded")
        try:
            yield
        finally:
            self._places.release()

    def _done(self, job: str) -> Job:
        """The job when it is over. Raises `ApiError` for one that did not end well."""
        while not (found := self.engine.job(job)).over:
            if self.ended.wait(LOOK):
                raise ApiError(503, "The server is being stopped. The job waits for its next start.", code="stopping")
        if found.state == "done":
            return found
        if found.state == "failed":
            status = 400 if found.error.get("kind") == "refused" else 500
            raise ApiError(status, found.error.get("sentence", "It failed."), code=found.error.get("kind"))
        raise ApiError(409, f"Job {job} was {found.state}.", code=found.state)

    def _path(self, output: str, which: str = "media") -> Path:
        try:
            name = self.engine.outputs.get(output).get(which)
            return self.engine.outputs.file(output, str(name))
        except UsageError as error:
            raise ApiError(404, str(error), code="not_found") from None

    def _file(self, output: str, which: str = "media") -> FileResponse:
        path = self._path(output, which)
        if path.suffix not in MEDIA:
            raise ApiError(404, f"Result {output} is no picture and no clip.", code="not_found")
        return FileResponse(path, media_type=MEDIA[path.suffix], filename=f"{output}{path.suffix}", content_disposition_type="inline")


def _explained(_: Request, error: Exception) -> JSONResponse:
    """Any error in the shape that clients know. Raised on purpose: 4xx; a full disk: 507."""
    found = _as_api(error)
    kind = "invalid_request_error" if found.status < 500 else "server_error"
    return JSONResponse({"error": {"message": found.message, "type": kind, "param": found.param, "code": found.code}}, found.status)


def _as_api(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        full = error.what == "queue"
        return ApiError(429 if full else 400, str(error), error.what, "queue_full" if full else "invalid_value")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), code="not_found" if error.status_code == 404 else None)
    if isinstance(error, OutputError):
        return ApiError(507, str(error), code="no_space")
    return ApiError(400, str(error), "model" if isinstance(error, ModelError) else None, "too_large" if isinstance(error, LimitError) else None)
