"""The routes of the server."""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hmf_jax.serving import asks
from hmf_jax.serving.answers import Chunks, whole
from hmf_jax.serving.asks import Ask, Prompt
from hmf_jax.serving.errors import ApiError, invalid
from hmf_jax.serving.guard import Guard, told
from hmf_jax.serving.page import page_response
from hmf_jax.serving.protocol import (
    Abort,
    Chat,
    Completion,
    Detokenize,
    Fields,
    TokenizeChat,
    TokenizeText,
    read,
)
from hmf_jax.serving.reading import Reader
from hmf_jax.serving.service import READY, Service
from hmf_jax.serving.stream import Batches, EventStream, while_connected

log = logging.getLogger(__name__)


def make_app(service: Service) -> Starlette:
    """The server as an ASGI application.

    Args:
      service: what answers.
    """
    routes, settings = _Routes(service), service.settings
    middleware = [Middleware(Guard, keys=settings.api_keys)]
    if settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=routes.table(),
        middleware=middleware,
        exception_handlers={ApiError: told, HTTPException: told},
    )
    app.router.redirect_slashes = False
    return app


class _Routes:
    """What answers each path."""

    def __init__(self, service: Service) -> None:
        self._service, self._reader = service, Reader(service.settings.max_body)
        self._ignored: set[str] = set()  # fields that were logged

    def table(self) -> list[Route]:
        get: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/": self.page,
            "/health": self.health,
            "/ready": self.ready,
            "/metrics": self.metrics,
            "/version": self.version,
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.model,
            "/tokenizer_info": self.tokenizer_info,
            "/prefix_cache": self.prefix_cache,
        }
        post: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.completions,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
            "/abort_request": self.abort_request,
            "/reset_prefix_cache": self.reset_prefix_cache,
        }
        return [
            *(Route(path, handler, methods=["GET"]) for path, handler in get.items()),
            *(Route(path, handler, methods=["POST"]) for path, handler in post.items()),
        ]

    # The two that generate.

    async def chat(self, request: Request) -> Response:
        fields = await self._read(request, Chat)
        served = self._service.model

        def prompts() -> list[Prompt]:
            return [asks.render(fields, served, effort=fields.reasoning_effort)]

        return await self._generate(request, fields, prompts)

    async def completions(self, request: Request) -> Response:
        fields = await self._read(request, Completion)
        served = self._service.model
        return await self._generate(request, fields, lambda: asks.prompts_of(fields, served))

    async def _generate(
        self,
        request: Request,
        fields: Completion | Chat,
        prompts: Callable[[], list[Prompt]],
    ) -> Response:
        service = self._service
        served = service.model
        asks.check(fields, served)
        structured = asks.structured(fields)
        length = request.headers.get("content-length", "0")
        service.check(int(length) // 4 if length.isdigit() else 0)
        found = await self._reader.apart(prompts)
        constrain = None
        if structured is not None:
            param = "structured_outputs" if fields.structured_outputs else "response_format"
            thinking = found[0].thinking
            constrain = await service.constrain(structured, thinking=thinking, param=param)
        id = request.scope["state"]["request_id"]
        ask = asks.ask(fields, found, served, request_id=id, constrain=constrain)
        if fields.stream:
            return EventStream(self._batches(ask))
        with service.open(ask) as reply:
            await while_connected(request.receive, reply.whole())
            return JSONResponse(whole(reply, served))

    async def _batches(self, ask: Ask) -> Batches:
        with self._service.open(ask) as reply:
            chunks = Chunks(reply, self._service.model)
            async for pieces in reply.pieces():
                yield chunks.of(pieces)
            yield chunks.last()

    async def _read[Kind: Fields](
        self, request: Request, kind: type[Kind], **others: type[Kind]
    ) -> Kind:
        """The fields of a request; `others`: of which kind one is that has this field."""

        def fields_of(body: dict[str, Any]) -> tuple[Kind, list[str]]:
            found = (other for name, other in others.items() if body.get(name) is not None)
            return read(next(found, kind), body)

        fields, unknown = await self._reader.read(request, fields_of)
        for name in unknown:
            self._service.metrics.ignored(name)
            if name not in self._ignored and len(self._ignored) < 1000:
                self._ignored.add(name)
                log.warning("requests have the field %.100r, which means nothing here", name)
        self._service.model.alias(getattr(fields, "model", None))
        return fields

    # What is served.

    async def models(self, request: Request) -> Response:
        served = self._service.model
        names = [*served.names, *served.settings.aliases]
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._service.model.alias(name)
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        served = self._service.model
        own = served.names[0]
        return {
            "id": name,
            "object": "model",
            "created": served.since,
            "owned_by": "hmf-jax",
            "root": own,
            "parent": None if name == own else own,
            "max_model_len": served.length,
        }

    async def page(self, request: Request) -> Response:
        return page_response()

    async def version(self, request: Request) -> Response:
        import jax

        import hmf_jax

        served = self._service.served
        return JSONResponse(
            {
                "version": hmf_jax.__version__,
                "jax": jax.__version__,
                "devices": [device.device_kind for device in jax.devices()],
                "model_fingerprint": None if served is None else served.fingerprint,
            }
        )

    async def health(self, request: Request) -> Response:
        return Response(status_code=200 if self._service.alive else 503)

    async def ready(self, request: Request) -> Response:
        ready = self._service.state == READY and self._service.alive
        return Response(status_code=200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        body, kind = await self._service.numbers()
        return Response(body, media_type=kind)

    # Text and tokens.

    async def tokenize(self, request: Request) -> Response:
        kinds: dict[str, type[TokenizeText | TokenizeChat]] = {"messages": TokenizeChat}
        fields = await self._read(request, TokenizeText, **kinds)
        served = self._service.model
        if isinstance(fields, TokenizeChat):
            tokens = (await self._reader.apart(asks.render, fields, served)).tokens
        else:
            special = fields.add_special_tokens
            encode = functools.partial(served.tokenizer.encode, add_special_tokens=special)
            tokens = await self._reader.apart(encode, fields.prompt)
        answer = {"tokens": tokens, "count": len(tokens), "max_model_len": served.length}
        if fields.return_token_strs:
            answer["token_strs"] = served.tokenizer.convert_ids_to_tokens(tokens)
        return JSONResponse(answer)

    async def detokenize(self, request: Request) -> Response:
        fields = await self._read(request, Detokenize)
        served = self._service.model
        served.check_ids(fields.tokens, "tokens")
        text = await self._reader.apart(served.tokenizer.decode, fields.tokens)
        return JSONResponse({"prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        served = self._service.model
        tokenizer = served.tokenizer
        names = ("eos_token", "bos_token", "pad_token", "unk_token")
        return JSONResponse(
            {
                "tokenizer_class": type(tokenizer).__name__,
                **{name: getattr(tokenizer, name, None) for name in names},
                "chat_template": tokenizer.chat_template,
                "vocab_size": len(tokenizer),
                "max_model_len": served.length,
            }
        )

    # For whoever runs it.

    async def abort_request(self, request: Request) -> Response:
        fields = await self._read(request, Abort)
        if fields.request_id is None and not fields.abort_all:
            raise invalid("request_id: is required, unless abort_all is true", "request_id")
        name = None if fields.abort_all else fields.request_id
        return JSONResponse({"aborted": self._service.abort(name)})

    async def prefix_cache(self, request: Request) -> Response:
        return JSONResponse({"engines": await self._service.prefix_cache()})

    async def reset_prefix_cache(self, request: Request) -> Response:
        return JSONResponse({"dropped": await self._service.reset_prefix_cache()})
