"""A server under load to which something happens: who is not concerned notices nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from hmf_jax.embedded import directory
from hmf_jax.serving.load import CHAT, Call, Plan, Report, run_load, workloads
from tests.serving import laws
from tests.serving.live import Live

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared():
    with Live.random("M2", "*", slots=4, capacity=256) as live:
        yield live


@pytest.fixture
def live(shared):
    """The server, whose engine's failures of earlier tests are forgotten."""
    yield shared
    shared.rests()
    report = load(shared, seed=99)
    assert failed(report) == 0


def load(live: Live, seed: int, count: int = 40) -> Report:
    """A load of which every request ends, and nothing of what is answered is wrong."""
    users = workloads.mixture(count, longest=150, output_len=24, seed=seed, fields={"model": "m"})
    users = [[laws.comparable(call)] for (call,) in users]
    plan = Plan(users, connections=12, retries=600, timeout=120, watch=True)
    report = asyncio.run(run_load(live.url, plan))
    ended = [reply for reply in report.all if reply.ok or reply.error]
    assert len(ended) == count
    assert [text for text in report.problems if "status 500" not in text] == []
    assert laws.differences(live.model, live.tokenizer, report.all, **live.same) == []
    return report


def failed(report: Report) -> int:
    """How many ended with an error; every one says so in the shape of an error."""
    return sum(reply.error is not None for reply in report.all)


def nth(monkeypatch, what, name: str, n: int, do) -> None:
    """The n-th call from now on of a method is `do(method, *args)`."""
    method, calls = getattr(what, name), iter(range(1, 10**9))

    def called(*args, **kwargs):
        if next(calls) == n:
            return do(method, *args, **kwargs)
        return method(*args, **kwargs)

    monkeypatch.setattr(what, name, called)


def test_a_program_raises_before_anything_is_done(live, monkeypatch):
    def fail(enqueue, *args):
        raise RuntimeError("no memory")

    nth(monkeypatch, live.engine._device, "enqueue", 12, fail)
    assert 1 <= failed(load(live, 1)) < 40


def test_a_program_raises_after_its_arguments_are_gone(live, monkeypatch):
    def fail(collect, ticket):
        collect(ticket)
        for array in jax.tree.leaves(live.engine._device._all.rows):
            array.delete()
        raise RuntimeError("the device was lost")

    nth(monkeypatch, live.engine._device, "collect", 12, fail)
    assert 1 <= failed(load(live, 2)) < 40


def test_a_row_that_is_not_finite(live, monkeypatch):
    """Its request fails; whoever has the slot and its pages afterwards is not hurt."""
    found, engine = [], live.engine
    enqueue = engine._device.enqueue

    def long(id: int) -> bool:
        """Whether its row runs for sure, whatever the turns bring that are under way."""
        new = engine._new.get(id)
        return bool(new) and engine._requests[id].max_new_tokens - len(new) > 8

    def poison(turn, asked):
        slots = [slot for slot, id in enumerate(engine._device._ids) if long(id)]
        if found or not slots or not turn.steps:
            return enqueue(turn, asked)
        storage, slot = engine._device._all, slots[0]
        found.append(slot)

        def broken(x: jax.Array) -> jax.Array:
            if not jnp.issubdtype(x.dtype, jnp.floating) or len(x) != 4:
                return x
            return x.at[slot].set(jnp.nan)

        layers = jax.tree.map(broken, storage.rows.state.layers)
        state = dataclasses.replace(storage.rows.state, layers=layers)
        storage.rows = dataclasses.replace(storage.rows, state=state)
        return enqueue(turn, asked)

    monkeypatch.setattr(engine._device, "enqueue", poison)
    assert failed(load(live, 3)) == 1 and len(found) == 1


def test_a_tokenizer_that_raises_and_a_clock_that_jumps(live, monkeypatch):
    served = live.server.service.model
    real = time.time

    def fail(encode, *args, **kwargs):
        raise RuntimeError("no such word")

    nth(monkeypatch, type(served.tokenizer), "encode", 5, fail)
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * (-1) ** (int(real() * 10) % 2))
    assert failed(load(live, 4)) == 1


@pytest.fixture
def process(tmp_path):
    """Starts servers of the embedded model: (process, url, seconds until it was ready)."""
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "hmf_jax", "serve", str(directory("gka")), "--port", "0"]
    command += ["--slots", "4", "--max-model-len", "512", "--prefill-chunk", "128"]
    running = []

    def start():
        began = time.monotonic()
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        running.append(process)
        url = ""
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"listening at (\S+)", line):
                url = found[1]
            if "ready: " in line:
                break
        return process, url, time.monotonic() - began

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stderr.close()


def streams(url: str, count: int, tokens: int, then=lambda: None) -> Report:
    """Streams of so many tokens; half a second later `then` is called."""
    message = {"role": "user", "content": "Remo has 20. Remo?"}
    body = {"messages": [message], "max_tokens": tokens, "ignore_eos": True, "stream": True}

    async def run() -> Report:
        plan = Plan([[Call({**body, "seed": seed}, CHAT)] for seed in range(count)], timeout=120)
        loading = asyncio.create_task(run_load(url, plan))
        await asyncio.sleep(0.5)
        then()
        return await loading

    return asyncio.run(run())


def test_sigterm_under_load(process):
    server, url, _ = process()
    report = streams(url, 12, 200, lambda: server.send_signal(signal.SIGTERM))
    assert report.problems == []
    assert all(reply.ok or reply.error for reply in report.all)
    assert sum(reply.ok for reply in report.all) >= 4  # those that ran
    assert server.wait(60) == 0


def test_a_second_sigterm_ends_it_at_once(process):
    server, url, _ = process()

    def twice() -> None:
        for _ in range(2):
            server.send_signal(signal.SIGTERM)
            time.sleep(0.3)

    streams(url, 4, 400, twice)
    assert server.wait(5) == 128 + signal.SIGTERM


def test_kill_and_start_again(process, capsys):
    """What it had is gone, and with the programs of the first time it is back sooner."""
    server, url, cold = process()
    before = streams(url, 4, 30)
    report = streams(url, 4, 400, server.kill)
    assert any(reply.failure for reply in report.all)
    assert server.wait(5) == -signal.SIGKILL
    _, url, warm = process()
    after = streams(url, 4, 30)
    told = [[choice.text for r in x.all for choice in r.choices.values()] for x in (before, after)]
    assert told[0] == told[1] and before.problems == after.problems == []
    with capsys.disabled():
        print(f"\nready after {cold:.1f} s, with compiled programs after {warm:.1f} s")
    assert warm < cold
