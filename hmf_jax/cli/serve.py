"""`serve`: an OpenAI-compatible server. Options have vLLM's names, too."""

from __future__ import annotations

import enum
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hmf_jax.cli.errors import progress, say
from hmf_jax.cli.options import Model, NumIter
from hmf_jax.options import check_number


class DType(enum.StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"
    float = "float"
    auto = "auto"


class Prefixes(enum.StrEnum):
    exact = "exact"
    fast = "fast"
    off = "off"


_WHERE, _SIZE, _QUEUE, _MODEL, _VLLM = (
    "Where it listens, and who may use it",
    "Memory and devices",
    "Limits",
    "Model",
    "Of vLLM's, for commands written for it: what they ask for is always so here",
)


Host = Annotated[
    str, typer.Option(help="Address to listen at; 0.0.0.0: all.", rich_help_panel=_WHERE)
]
Port = Annotated[
    int, typer.Option(help="0 takes a free one.", min=0, max=65535, rich_help_panel=_WHERE)
]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        help="Clients must send this key. May be repeated.",
        envvar="HMF_API_KEY",
        rich_help_panel=_WHERE,
    ),
]
CorsOrigin = Annotated[
    list[str] | None,
    typer.Option(
        help="A web site whose pages may use the server. May be repeated.",
        rich_help_panel=_WHERE,
    ),
]
SslKeyfile = Annotated[Path | None, typer.Option(help="For https.", rich_help_panel=_WHERE)]
SslCertfile = Annotated[Path | None, typer.Option(help="For https.", rich_help_panel=_WHERE)]
ServedModelName = Annotated[
    list[str] | None,
    typer.Option(
        help="What clients call the model; default: the name of its directory. May be repeated.",
        rich_help_panel=_MODEL,
    ),
]
Alias = Annotated[
    list[str] | None,
    typer.Option(
        help="Another name of the model with settings of its own, such as fast=num_iter:10. "
        "May be repeated.",
        rich_help_panel=_MODEL,
    ),
]
Dtype = Annotated[
    DType,
    typer.Option(
        help="Number format of weights and activations; auto: that of the files.",
        rich_help_panel=_MODEL,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a repository.", rich_help_panel=_MODEL),
]
HfOverrides = Annotated[
    str | None,
    typer.Option(help="JSON: other values for keys of config.json.", rich_help_panel=_MODEL),
]
TrustRequestChatTemplate = Annotated[
    bool,
    typer.Option(
        "--trust-request-chat-template",
        help="Requests may bring a chat template, which is a program.",
        rich_help_panel=_MODEL,
    ),
]
ExcludeToolsWhenNone = Annotated[
    bool,
    typer.Option(
        "--exclude-tools-when-none",
        "--exclude-tools-when-tool-choice-none",
        help='With tool_choice "none" the model does not see the tools.',
        rich_help_panel=_MODEL,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of a prompt and its answer. Default: what the model or the memory "
        "allows.",
        min=2,
        rich_help_panel=_SIZE,
    ),
]
Slots = Annotated[
    int | None,
    typer.Option(
        "--slots",
        "--max-num-seqs",
        help="Requests that run at a time. Default: 64 if the memory allows, 8 on CPUs.",
        min=1,
        max=4096,
        rich_help_panel=_SIZE,
    ),
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        "--prefill-chunk",
        "--max-num-batched-tokens",
        help="Prompts are read in pieces of this many tokens, and others wait meanwhile. "
        "Default: 2048, on CPUs 512.",
        min=64,
        rich_help_panel=_SIZE,
    ),
]
MaxStallMs = Annotated[
    int | None,
    typer.Option(
        help="Choose the largest of 4096, 2048, 1024 and 512 as --prefill-chunk that takes no "
        "longer than this.",
        min=1,
        rich_help_panel=_SIZE,
    ),
]
PageSize = Annotated[
    int | None,
    typer.Option(help="Tokens of a page of memory.", min=16, rich_help_panel=_SIZE),
]
GpuMemoryUtilization = Annotated[
    float | None,
    typer.Option(
        help="The part of the memory to use. Default: 0.9, of CPUs 0.5.",
        rich_help_panel=_SIZE,
    ),
]
PrefixCache = Annotated[
    Prefixes | None,
    typer.Option(
        help="What to keep of prompts for others that begin alike. exact: a hit changes no "
        "bit of an answer; fast: more hits, answers differ by rounding; off. Default: exact.",
        rich_help_panel=_SIZE,
    ),
]
PrefixHostGib = Annotated[
    float | None,
    typer.Option(
        help="Memory of the host for prefixes. Default: a quarter of it, without a GPU none.",
        min=0,
        rich_help_panel=_SIZE,
    ),
]
SnapshotEvery = Annotated[
    int,
    typer.Option(
        help="Keep every prefix of a multiple of this many tokens, itself one of "
        "--prefill-chunk. 0: only where prompts are known to part.",
        min=0,
        rich_help_panel=_SIZE,
    ),
]
SnapshotSpacing = Annotated[
    int | None,
    typer.Option(
        help="Fewest tokens between two snapshots of a prompt, and before the first. Default: as "
        "many as have keys and values of an eighth of a snapshot's bytes, at least 64.",
        min=1,
        rich_help_panel=_SIZE,
    ),
]
Tp = Annotated[
    int,
    typer.Option(
        "--tp",
        "--tensor-parallel-size",
        "-tp",
        help="Devices to split the model over.",
        min=1,
        rich_help_panel=_SIZE,
    ),
]
Dp = Annotated[
    int,
    typer.Option(
        "--dp",
        "--data-parallel-size",
        "-dp",
        help="Copies of the model, each on --tp devices.",
        min=1,
        rich_help_panel=_SIZE,
    ),
]
MaxQueue = Annotated[
    int | None,
    typer.Option(
        help="Requests that may wait; more get 429. Default: four times the slots.",
        min=0,
        rich_help_panel=_QUEUE,
    ),
]
MaxQueuedTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of their prompts together. Default: what is read in a minute.",
        min=1,
        rich_help_panel=_QUEUE,
    ),
]
QueueTimeout = Annotated[
    float, typer.Option(help="Longest wait, in seconds.", min=0, rich_help_panel=_QUEUE)
]
RequestTimeout = Annotated[
    float | None,
    typer.Option(help="Longest time of a request, in seconds.", min=0, rich_help_panel=_QUEUE),
]
ShutdownTimeout = Annotated[
    float,
    typer.Option(
        help="How long requests may go on after SIGTERM, in seconds.",
        min=0,
        rich_help_panel=_QUEUE,
    ),
]
MaxBody = Annotated[
    str, typer.Option(help="Longest request, such as 32MiB.", rich_help_panel=_QUEUE)
]
EnablePrefixCaching = Annotated[
    bool | None,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="--prefix-cache exact, or off.",
        rich_help_panel=_VLLM,
    ),
]
MambaCacheMode = Annotated[
    str | None, typer.Option(help="align, or none: no prefix cache.", rich_help_panel=_VLLM)
]
MambaCacheDtype = Annotated[
    str | None, typer.Option(help="float32 or auto.", rich_help_panel=_VLLM)
]
MambaSsmCacheDtype = Annotated[
    str | None, typer.Option(help="float32 or auto.", rich_help_panel=_VLLM)
]
ReasoningParser = Annotated[str | None, typer.Option(help="qwen3.", rich_help_panel=_VLLM)]
ToolCallParser = Annotated[str | None, typer.Option(help="hermes.", rich_help_panel=_VLLM)]
EnableAutoToolChoice = Annotated[
    bool,
    typer.Option(
        "--enable-auto-tool-choice",
        help="Answers may call the tools that requests bring.",
        rich_help_panel=_VLLM,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Requests without a seed get one each: from this on.",
        min=0,
        max=2**32 - 1,
        rich_help_panel=_VLLM,
    ),
]


