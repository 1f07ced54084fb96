"""A server under load: everything of `tests.serving.laws` holds, whatever clients do."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
from pathlib import Path

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
    """Runs a mixture of requests, malformed ones among them, and looks at all that must hold; what
    is returned is about the mixture."""
    name = live.server.service.model.names[0]
    users = workloads.mixture(count, seed=seed, fields={"model": name}, **mixture)
    users = [[laws.comparable(call)] for (call,) in users]
    users += [[call] for call in malformed(wrong, SCHEMAS, model=name, seed=seed)]
    users += [[call] for call in unusual(wrong // 5, model=name, seed=seed)]
    random.Random(seed).shuffle(users)
    plan = Plan(users, connections=connections, retries=600, timeout=300, watch=True)
    before = live.metrics()
    report = asyncio.run(run_load(live.url, plan))
    assert report.problems == []
    live.rests()
    after = live.metrics()
    if live.warm:
        assert after["hmf:compiles_total"] == before["hmf:compiles_total"]
    assert after.get("hmf:nonfinite_total", 0) == 0
    sent = [reply for reply in report.all if isinstance(reply.call.about, int)]
    assert len(sent) == count and all(reply.ok or reply.left for reply in sent)
    wrong_ones = [reply for reply in report.all if reply.call.expect]
    assert all(reply.status in reply.call.expect for reply in wrong_ones)
    # All of them at once, and their clients in the same process: that takes more than the 100 ms of
    # `test_many_requests_at_once_keep_nobody_waiting`.
    assert statistics.median(reply.ended - reply.sent for reply in wrong_ones) < 0.5
    looks = sorted(reply.ended - reply.sent for reply in report.health)
    assert looks[len(looks) * 9 // 10] < 0.1
    odd = [reply for reply in report.all if str(reply.call.about).startswith("unusual")]
    assert {reply.status for reply in odd} == {200}
    assert laws.differences(live.model, live.tokenizer, sent, **live.same) == []
    return Report([sent], report.duration, report.health)


@pytest.fixture(scope="module")
def live():
    with Live.random("M2", "*", slots=4, capacity=256) as live:
        yield live


def test_a_little_of_everything(live):
    report = loaded(live, 60, 20, 16, seed=1, longest=150, output_len=24, faults=0.3)
    numbers = report.numbers()
    assert numbers["closed_by_client"] >= 10 and numbers["completed"] >= 40


ALL = ("GKA", "*", "GDN", "*", "M2", "BMF", "SWA")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "prefixes", "entries"),
    [("gka", "exact", 64), ("bmojo-f", "exact", 3), ("all", "exact", 3), ("all", "off", 3)],
)
def test_all_of_it(model, prefixes, entries):
    """2,000 requests over 256 connections, 30% of them cancelled, and 1,000 malformed ones."""
    scale = float(os.environ.get("LOAD_SCALE", "1"))
    common = dict(slots=8, capacity=1024, prefixes=prefixes, entries=entries, warm=True)
    made = Live.random(*ALL, chunk=128, **common) if model == "all" else None
    with made or Live.embedded(model, chunk=128, **common) as live:
        iterations = (0, 1, 30) if model != "bmojo-f" else ()
        report = loaded(
            live, round(2000 * scale), round(1000 * scale), 256,
            seed=2, longest=900, output_len=64, num_iters=iterations, faults=0.3,
        )  # fmt: skip
        stats = live.engine.stats()
    print(f"\n{model}, {prefixes}, {entries} entries\n{report.table()}\n{stats}")
    numbers = report.numbers()
    assert numbers["failed"] == 0 and numbers["refused"] > 0
    assert numbers["cached_tokens"] > 0 or prefixes == "off"
    if directory := os.environ.get("LOAD_RESULTS"):
        file = Path(directory) / f"serve_load_cpu_{model}_{prefixes}.json"
        file.write_text(json.dumps(numbers, indent=2) + "\n")
