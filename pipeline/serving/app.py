"""The HTTP interface: POST an image to `/predict`, GET `/health`. Every answer is JSON, errors as `{"error": line}`.

The event loop reads requests and writes answers; decoding and classifying is done by the threads of `Workers`.
"""

import time
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pipeline.prediction.model import Answer, answer_of
from pipeline.serving.current import CurrentModel, ServedNow
from pipeline.serving.limits import RETRY_AFTER_SECONDS, Bodies, Limits, RequestError, Workers
from pipeline.serving.requests import image_blocks, read_body, read_options, read_threshold

PREDICT_PATHS = ("/predict", "/invocations")  # the second is MLflow's
HEALTH_PATHS = ("/health", "/ping")  # the second is MLflow's


class JsonLine(JSONResponse):
    """An answer in JSON that ends with a newline, so that the prompt of a shell is not on the same line."""

    def render(self, content: Any) -> bytes:
        """Return the bytes of the answer."""
        return super().render(content) + b"\n"


class App:
    """The ASGI application that answers with a model which may be replaced meanwhile.

    `coverage` is that of a request which states none; None reports no image as unknown. `hosts` are the names under
    which the server is asked, without port; None allows all.
    """

    def __init__(
        self,
        current: CurrentModel,
        *,
        limits: Limits | None = None,
        coverage: float | None = None,
        hosts: Collection[str] | None = None,
    ) -> None:
        self._current = current
        self._limits = limits or Limits()
        self._coverage = coverage
        self._hosts = hosts
        self._bodies = Bodies(self._limits)
        self._in_flight = 0
        self.workers = Workers(self._limits)
        self._app = Starlette(
            routes=[
                *(Route(path, self._predict, methods=["POST"]) for path in PREDICT_PATHS),
                *(Route(path, self._health, methods=["GET"]) for path in HEALTH_PATHS),
            ],
            exception_handlers={
                RequestError: _answer_request_error,
                HTTPException: _answer_http_exception,
                ClientDisconnect: _answer_nobody,
                Exception: _answer_defect,
            },
        )
        self._app.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, unless a web page of somebody else may have made it."""
        refusal = self._refuse_page(Headers(scope=scope)) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refuse_page(self, headers: Headers) -> JsonLine | None:
        """Return the answer to a request that a web page of somebody else may have made in a browser, or None.

        A browser adds `Origin` to what a page posts elsewhere. A page whose own host name leads to this server ("DNS
        rebinding") does not ask elsewhere, but has that name in `Host`.
        """
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts is not None and host and _host_name(host) not in self._hosts:
            return _refusal(403, f"the header Host names another server; allowed: {', '.join(sorted(self._hosts))}")
        if origin is not None and origin.partition("://")[2] != host:
            return _refusal(403, "web pages are not answered; leave the header Origin out")
        return None

    async def _predict(self, request: Request) -> JsonLine:
        """Classify the images of a request."""
        read_options(request.query_params)  # refuses a mistake before the body is read
        self.workers.check_room()
        self._in_flight += 1
        try:
            async with self._bodies.read(request) as body:
                work = partial(
                    _answer,
                    self._current.get(),
                    body,
                    content_type=request.headers.get("content-type", ""),
                    query=request.query_params,
                    coverage=self._coverage,
                    limits=self._limits,
                    deadline=time.monotonic() + self._limits.timeout_seconds,
                )
                return JsonLine(await self.workers.run(work))
        finally:
            self._in_flight -= 1

    async def _health(self, request: Request) -> JsonLine:  # noqa: ARG002
        """Report which model answers since when, how many requests are in flight, and whether the registry fails."""
        served = self._current.get()
        since = datetime.fromtimestamp(served.since, UTC).isoformat(timespec="seconds")
        # the reason may have addresses and paths of the server in it
        problem = "the model may not be the newest; the output of the server has the reason"
        return JsonLine(
            {
                "status": "ok",
                "model": _model_of(served),
                "since": since,
                "in_flight": self._in_flight,
                "problem": problem if self._current.problem else None,
            }
        )


def _answer(
    served: ServedNow,
    body: bytes,
    *,
    content_type: str,
    query: QueryParams,
    coverage: float | None,
    limits: Limits,
    deadline: float,
) -> dict[str, Any]:
    """Return the answer to a request; raises RequestError, also where `deadline` (time.monotonic()) has passed.

    `coverage` is that of a request which states none.
    """
    config = served.model.config
    found, params = read_body(body, content_type=content_type, config=config, max_images=limits.max_images)
    options = read_options(query, params)
    threshold = read_threshold(options.coverage, default=coverage, config=config)
    predictions = list[dict[str, Any]]()
    for images in image_blocks(found, config=config):
        if time.monotonic() > deadline:
            raise RequestError(503, "the time is up; try again later, or send fewer images")
        for row in served.model.quick_probabilities(images):
            answer = answer_of(row, config=config, top=options.top, threshold=threshold)
            predictions.append(_prediction(answer, with_unknown=threshold is not None))
    return {"model": _model_of(served), "predictions": predictions}


def _prediction(answer: Answer, *, with_unknown: bool) -> dict[str, Any]:
    """Return the answer for an image as JSON has it."""
    top = [{"class": name, "probability": probability} for name, probability in answer.top]
    prediction = {"class": answer.class_name, "probability": answer.probability, "top": top}
    return prediction | ({"is_unknown": answer.is_unknown} if with_unknown else {})


def _model_of(served: ServedNow) -> dict[str, str | None]:
    """Return name, version and MD5 of a model; of a folder or file, only the last part of its path."""
    is_path = served.version is None and ":/" not in served.name
    name = PurePath(served.name).name if is_path else served.name
    return {"name": name, "version": served.version, "md5": served.model.files.weights_md5}


def _host_name(host: str) -> str:
    """Return the name in a header Host, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> JsonLine:
    return JsonLine({"error": message}, status, headers)


async def _answer_request_error(request: Request, error: Exception) -> JsonLine:  # noqa: ARG001
    assert isinstance(error, RequestError)
    headers = {"retry-after": str(RETRY_AFTER_SECONDS)} if error.status == 503 else None
    return _refusal(error.status, str(error), headers)


async def _answer_http_exception(request: Request, error: Exception) -> JsonLine:
    """Answer where no function has the path, or none the method."""
    assert isinstance(error, HTTPException)
    messages = {
        404: f"no such path; allowed: POST {PREDICT_PATHS[0]}, GET {HEALTH_PATHS[0]}",
        405: f"{request.method} is not possible here; allowed: {(error.headers or {}).get('Allow', '')}",
    }
    return _refusal(error.status_code, messages.get(error.status_code, error.detail), error.headers)


async def _answer_nobody(request: Request, error: Exception) -> JsonLine:  # noqa: ARG001
    """Answer where the client has gone before its request was complete; only the log has the answer."""
    return _refusal(400, "the request is incomplete")


async def _answer_defect(request: Request, error: Exception) -> JsonLine:  # noqa: ARG001
    """Answer where our code fails; uvicorn prints the traceback."""
    return _refusal(500, "the server has failed; its output has the reason")
