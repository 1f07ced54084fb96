"""A server under load: everything of `tests.serving.laws` holds, whatever clients do."""

from __future__ import annotations

import asyncio
import random

import pytest

from hmf_jax.serving import protocol
from hmf_jax.serving.load import CHAT, COMPLETIONS, Plan, Report, run_load, workloads
from hmf_jax.serving.load.malformed import malformed, unusual
from tests.serving import laws
from tests.serving.live import Live

SCHEMAS = {
    CHAT: protocol.Chat.model_json_schema(),
    COMPLETIONS: protocol.Completion.model_json_schema(),
}


def loaded(live: Live, count: int, wrong: int, connections: int, *, seed: int, **mixture) -> Report:
    """Runs a mixture of requests, malformed ones among them, and looks at all that must hold."""
    name = live.server.service.model.names[0]
    before = live.metrics()
    fields = {"model": name, "return_token_ids": True}
    users = workloads.mixture(count, seed=seed, fields=fields, **mixture)
    users = [[laws.comparable(call)] for (call,) in users]
    users += [[call] for call in malformed(wrong, SCHEMAS, model=name, seed=seed)]
    users += [[call] for call in unusual(wrong // 5, model=name, seed=seed)]
    random.Random(seed).shuffle(users)
    plan = Plan(users, connections=connections, retries=60, timeout=60, watch=True)
    report = asyncio.run(run_load(live.url, plan))
    assert report.problems == []
    live.rests()
    sent = [reply for reply in report.all if reply.call.fault or not reply.call.expect]
    assert len(sent) == count
    assert laws.differences(live.model, live.tokenizer, sent, **live.engine) == []
    after = live.metrics()
    for counter in ("hmf:compiles_total", "hmf:nonfinite_total"):
        assert after.get(counter, 0) == before.get(counter, 0), counter
    return report


@pytest.fixture(scope="module")
def live():
    with Live.random("GKA", "*", slots=4, capacity=256) as live:
        yield live


def test_a_little_of_everything(live):
    report = loaded(
        live, 60, 20, 16, seed=1, longest=150, output_len=24, num_iters=(0, 1, 30), faults=0.3
    )
    numbers = report.numbers()
    assert numbers["closed_by_client"] >= 10 and numbers["completed"] >= 40
