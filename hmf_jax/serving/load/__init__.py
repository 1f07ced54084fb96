"""Load for an OpenAI-compatible server: what is sent, how it is measured, what must hold.

    plan = Plan(workloads.prompts(200, input_len=1024, output_len=128), rate=4.0)
    report = await run_load("http://127.0.0.1:8000", plan)
    print(report.table(), report.problems)

Needs nothing but the standard library. `hmf-jax bench-serve` is this as a command.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Sequence

from hmf_jax.serving.load.call import CHAT, COMPLETIONS, FAULTS, Call, Plan
from hmf_jax.serving.load.client import Client
from hmf_jax.serving.load.reply import Choice, Reply
from hmf_jax.serving.load.report import LATENCIES, Report, latencies, percentiles

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "FAULTS",
    "LATENCIES",
    "Call",
    "Choice",
    "Client",
    "Plan",
    "Reply",
    "Report",
    "latencies",
    "metrics",
    "percentiles",
    "run_load",
]

_WATCH = 0.1  # seconds between two looks at /health


async def run_load(url: str, plan: Plan) -> Report:
    """Makes all calls of a plan.

    Args:
      url: of the server, http://HOST:PORT; "/v1" at its end does not matter.

    Raises:
      ValueError: for another url.
    """
    client = Client(url, plan.headers, plan.timeout)
    rng = random.Random(plan.seed)
    gaps = [rng.expovariate(plan.rate) if plan.rate else 0.0 for _ in plan.users]
    starts = itertools.accumulate(gaps)
    room = asyncio.Semaphore(plan.connections or max(len(plan.users), 1))
    began = time.perf_counter()

    async def user(calls: Sequence[Call], start: float) -> list[Reply]:
        await asyncio.sleep(max(0.0, began + start - time.perf_counter()))
        async with room:
            replies: list[Reply] = []
            for call in calls:
                replies.append(await _patiently(client, call, replies, plan.retries, rng))
                if callable(call.body) and not replies[-1].ok:
                    break
            return replies

    health: list[Reply] = []
    watch = asyncio.create_task(_watch(client, health)) if plan.watch else None
    try:
        replies = await asyncio.gather(*map(user, plan.users, starts))
        duration = time.perf_counter() - began
    finally:
        if watch is not None:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
        await client.close()
    return Report(replies, duration, health)


async def _patiently(
    client: Client, call: Call, earlier: Sequence[Reply], retries: int, rng: random.Random
) -> Reply:
    """A call that is made again while the server has no room."""
    refused = 0
    while True:
        reply = await client.send(call, earlier)
        reply.refused = refused
        full = reply.status in (429, 503) and reply.status not in call.expect
        if not full or reply.problems or refused == retries:
            return reply
        refused += 1
        seconds = reply.headers["retry-after"]
        wait = min(int(seconds), 1) if seconds.isdigit() else 1
        await asyncio.sleep(wait * rng.uniform(0.5, 1.0))


async def _watch(client: Client, health: list[Reply]) -> None:
    while True:
        health.append(await client.get("/health"))
        await asyncio.sleep(_WATCH)


async def metrics(client: Client) -> dict[str, float]:
    """The values of /metrics, those of one name with different labels added up.

    Raises ValueError if the server does not answer.
    """
    reply = await client.get("/metrics")
    if reply.status != 200:
        raise ValueError(f"/metrics: {reply.failure or reply.status}")
    values: dict[str, float] = {}
    for line in reply.body.decode().splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            values[name] = values.get(name, 0.0) + float(value)
    return values
