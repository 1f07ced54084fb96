"""How a server is set up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHUNKS = (4096, 2048, 1024, 512)  # tokens, to choose from by the time that they take


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """How a server is set up. Times are in seconds, sizes in bytes.

    Attributes:
      host, port: where it listens; port 0 takes a free one.
      model_names: what clients call the model, the first one being what answers say; (): the name
        of the directory that it was loaded from.
      aliases: more names, each with settings that hold for requests which do not say otherwise:
        {"fast": {"num_iter": 10}}.
      max_model_len: most tokens of a prompt and its answer together; None: as many as the model's
        max_position_embeddings says.
      slots: how many requests run at a time.
      prefill_chunk: prompts are read in pieces of this many tokens.
      prefix_cache: "exact" (a hit changes no bit of an answer), "fast" (hits anywhere; answers as
        close as those of a prompt that is read in other pieces) or "off".
      api_keys: what clients have to send one of; (): anybody may use the server.
      cors_origins: web sites whose pages may use the server.
      max_body: longest request body.
      max_queue: requests that may wait; None: four times the slots.
      max_queued_tokens: tokens of their prompts together; None: what is read in a minute, as
        measured so far.
      queue_timeout: longest wait for a slot.
      request_timeout: longest life of a request; None: as long as it takes.
      shutdown_timeout: how long running requests may go on after SIGTERM.
      trust_request_chat_template: requests may bring a chat template, which is a program.
      exclude_tools_when_none: with tool_choice "none" the model does not see the tools.
      ssl_keyfile, ssl_certfile: for https; both or none.
      seed: requests without a seed get random ones, which this decides; None: chance does.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_names: tuple[str, ...] = ()
    aliases: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    max_model_len: int | None = None
    slots: int = 8
    prefill_chunk: int = 2048
    prefix_cache: str = "exact"
    api_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)  # never in a log
    cors_origins: tuple[str, ...] = ()
    max_body: int = 32 << 20
    max_queue: int | None = None
    max_queued_tokens: int | None = None
    queue_timeout: float = 300.0
    request_timeout: float | None = None
    shutdown_timeout: float = 30.0
    trust_request_chat_template: bool = False
    exclude_tools_when_none: bool = False
    ssl_keyfile: Path | None = None
    ssl_certfile: Path | None = None
    seed: int | None = None

    @property
    def queue(self) -> int:
        """How many requests may wait."""
        return 4 * self.slots if self.max_queue is None else self.max_queue


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How the engines of a server are made; None leaves the choice to the device and its memory.

    Attributes:
      slots: requests that run at a time, in each engine.
      max_model_len: most tokens of a prompt and its answer together.
      prefill_chunk: prompts are read in pieces of this many tokens; None: 2048 on GPUs, else 512.
      max_stall: seconds: take the largest of `CHUNKS` that is read in this time.
      page_size: tokens of a page.
      memory_fraction: the part of the host's memory to use where there is no GPU, whose part JAX
        is told before it starts (XLA_PYTHON_CLIENT_MEM_FRACTION).
      prefix_cache: "exact", "fast" or "off", see `hmf_jax.engine.Engine`.
      snapshot_every: also keep prefixes of every so many tokens, a multiple of the chunk; 0: no.
      snapshot_spacing: fewest tokens between two snapshots of a prompt; None: as many as have keys
        and values of an eighth of a snapshot's bytes, at least 64.
      host_bytes: memory of the host for prefixes; None: a quarter of it, without a GPU none.
      tp: devices that share one model. dp: how many engines, with a copy of the model each.
      dtype: of the model: "bfloat16", "float32" or "auto", that of its files.
      num_iter: Chebyshev iterations of GKA layers in place of the config's.
      overrides: other values for keys of config.json.
    """

    slots: int | None = None
    max_model_len: int | None = None
    prefill_chunk: int | None = None
    max_stall: float | None = None
    page_size: int | None = None
    memory_fraction: float | None = None
    prefix_cache: str = "exact"
    snapshot_every: int = 0
    snapshot_spacing: int | None = None
    host_bytes: int | None = None
    tp: int = 1
    dp: int = 1
    dtype: str = "bfloat16"
    num_iter: int | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
