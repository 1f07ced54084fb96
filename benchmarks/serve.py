"""A whole server, as its clients see it: `python -m benchmarks.serve --help`.

Writes a random checkpoint, starts `hmf-jax serve` on it, and measures over HTTP, one row per case:

    start        process to ready, with an empty and a full compilation cache
    idle         first token of a prompt, nothing else to do
    hit          first token where all but the end of the prompt was read before
    throughput   all slots decode, no prompts are read; beside it `bare`, the engine alone
    arrivals     the time between tokens while prompts are read all the time
    chat         users whose prompts grow turn by turn: how much of what was read before is found
    cancel       half of all streams are closed at once: until their slots are free
    memory       the peak beside the plan, and programs compiled after the server was ready

Random weights cost what others do. `--short 64 --long 512 --slots 4 --shape tiny` is for a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import PRESETS, Settings
from benchmarks.rows import Row, environment
from hmf_jax.serving.load import COMPLETIONS, Call, Client, Reply, metrics

Numbers = dict[str, Any]
FIRST = ("start", "idle", "hit", "throughput", "arrivals", "chat", "cancel", "memory")
SECOND = ("start", "hit", "host", "chat", "memory")  # fast mode, little memory, warm start


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    settings = Settings(args.shape, args.mixer, layers=args.layers)
    with tempfile.TemporaryDirectory() as temporary:
        path = args.directory or Path(temporary) / "model"
        if not (path / "config.json").is_file():
            _apart(write_model, settings, path)
        cache = args.cache or Path(temporary) / "cache"
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        runs = [("cold", args.first, args.options), ("warm", args.second, args.again)]
        for name, cases, options in runs:
            if cases:
                _run(name, cases, path, options.split(), env, settings, args)
        if args.bare:
            _apart(_bare, settings, args)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=PRESETS, default="8B")
    parser.add_argument("--mixer", default="GKA", help="what replaces attention in half the layers")
    parser.add_argument("--layers", type=int, help="keep this many layers")
    parser.add_argument("--directory", type=Path, help="of the checkpoint; written if missing")
    parser.add_argument("--cache", type=Path, help="compilation cache; default: an empty one")
    parser.add_argument("--options", default="", help="of the first server")
    parser.add_argument("--again", default="--prefix-cache fast", help="options of the second one")
    parser.add_argument("--first", nargs="*", default=FIRST, choices=[*FIRST, "host"])
    parser.add_argument("--second", nargs="*", default=SECOND, choices=[*FIRST, "host"])
    parser.add_argument("--no-bare", dest="bare", action="store_false")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--short", type=int, default=4096, help="tokens of usual prompts")
    parser.add_argument("--long", type=int, default=16384, help="tokens of a prompt that is shared")
    parser.add_argument("--rest", type=int, default=2047, help="most tokens that a hit leaves")
    parser.add_argument("--new", type=int, default=384, help="tokens of an answer")
    parser.add_argument("--seconds", type=float, default=15, help="of arrivals")
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--turn", type=int, default=1024, help="tokens that a turn adds")
    parser.add_argument("--out", type=Path, help="append rows to this file (JSON lines)")
    return parser.parse_args(argv)


def write_model(settings: Settings, directory: Path) -> None:
    """A random checkpoint with a tokenizer that has a word for every number."""
    import jax

    from benchmarks.full_size import write_checkpoint

    jax.config.update("jax_platforms", "cpu")  # the devices are for what is measured
    write_checkpoint(settings.config, directory, alike=True)
    write_tokenizer(settings.config.vocab_size, directory)


def write_tokenizer(size: int, directory: Path) -> None:
    """Of this vocabulary, the words being "w0", "w1", ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", chat_template=template)
    made.save_pretrained(str(directory))


