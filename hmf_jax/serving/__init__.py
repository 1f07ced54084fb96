"""An OpenAI-compatible HTTP server over `hmf_jax.engine` and `hmf_jax.text`.

Needs the extra `serve`: pip install "hmf-jax[serve]".

    config      how a server is set up
    server      a server, from the files to its end
    background  one in a thread, for notebooks and tests
    engines     the engines and their memory
    router      several engines behind one door
    served      the model and its names
    app         the routes
    guard       what holds for all of them: names, keys, errors
    reading     bodies of requests
    protocol    their fields
    asks        what they ask of the engine
    grammar     structured output
    allowed     answers of some tokens only
    service     the life of requests between clients and engines
    reply       an answer while it is written
    choice      one choice of it: tokens become text
    answers     answers as JSON
    stream      answers as server-sent events
    errors      answers that are errors
    metrics     numbers for Prometheus
    page        the chat page
    load        load for a server, and what must hold meanwhile
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hmf_jax.serving.config import EngineConfig, ServeConfig

if TYPE_CHECKING:
    from hmf_jax.serving.background import running
    from hmf_jax.serving.server import serve

__all__ = ["EngineConfig", "ServeConfig", "running", "serve"]

_HOME = {"running": "background", "serve": "server"}
_NEEDED = ("starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # These bring JAX and the extra, which a client (`load`) can do without.
    if missing := [needed for needed in _NEEDED if find_spec(needed) is None]:
        raise ImportError(f'serving needs {", ".join(missing)}: pip install "hmf-jax[serve]"')
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
