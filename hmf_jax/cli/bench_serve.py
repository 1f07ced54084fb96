"""`bench-serve`: load for a running server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hmf_jax.serving.load import Client, Report


def bench_serve(
    ctx: typer.Context,
    url: Annotated[str, typer.Argument(help="Address of the server, http://HOST:PORT.")],
    model: Annotated[
        str | None, typer.Option(help="Name of the model. Default: the first one served.")
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(help="Requests in all. Default: 100.", min=1)
    ] = None,
    input_len: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 1024,
    output_len: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 128,
    prefix_len: Annotated[
        int | None, typer.Option(help="So many first tokens are the same in all prompts.", min=0)
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option(help="Requests per second, at random times. Default: all now.")
    ] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Most requests at a time. Default: any number.", min=1)
    ] = None,
    users: Annotated[
        int | None, typer.Option(help="Chats of so many users instead of single prompts.", min=1)
    ] = None,
    turns: Annotated[
        int | None, typer.Option(help="With --users: messages that each sends. Default: 10.", min=1)
    ] = None,
    mixture: Annotated[
        bool, typer.Option("--mixture", help="Requests of all kinds instead of equal ones.")
    ] = False,
    faults: Annotated[
        float | None,
        typer.Option(help="With --mixture: fraction of clients that hang up early.", min=0, max=1),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Randomness. Default: 0.", min=0)
    ] = None,
    num_iter: Annotated[int | None, typer.Option(help="Solver iterations of GKA layers.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same requests.")] = 0,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME:MILLISECONDS, with ttft, tpot, itl, gap or e2el; counts the requests that "
            "keep all limits. May be repeated."
        ),
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="HMF_API_KEY", help="Key.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request has failed.")] = 600,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to this file, too.")
    ] = None,
) -> None:
    """Send requests to a running server and print latencies and tokens per second."""
    _check(ctx.params)
    limits = _limits(goodput or [])
    report = asyncio.run(_run(ctx.params))
    typer.echo(report.table(limits))
    numbers = report.numbers(limits)
    if json_file is not None:
        asked = {k: v for k, v in ctx.params.items() if k not in ("api_key", "json_file")}
        json_file.write_text(json.dumps({"asked": asked, **numbers}, indent=2) + "\n")
    if failed := numbers["failed"]:
        raise ValueError(f"{failed} of {numbers['requests']} requests failed")


def _check(asked: Mapping[str, Any]) -> None:
    """Raises ValueError for options that do not go together."""
    kind = "--mixture" if asked["mixture"] else "--users" if asked["users"] else "single prompts"
    needs = {
        "num_prompts": ("single prompts", "--mixture"),
        "prefix_len": ("single prompts",),
        "users": ("--users",),
        "turns": ("--users",),
        "faults": ("--mixture",),
        "temperature": ("single prompts", "--users"),
        "num_iter": ("single prompts", "--users"),
    }
    for name, kinds in needs.items():
        if asked[name] is not None and kind not in kinds:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is for {' and '.join(kinds)}, not for {kind}")
    file = asked["json_file"]
    if file is not None and not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent}: no such directory for --json")


async def _run(asked: Mapping[str, Any]) -> Report:
    from hmf_jax.serving.load import Client, Plan, run_load

    key, timeout = asked["api_key"], asked["timeout"]
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    client = Client(asked["url"], headers, timeout)
    try:
        calls = await _calls(client, asked)
    finally:
        await client.close()
    plan = Plan(
        calls,
        connections=asked["max_concurrency"],
        rate=asked["request_rate"],
        seed=asked["seed"],
        timeout=timeout,
        headers=headers,
        watch=True,
    )
    return await run_load(asked["url"], plan)


async def _calls(client: Client, asked: Mapping[str, Any]) -> list[list[Any]]:
    from hmf_jax.serving.load import workloads

    fields: dict[str, Any] = {"model": asked["model"] or await _first_model(client)}
    common = {"output_len": asked["output_len"], "seed": asked["seed"], "fields": fields}
    count, length = asked["num_prompts"] or 100, asked["input_len"]
    if asked["mixture"]:
        return workloads.mixture(count, longest=length, faults=asked["faults"] or 0.0, **common)
    fields["temperature"] = asked["temperature"] or 0.0
    if asked["num_iter"] is not None:
        fields["num_iter"] = asked["num_iter"]
    if asked["users"]:
        words = max(1, round(length / await workloads.tokens_per_word(client, fields)))
        return workloads.chats(asked["users"], asked["turns"] or 10, words=words, **common)
    return workloads.prompts(count, input_len=length, prefix_len=asked["prefix_len"] or 0, **common)


async def _first_model(client: Client) -> str:
    """Raises ValueError unless the server tells a model."""
    reply = await client.get("/v1/models")
    try:
        return json.loads(reply.body)["data"][0]["id"]
    except (ValueError, LookupError, TypeError):
        why = reply.failure or (reply.error or {}).get("message") or f"status {reply.status}"
        raise ValueError(f"/v1/models of the server names no model: {why}") from None


def _limits(goodput: list[str]) -> dict[str, float]:
    """Raises ValueError for what is no limit."""
    from hmf_jax.serving.load import LATENCIES

    limits = {}
    for item in goodput:
        name, _, value = item.partition(":")
        if name not in LATENCIES or not value.replace(".", "", 1).isdigit():
            names = ", ".join(LATENCIES)
            raise ValueError(f"--goodput {item} is not NAME:MILLISECONDS with a name of {names}")
        limits[name] = float(value)
    return limits
