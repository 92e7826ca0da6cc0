"""The ASGI application: paths, and how what goes wrong is worded."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from luthier import __version__
from luthier.api.answers import Answer
from luthier.api.faults import ApiError, invalid, server_error
from luthier.api.fields import PROBLEMS, ChatRequest, CompletionRequest, Drawing, ScoreRequest
from luthier.api.guard import Guard
from luthier.api.metrics import CONTENT_TYPE, Metrics
from luthier.api.respond import Counted, streamed, whole
from luthier.api.scores import ScoredModel
from luthier.api.served import Served
from luthier.api.shapes import ChatShape, CompletionShape, Shape
from luthier.api.worker import Worker
from luthier.data.answer_form import AnswerForm
from luthier.data.calls.form import Offered
from luthier.types import Request

PATHS = frozenset(
    {
        "/health",
        "/metrics",
        "/openapi.json",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/score",
    }
)
TEXT_BODY, MEDIA_BODY = 4 * 2**20, 32 * 2**20
"""Bytes of a request: of text, and of text with images as base64."""
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server takes. key: the bearer token, if any. hosts: names that it may be called by; None: any.

    queue: answers that may wait beside those under way.
    """

    key: str | None = None
    hosts: frozenset[str] | None = LOOPBACK_NAMES
    queue: int = 128
    max_body: int = TEXT_BODY


class Endpoints:
    """What is done at every path. One of `served` and `scored` is there."""

    def __init__(self, model: Served | ScoredModel, queue: int) -> None:
        self._model, self.metrics = model, Metrics()
        rows = model.answerer.engine.rows if isinstance(model, Served) else 1
        self.worker = Worker(model.answerer.engine if isinstance(model, Served) else None, rows + queue)
        # Prompts are rendered and tokenized beside the event loop, which has streams to serve.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")

    async def chat(self, body: ChatRequest, http: HttpRequest) -> Response:
        served = self._language_model()
        requests = await self._read(served.chat, body)
        shape = ChatShape(served, body.model, bool(body.logprobs), body.with_usage)
        offered = (tool.function for tool in body.tools or () if body.tool_choice != "none")
        tools = {tool.name: tool.parameters or {} for tool in offered}
        return await self._answer(served, body, requests, shape, http, served.answerer.form, tools)

    async def completions(self, body: CompletionRequest, http: HttpRequest) -> Response:
        served = self._language_model()
        requests = await self._read(served.completion, body)
        shape = CompletionShape(served, body.model, body.logprobs is not None, body.with_usage)
        return await self._answer(served, body, requests, shape, http, AnswerForm(), ())

    async def score(self, body: ScoreRequest, http: HttpRequest) -> Response:
        model = self._model
        if isinstance(model, Served):
            raise invalid(
                "this is a language model; scores come from a reward model (stage.type: rm)", "model"
            )
        samples, tokens = await self._read(model.samples, body)
        self.metrics.prompt_tokens += tokens
        scores = await self.worker.do(lambda: model.scores(samples))
        return JSONResponse(model.answer(body.model, scores, tokens))

    async def models(self) -> dict[str, Any]:
        created, names = self._model.created, list(self._model.names)
        data = [
            {"id": name, "object": "model", "created": created, "owned_by": "luthier"}
            | ({} if name == self._model.name else {"parent": self._model.name})
            for name in names
        ]
        return {"object": "list", "data": data}

    async def model(self, name: str) -> dict[str, Any]:
        found = [entry for entry in (await self.models())["data"] if entry["id"] == name]
        if not found:
            raise self._model.unknown(name)
        return dict(found[0])

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def page_of_metrics(self) -> Response:
        running = self.worker.running
        text = self.metrics.text(waiting=max(self.worker.outstanding - running, 0), running=running)
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Step the engine as long as the server runs."""
        self.worker.start()
        yield
        await self.worker.stop()
        self._reader.shutdown()

    def _language_model(self) -> Served:
        if not isinstance(self._model, Served):
            raise invalid("this is a reward model, which answers nothing; ask /v1/score", "model")
        return self._model

    async def _read(self, build: Any, body: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._reader, build, body)

    async def _answer(
        self,
        served: Served,
        body: Drawing,
        requests: list[Request],
        shape: Shape,
        http: HttpRequest,
        form: AnswerForm,
        tools: Offered,
    ) -> Response:
        asker = self.worker.ask(requests)
        answers = [
            Answer(number, served.decode, form, request.settings.stop, tools, live=bool(body.stream))
            for number, request in enumerate(requests)
        ]
        each = body.n or 1
        counted = Counted(self.metrics, sum(len(request.prompt) for request in requests[::each]))
        if not body.stream:
            return await whole(asker, answers, shape, counted, http)
        return streamed(asker, answers, shape, counted)


def create_app(model: Served | ScoredModel, limits: Limits) -> tuple[FastAPI, Endpoints]:
    """The application on a loaded model, and what is behind its paths."""
    ends = Endpoints(model, limits.queue)
    app = FastAPI(title="Luthier", version=__version__, docs_url=None, redoc_url=None, lifespan=ends.lifespan)
    posts = {"/v1/chat/completions": ends.chat, "/v1/completions": ends.completions, "/v1/score": ends.score}
    for path, endpoint in posts.items():
        app.add_api_route(path, endpoint, methods=["POST"], response_model=None)
    gets: dict[str, Any] = {
        "/v1/models": ends.models,
        "/v1/models/{name:path}": ends.model,
        "/health": ends.health,
    }
    for path, endpoint in (gets | {"/metrics": ends.page_of_metrics}).items():
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(
        Guard,
        metrics=ends.metrics,
        paths=PATHS,
        key=limits.key,
        max_body=limits.max_body,
        hosts=None if limits.key is not None else limits.hosts,
    )
    return app, ends


# --------------------------------------------------------------------------------------------------
# Errors


def _json(error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _api_error(_: HttpRequest, error: ApiError) -> Response:
    return _json(error)


async def _http_error(_: HttpRequest, error: Any) -> Response:
    return _json(ApiError(error.status_code, str(error.detail)))


async def _unexpected(_: HttpRequest, error: Exception) -> Response:
    return _json(server_error(f"the server failed ({type(error).__name__}); see its log"))


async def _invalid(_: HttpRequest, error: Any) -> Response:
    """The first problem of a body; of a union's members the one that `fields` has found itself, which says more."""
    problems = error.errors()
    problem = next((found for found in problems if found["type"] in PROBLEMS), problems[0])
    context = problem.get("ctx", {})
    if problem["type"] == "json_invalid":
        return _json(invalid(f"the body is not JSON: {context.get('error', 'it cannot be read')}"))
    # A union's member stands in the location by its type, which is no field of the request.
    parts = [part for part in problem["loc"][1:] if isinstance(part, int) or re.fullmatch("[a-z_]+", part)]
    where = ".".join(str(part) for part in parts if part not in ("str", "int"))
    message = f"{where}: {problem['msg']}" if where else problem["msg"]
    field = context.get("field")
    return _json(invalid(message, (f"{where}.{field}" if where else field) if field else where or None))
