"""ASGI middleware around the application: the size of requests, headers, counting."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer.workflows.serving.counters import Counters

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # The page has its style and script inside, and talks to its own server alone.
    (b"content-security-policy", b"default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; "
     b"script-src 'unsafe-inline'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"),
)  # fmt: skip


class RequestLimit:
    """Refuses requests of too many bytes, announced or not, before they are read whole."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not announced.isdigit() or int(announced[:20]) > self._most:
            response = JSONResponse({"error": self._refusal}, 413, headers={"connection": "close"})
            await response(scope, receive, send)
            return
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise HTTPException(413, self._refusal, {"connection": "close"})
            return message

        await self._app(scope, limited, send)

    @property
    def _refusal(self) -> str:
        return f"the request has more than {self._most:,} bytes: send less"


class Observed:
    """Counts responses by route and status, and adds headers that keep browsers from misreading them."""

    def __init__(self, app: ASGIApp, counters: Counters, routes: frozenset[str]) -> None:
        self._app, self._counters, self._routes = app, counters, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self._routes else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counters.responses[route, message["status"]] += 1
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:  # answered with 500 outside of this
            self._counters.responses[route, 500] += 1
            raise