@dataclasses.dataclass
class Server:
    """A server that runs. `lines` are what it has said, with seconds since its start."""

    process: subprocess.Popen[str]
    began: float
    lines: list[tuple[float, str]] = dataclasses.field(default_factory=list)

    def read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.perf_counter() - self.began, line.strip()))
            print(f"{self.lines[-1][0]:8.2f} s  {line.strip()}", file=sys.stderr, flush=True)

    def wait(self, pattern: str, timeout: float = 300.0) -> tuple[float, re.Match[str]]:
        """When it said something like this."""
        while time.perf_counter() - self.began < timeout:
            for at, line in list(self.lines):
                if match := re.search(pattern, line):
                    return at, match
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise SystemExit(f"the server did not say {pattern!r}")


@contextlib.contextmanager
def server(path: Path, options: Sequence[str], env: dict[str, str]) -> Iterator[Server]:
    """`hmf-jax serve` until the end of the block."""
    command = [sys.executable, "-m", "hmf_jax", "serve", str(path), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    started = Server(process, time.perf_counter())
    reader = threading.Thread(target=started.read)
    reader.start()
    try:
        yield started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        reader.join()


def _run(
    name: str,
    cases: Sequence[str],
    path: Path,
    options: Sequence[str],
    env: dict[str, str],
    settings: Settings,
    args: argparse.Namespace,
) -> None:
    """Starts a server, measures, and writes a row per case."""
    options = ["--slots", str(args.slots), *options]
    with server(path, options, env) as started:
        _, match = started.wait(r"listening at (\S+)")
        started.wait(r"\bready\b")
        asyncio.run(_measure(name, cases, match[1], started, options, settings, args))


async def _measure(
    name: str,
    cases: Sequence[str],
    url: str,
    started: Server,
    options: Sequence[str],
    settings: Settings,
    args: argparse.Namespace,
) -> None:
    bench = Bench(Client(url, timeout=120), started, settings, args)
    version = json.loads((await bench.client.get("/version")).body)
    for case in cases:
        began = time.perf_counter()
        numbers = await getattr(bench, case)()
        numbers |= {"server": name, "options": " ".join(options)}
        numbers["took_s"] = round(time.perf_counter() - began, 1)
        _write(settings, case, numbers, args, ", ".join(version["devices"]))
    await bench.client.close()


def _write(
    settings: Settings, case: str, numbers: Numbers, args: argparse.Namespace, device: str
) -> None:
    env = environment(device)
    row: Row = settings.row(f"serve_{case}", "fwd", numbers.pop("ms"), numbers, env)
    print(row.to_json(), flush=True)
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(row.to_json() + "\n")


class Bench:
    """The cases. Each returns its numbers, of which "ms" is the first."""

    def __init__(
        self, client: Client, started: Server, settings: Settings, args: argparse.Namespace
    ) -> None:
        self.client, self.started, self.args = client, started, args
        self.vocabulary = settings.config.vocab_size
        self.random = random.Random(0)

    def prompt(self, length: int) -> list[int]:
        return [self.random.randrange(self.vocabulary) for _ in range(length)]

    def call(self, prompt: Sequence[int], new: int = 1, fault: str | None = None) -> Call:
        body = {
            "prompt": list(prompt),
            "max_tokens": new,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        return Call(body, COMPLETIONS, fault=fault, expect=(200,))

    async def ask(self, prompt: Sequence[int], new: int = 1) -> Reply:
        reply = await self.client.send(self.call(prompt, new))
        if not reply.ok:
            raise SystemExit(f"the server answered {reply.status} {reply.error} {reply.failure}")
        return reply

    async def first_token(self, prompt: Sequence[int]) -> tuple[float, Reply]:
        """Milliseconds to the first token."""
        reply = await self.ask(prompt)
        return 1e3 * (reply.times[0] - reply.sent), reply

    async def start(self) -> Numbers:
        steps = {}
        for _, line in self.started.lines:
            if match := re.search(r"hmf-jax: (.*?),? in ([\d.]+) s", line):
                steps[re.sub(r"^(loaded|ready).*", r"\1", match[1])] = float(match[2])
        ready, _ = self.started.wait(r"\bready\b")
        ms, _ = await self.first_token(self.prompt(8))
        return {"ms": 1e3 * ready, "first_request_ms": ms, "steps_s": steps}

    async def idle(self) -> Numbers:
        times = [(await self.first_token(self.prompt(self.args.short)))[0] for _ in range(6)]
        return {"ms": statistics.median(times), "all": times, "tokens": self.args.short}

    async def hit(self) -> Numbers:
        """The end of the prompt is new: short, or as long as a chunk allows in exact mode."""
        shared, found = self.prompt(self.args.long), {}
        first, _ = await self.first_token([*shared, *self.prompt(50)])
        for name, more in (("short", 100), ("long", self.args.rest), ("equal", 0)):
            times, cached = [], []
            for _ in range(4):
                ms, reply = await self.first_token([*shared, *self.prompt(more)])
                times.append(ms)
                cached.append(reply.cached_tokens)
            found[name] = {"ms": statistics.median(times[1:]), "cached": cached}
        return {"ms": found["short"]["ms"], "without_ms": first, **found}

    async def host(self) -> Numbers:
        """Other prompts drive the shared one out of the device, into the memory of the host."""
        shared = self.prompt(self.args.long)
        await self.ask([*shared, *self.prompt(50)])
        name, before = "hmf:prefix_evictions_total", await metrics(self.client)
        for _ in range(40):
            await self.ask(self.prompt(self.args.long))
            now = await metrics(self.client)
            moved = now.get(name, 0.0) - before.get(name, 0.0)
            if moved >= 3:
                break
        ms, reply = await self.first_token([*shared, *self.prompt(100)])
        again, _ = await self.first_token([*shared, *self.prompt(100)])
        return {"ms": ms, "cached": reply.cached_tokens, "again_ms": again, "evicted": moved}

    async def throughput(self) -> Numbers:
        """Between the last first token and the first end, when all slots decode."""
        slots, prompt = self.args.slots, self.prompt(self.args.short)
        await self.ask(prompt)  # read once: all rows begin at once, with pages of their own
        asks = (self.ask(prompt, 2 * self.args.new) for _ in range(slots))
        replies = await asyncio.gather(*asks)
        begin, end = max(r.times[0] for r in replies), min(r.times[-1] for r in replies)
        inside = [
            count
            for r in replies
            for at, count in zip(r.times, r.counts, strict=True)
            if begin < at <= end
        ]
        rate = sum(inside) / (end - begin)
        return {
            "ms": 1e3 * slots / rate, "tokens_per_s": rate, "slots": slots,
            "window_s": end - begin, "prompt_tokens": self.args.short,
        }  # fmt: skip

    async def arrivals(self) -> Numbers:
        """Half of the slots stream while two prompts are always on their way."""
        streams = self.args.slots // 2
        long = [self.call(self.prompt(64), self._endless()) for _ in range(streams)]
        running = [asyncio.create_task(self.client.send(call)) for call in long]
        await asyncio.sleep(1.5)
        begin = time.perf_counter()
        until = begin + self.args.seconds

        async def arriving() -> int:
            tokens = 0
            while time.perf_counter() < until:
                reply = await self.ask(self.prompt(self.args.short), 1)
                tokens += reply.prompt_tokens if reply.times[0] < until else 0
            return tokens

        read = sum(await asyncio.gather(*(arriving() for _ in range(2))))
        await self.client.send(Call({"abort_all": True}, "/abort_request", expect=(200,)))
        replies = await asyncio.gather(*running)
        gaps, each = [], []
        for r in replies:
            events = list(zip(r.times, r.counts, strict=True))
            for (before, _), (at, count) in zip(events, events[1:], strict=False):
                if begin < before and at < until:
                    gaps.append(1e3 * (at - before))
                    each += [gaps[-1] / count] * count
        return {
            "ms": _percentile(each, 50), "itl_p99_ms": _percentile(each, 99),
            "gap_p50_ms": _percentile(gaps, 50), "gap_p99_ms": _percentile(gaps, 99),
            "prefill_tokens_per_s": read / self.args.seconds, "streams": streams,
            "decode_tokens_per_s": len(each) / self.args.seconds,
        }  # fmt: skip

    def _endless(self) -> int:
        return int(200 * self.args.seconds)

    async def chat(self) -> Numbers:
        """Every turn sends all that was said before, and some more."""
        firsts: list[float] = []

        async def user() -> tuple[int, int]:
            said: list[int] = []
            shared = found = 0
            for _ in range(self.args.turns):
                before = len(said)
                said += self.prompt(self.args.turn - 50)
                reply = await self.ask(said, 50)
                firsts.append(1e3 * (reply.times[0] - reply.sent))
                shared, found = shared + before, found + reply.cached_tokens
                said += reply.choices[0].token_ids
            return shared, found

        both = await asyncio.gather(*(user() for _ in range(self.args.users)))
        shared, found = (sum(x) for x in zip(*both, strict=True))
        return {
            "ms": _percentile(firsts, 50), "first_token_p99_ms": _percentile(firsts, 99),
            "shared_tokens": shared, "found_tokens": found, "hit_rate": found / max(shared, 1),
        }  # fmt: skip

    async def cancel(self) -> Numbers:
        slots, half = self.args.slots, self.args.slots // 2
        calls = [self.call(self.prompt(64), self._endless()) for _ in range(slots)]
        tasks = [asyncio.create_task(self.client.send(call)) for call in calls]
        await self._running(slots)
        begin = time.perf_counter()
        for task in tasks[:half]:
            task.cancel()
        await self._running(slots - half)
        freed = time.perf_counter() - begin
        for task in tasks[half:]:
            task.cancel()
        await self._running(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        return {"ms": 1e3 * freed, "streams": slots, "closed": half}

    async def _running(self, count: int) -> None:
        """Waits until so many requests run."""
        for _ in range(3000):
            now = await metrics(self.client)
            if now.get("vllm:num_requests_running") == count:
                return
            await asyncio.sleep(0.005)
        raise SystemExit(f"never {count} requests ran at a time")

    async def memory(self) -> Numbers:
        now = await metrics(self.client)
        info = (await self.client.get("/metrics")).body.decode()
        labels = re.search(r"vllm:cache_config_info\{(.*?)\}", info)
        plan = dict(re.findall(r'(\w+)="(.*?)"', labels[1])) if labels else {}
        peak = now.get("hmf:device_peak_bytes")
        return {
            "ms": 0.0,
            "peak_bytes": peak,
            "plan": plan,
            "compiled": now.get("hmf:compiles_total"),
        }


def _bare(settings: Settings, args: argparse.Namespace) -> None:
    """The engine alone, as `throughput` uses it."""
    import jax
    from flax import nnx

    from hmf_jax.engine import Request, enable_compilation_cache
    from hmf_jax.model import HybridLM
    from hmf_jax.serving.config import EngineConfig
    from hmf_jax.serving.engines import checked, make, plan

    enable_compilation_cache()
    config, rng = settings.config, random.Random(0)
    model = jax.jit(lambda: HybridLM(config, rngs=nnx.Rngs(0)))()
    config, options = checked(config, EngineConfig(slots=args.slots, prefix_cache="off"))
    engine = make(model, options, plan(config, options, model.dtype))
    prompt = [rng.randrange(config.vocab_size) for _ in range(args.short)]
    for _ in range(args.slots):
        engine.add(Request(prompt, max_new_tokens=2 * args.new))
    started: set[int] = set()
    tokens, begin = 0, 0.0
    while tokens < args.slots * args.new:
        new = {event.id: len(getattr(event, "tokens", ())) for event in engine.step(8)}
        if len(started) == args.slots:
            tokens += sum(new.values())
        else:
            started |= {id for id, count in new.items() if count}
            begin = time.perf_counter()
    seconds = time.perf_counter() - begin
    stats = jax.devices()[0].memory_stats() or {}
    numbers = {
        "ms": 1e3 * seconds * args.slots / tokens, "tokens_per_s": tokens / seconds,
        "slots": args.slots, "peak_bytes": stats.get("peak_bytes_in_use"),
    }  # fmt: skip
    _write(settings, "bare", numbers, args, jax.devices()[0].device_kind)


def _apart(function: Callable[..., None], *arguments: Any) -> None:
    """In a process of its own, whose devices and memory are gone afterwards."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed, see above")


def _percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else 0.0


if __name__ == "__main__":
    main()
