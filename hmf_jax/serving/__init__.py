"""An OpenAI-compatible HTTP server over `hmf_jax.engine` and `hmf_jax.text`.

Needs the extra `serve`: pip install "hmf-jax[serve]".

    config    how a server is set up
    protocol  the fields of requests
    asks      what they ask of the engine
    service   the life of requests between clients and the engine
    reply     an answer while it is written
    choice    one choice of it: tokens become text
    answers   answers as JSON
    stream    answers as server-sent events
    app       the routes
    guard     what holds for all of them: keys, names, errors
    server    a server that runs
    metrics   numbers for Prometheus
"""

from __future__ import annotations

from importlib.util import find_spec

from hmf_jax.serving.config import ServeConfig

_NEEDED = ("starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance")

if missing := [name for name in _NEEDED if find_spec(name) is None]:
    raise ImportError(f'serving needs {", ".join(missing)}: pip install "hmf-jax[serve]"')

from hmf_jax.serving.server import Running, running, serve  # noqa: E402

__all__ = ["Running", "ServeConfig", "running", "serve"]