def serve(
    model: Model,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    cors_origin: CorsOrigin = None,
    ssl_keyfile: SslKeyfile = None,
    ssl_certfile: SslCertfile = None,
    served_model_name: ServedModelName = None,
    alias: Alias = None,
    num_iter: NumIter = None,
    dtype: Dtype = DType.bfloat16,
    revision: Revision = None,
    hf_overrides: HfOverrides = None,
    trust_request_chat_template: TrustRequestChatTemplate = False,
    exclude_tools_when_none: ExcludeToolsWhenNone = False,
    max_model_len: MaxModelLen = None,
    slots: Slots = None,
    prefill_chunk: PrefillChunk = None,
    max_stall_ms: MaxStallMs = None,
    page_size: PageSize = None,
    gpu_memory_utilization: GpuMemoryUtilization = None,
    prefix_cache: PrefixCache = None,
    prefix_host_gib: PrefixHostGib = None,
    snapshot_every: SnapshotEvery = 0,
    snapshot_spacing: SnapshotSpacing = None,
    tp: Tp = 1,
    dp: Dp = 1,
    max_queue: MaxQueue = None,
    max_queued_tokens: MaxQueuedTokens = None,
    queue_timeout: QueueTimeout = 300.0,
    request_timeout: RequestTimeout = None,
    shutdown_timeout: ShutdownTimeout = 30.0,
    max_body: MaxBody = "32MiB",
    enable_prefix_caching: EnablePrefixCaching = None,
    mamba_cache_mode: MambaCacheMode = None,
    mamba_cache_dtype: MambaCacheDtype = None,
    mamba_ssm_cache_dtype: MambaSsmCacheDtype = None,
    reasoning_parser: ReasoningParser = None,
    tool_call_parser: ToolCallParser = None,
    enable_auto_tool_choice: EnableAutoToolChoice = False,
    seed: Seed = None,
) -> None:
    """Serve a model to OpenAI clients, and a page to chat at the same address.

    SIGTERM or Ctrl-C ends it once running requests have had their time; a second one at once.
    """
    cache = _prefixes(prefix_cache, enable_prefix_caching, mamba_cache_mode)
    _one_of("--mamba-cache-dtype", mamba_cache_dtype, "auto", "float32")
    _one_of("--mamba-ssm-cache-dtype", mamba_ssm_cache_dtype, "auto", "float32")
    _one_of("--reasoning-parser", reasoning_parser, "qwen3")
    _one_of("--tool-call-parser", tool_call_parser, "hermes")
    if (ssl_keyfile is None) != (ssl_certfile is None):
        raise ValueError("--ssl-keyfile and --ssl-certfile go together.")
    _set_memory_fraction(gpu_memory_utilization)
    began = time.perf_counter()
    try:
        from hmf_jax.serving import EngineConfig, ServeConfig
        from hmf_jax.serving import serve as run
    except ImportError as e:
        if e.name is not None:
            raise
        raise ValueError(str(e)) from None
    engine = EngineConfig(
        slots=slots, max_model_len=max_model_len, prefill_chunk=prefill_chunk,
        max_stall=None if max_stall_ms is None else max_stall_ms / 1000, page_size=page_size,
        memory_fraction=gpu_memory_utilization, prefix_cache=cache, snapshot_every=snapshot_every,
        snapshot_spacing=snapshot_spacing, tp=tp, dp=dp, num_iter=num_iter,
        host_bytes=None if prefix_host_gib is None else int(prefix_host_gib * 2**30),
        dtype="float32" if dtype is DType.float else dtype.value,
        overrides=_overrides(hf_overrides),
    )  # fmt: skip
    config = ServeConfig(
        host=host, port=port, model_names=tuple(served_model_name or ()),
        aliases=_aliases(alias or ()), api_keys=tuple(api_key or ()),
        cors_origins=tuple(cors_origin or ()), max_body=_bytes("--max-body", max_body),
        max_queue=max_queue, max_queued_tokens=max_queued_tokens, queue_timeout=queue_timeout,
        request_timeout=request_timeout, shutdown_timeout=shutdown_timeout,
        trust_request_chat_template=trust_request_chat_template, ssl_keyfile=ssl_keyfile,
        exclude_tools_when_none=exclude_tools_when_none, ssl_certfile=ssl_certfile, seed=seed,
    )  # fmt: skip
    run(model, config, engine, revision=revision, report=say, progress=progress(), began=began)


