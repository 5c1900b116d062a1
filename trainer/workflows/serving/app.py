"""The HTTP application: POST /recommend, GET /items, /health, /metrics, and a page to try it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi import Query as Parameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException

from trainer.workflows.recommending.recommend import Recommendations
from trainer.workflows.serving.answering import Answerer, Question
from trainer.workflows.serving.counters import Counters
from trainer.workflows.serving.limits import Observed, RequestLimit
from trainer.workflows.serving.query import Query
from trainer.workflows.serving.settings import ServeSettings
from trainer.workflows.serving.worker import Busy, Worker

_PAGE = Path(__file__).with_name("page.html")
_ANSWER = TypeAdapter(Recommendations)
_ROUTES = frozenset({"/", "/recommend", "/items", "/health", "/metrics"})
_SUGGESTED = 8
"""Items that a search lists."""


def create_app(answerer: Answerer, settings: ServeSettings) -> FastAPI:
    """The application around a loaded run; its worker thread starts and ends with it."""
    service = _Service(answerer, settings)
    app = FastAPI(
        title=f"{answerer.saved.config.system.name} on {answerer.saved.manifest.name}",
        lifespan=service.lifespan,
        docs_url=None,
        redoc_url=None,
    )  # fmt: skip - both load from a CDN
    app.add_middleware(RequestLimit, most=settings.body)
    app.add_middleware(Observed, counters=service.counters, routes=_ROUTES)
    app.post("/recommend", response_model=Recommendations)(service.recommend)
    app.get("/items")(service.search)
    app.get("/health")(service.health)
    app.get("/metrics", response_class=PlainTextResponse)(service.metrics)
    app.get("/", response_class=HTMLResponse)(_page)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Busy, _busy)
    app.add_exception_handler(Exception, _failed)
    return app


class _Service:
    """The routes, and what they share."""

    def __init__(self, answerer: Answerer, settings: ServeSettings) -> None:
        self.counters = Counters()
        self._answerer, self._settings = answerer, settings
        self._worker: Worker[Question, Recommendations] | None = None
        self._searching = asyncio.Semaphore(1)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the worker while the application runs."""
        self._worker = Worker(
            self._answerer.answer,
            batch=self._settings.batch,
            waiting=self._settings.queue,
            observe=self.counters.observe_batch,
        )
        yield
        await asyncio.to_thread(self._worker.close)

    async def recommend(self, query: Query) -> Response:
        """Recommend items after a history."""
        started = time.perf_counter()
        if len(query.history) > self._settings.history:
            raise HTTPException(
                422, f"history has {len(query.history):,} items: send the latest {self._settings.history:,}"
            )
        if query.k > self._settings.top:
            raise HTTPException(422, f"k is {query.k}: ask for at most {self._settings.top}")
        question = await self._question(query)
        assert self._worker is not None, "requests come within the lifespan"
        answer = await asyncio.wrap_future(self._worker.ask(question))
        self.counters.request_seconds.observe(time.perf_counter() - started)
        return Response(_ANSWER.dump_json(answer), media_type="application/json")

    async def _question(self, query: Query) -> Question:
        """Find the items, on the event loop: look-ups take microseconds.

        Raises:
            HTTPException: 422, for what the client can fix.
        """
        try:
            unknown = None if query.unknown == "skip" else self._unknown(query)
            if unknown is None:
                return self._answerer.read(query)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        raise HTTPException(
            422, f"item {unknown!r:.100} is neither an id nor a title of the catalog{await self._near(unknown)}"
        )

    def _unknown(self, query: Query) -> str | None:
        items = self._answerer.items
        return next((text for text in query.history if items.find(text) is None), None)

    async def _near(self, text: str) -> str:
        """Items that an unknown one may mean. Comparing it with a large catalog takes seconds: one at a time, beside
        the event loop, and others go without."""
        if self._searching.locked():
            return ""
        items = self._answerer.items
        async with self._searching:
            found = await asyncio.to_thread(items.nearest, text)
        near = [f"{items.titles[item - 1]!r} (id {items.ids[item - 1]})" for item in found]
        return f": did you mean {' or '.join(near)}?" if near else ""

    async def search(self, search: Annotated[str, Parameter(min_length=1, max_length=100)]) -> list[dict[str, str]]:
        """Items whose titles contain a text, or whose id it is."""
        items = self._answerer.items
        async with self._searching:
            found = await asyncio.to_thread(items.search, search, _SUGGESTED)
        return [{"item_id": items.ids[item - 1], "title": items.titles[item - 1]} for item in found]

    async def health(self) -> JSONResponse:
        """Whether the model answers, and what it is."""
        saved = self._answerer.saved
        alive = self._worker is not None and self._worker.alive
        facts: dict[str, Any] = {
            "status": "ok" if alive else "the model's thread has ended",
            "system": saved.config.system.name,
            "dataset": saved.manifest.name,
            "items": saved.manifest.num_items,
            "step": saved.checkpoint.progress.step,
            "weights_sha256": saved.checkpoint.weights_sha256,
            "queue": self._worker.waiting if self._worker else 0,
            "limits": asdict(self._settings),
        }
        return JSONResponse(facts, 200 if alive else 503)

    async def metrics(self) -> PlainTextResponse:
        """Counters in the text format of Prometheus."""
        text = self.counters.text(self._worker.waiting if self._worker else 0)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def _page() -> HTMLResponse:
    return HTMLResponse(_PAGE.read_text(encoding="utf-8"))


def _error(status: int, message: object, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": " ".join(str(message).split())}, status, headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """The first thing that is wrong, by its place; the input is not repeated."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _error(422, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if len(first["loc"]) < 2:
        return _error(422, "send a JSON object with a history, and content-type: application/json")
    where = ".".join(str(part) for part in first["loc"][1:3])
    return _error(422, f"{where}: {first['msg'].removeprefix('Value error, ')}")


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, dict(error.headers or {}))


async def _busy(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Busy)
    return _error(503, error, {"retry-after": str(error.retry_after)})


async def _failed(request: Request, error: Exception) -> JSONResponse:
    return _error(500, "the server failed; its log has the reason")