def _one_of(option: str, value: str | None, *fine: str) -> None:
    if value is not None and value not in fine:
        raise ValueError(f"{option} {value} is not supported; {' or '.join(fine)} is.")


def _prefixes(asked: Prefixes | None, enabled: bool | None, mode: str | None) -> str:
    """What three options say about the prefix cache."""
    _one_of("--mamba-cache-mode", mode, "align", "none")
    said = {
        "--prefix-cache": None if asked is None else asked is not Prefixes.off,
        "--enable-prefix-caching": enabled,
        "--mamba-cache-mode": None if mode is None else mode == "align",
    }
    said = {name: on for name, on in said.items() if on is not None}
    if len(set(said.values())) > 1:
        raise ValueError(f"{' and '.join(said)} contradict each other.")
    if asked is not None:
        return asked.value
    return "off" if False in said.values() else "exact"


def _aliases(given: Sequence[str]) -> dict[str, dict[str, int]]:
    """fast=num_iter:10 -> {"fast": {"num_iter": 10}}."""
    aliases: dict[str, dict[str, int]] = {}
    for text in given:
        name, _, settings = text.partition("=")
        key, _, value = settings.partition(":")
        if not name or not value.isdecimal() or name in aliases:
            raise ValueError(f"--alias {text}: write NAME=num_iter:N, each NAME once.")
        if key != "num_iter":
            raise ValueError(f"--alias {text}: {key} is not a setting of aliases; num_iter is.")
        aliases[name] = {key: int(value)}
    return aliases


def _overrides(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        overrides = json.loads(text)
    except ValueError as e:
        raise ValueError(f"--hf-overrides is no JSON: {e}") from None
    if not isinstance(overrides, dict):
        raise ValueError(f"--hf-overrides must be a JSON object, not {text}")
    return overrides


def _bytes(name: str, text: str) -> int:
    from hmf_jax.convert.safetensors_io import parse_size

    try:
        return parse_size(text)
    except ValueError:
        raise ValueError(f"{name} {text} is not a size; write e.g. 32MiB.") from None


def _set_memory_fraction(fraction: float | None) -> None:
    """Tells JAX before it starts; what its environment variable says is kept otherwise."""
    if fraction is not None:
        check_number("--gpu-memory-utilization", fraction, 0, 1, above=True)
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(fraction)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
