"""What pages cost, beside buffers: the operator, a decode step, sampling, a prompt in chunks.

    python -m benchmarks.paged --shape 8b --mixer GKA --out FILE

Shapes of the operator are (rows x tokens); the rows of a whole model are `--slots` of `--length`
tokens. Rows as in `benchmarks.rows`; `case` names the size of a page, or "buffers".
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models import random_state
from benchmarks.rows import Row, environment
from benchmarks.timing import milliseconds
from hmf_jax import HybridConfig, HybridLM
from hmf_jax.engine import programs
from hmf_jax.engine.device import compilations
from hmf_jax.engine.rows import RUNNING, STOPPED, Rows
from hmf_jax.engine.settings import Settings, stack_settings
from hmf_jax.engine.storage import Call, Storage
from hmf_jax.packed import PackedModel
from hmf_jax.pallas_kernels import PageTable, decode_attention, paged_decode_attention
from hmf_jax.sampling import SamplingParams

STEPS = 32  # tokens per row and dispatch
HEADS, KV_HEADS, DIM = 32, 8, 128
PENALTIES: dict[str, Any] = dict(repetition_penalty=1.1, presence_penalty=0.1, logit_bias={1: 1.0})
Emit = Callable[..., None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="8b", help="a preset")
    parser.add_argument("--mixer", default="GKA")
    parser.add_argument("--parts", default="operator,decode,sampling,prefill")
    parser.add_argument("--pages", default="512,1024,2048", help="tokens of a page")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--prompt", type=int, default=16384)
    parser.add_argument("--chunks", default="2048,1024,512")
    parser.add_argument("--scale", type=int, default=1, help="divides the operator's lengths")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    env = environment()

    def emit(
        op: str, case: str, batch: int, length: int, ms: float, error: Any = None, **extra: Any
    ) -> None:
        shape = dict(batch=batch, length=length, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM)
        pass_ = "fwd" if op == "prefill" else "decode"
        row = Row(op, "auto", args.dtype, shape, None, pass_, ms, error, case, extra, **env)
        with args.out.open("a") as file:
            file.write(row.to_json() + "\n")
        print(f"{row.describe():<96} {ms:9.4f} ms  error {error}  {extra}", flush=True)

    sizes, parts = [int(size) for size in args.pages.split(",")], args.parts.split(",")
    if "operator" in parts:
        operator(sizes, args.scale, args.dtype, emit)
    if set(parts) - {"operator"}:
        Models(args, sizes, emit).run(parts)


_BUFFERS, _PAGES = jax.jit(decode_attention), jax.jit(paged_decode_attention)
_TABLE = jax.jit(PageTable.of, static_argnums=(1, 2))


def operator(sizes: Sequence[int], scale: int, dtype: str, emit: Emit) -> None:
    """One attention layer: rows of one length, of all lengths, and one row beside idle pages."""
    rng, K = np.random.default_rng(0), 1024 // scale
    cases = {
        "64x16K": ([16 * K] * 64, 0),
        "12x128K": ([128 * K] * 12, 0),
        "64 of 1K..16K": (rng.integers(K, 16 * K, 64).tolist(), 0),
        "16K alone": ([16 * K], 1024 * K),
        "32K alone": ([32 * K], 1024 * K),
    }
    for name, (lengths, idle) in cases.items():
        B, longest = len(lengths), max(lengths)
        capacity = -(-longest // (2 * K)) * 2 * K
        keys = jax.random.split(jax.random.key(0), 3)
        q = jax.random.normal(keys[0], (B, HEADS, DIM), dtype)
        k, v = (jax.random.normal(key, (B, capacity, KV_HEADS, DIM), dtype) for key in keys[1:])
        counts = jnp.array(lengths, jnp.int32)
        row = functools.partial(emit, "paged_decode_attention", batch=B, length=longest)
        size = 4 * sum(lengths) * KV_HEADS * DIM
        ms = milliseconds(lambda x: _BUFFERS(*x), [(q, k, v, counts)])
        row(case=f"{name} buffers", ms=ms, gb_per_s=size / ms / 1e6)
        exact = _BUFFERS(q, k, v, counts)
        for page in (size // scale for size in sizes):
            each = capacity // page
            P = B * each + idle // page
            order = rng.permutation(P)[: B * each].reshape(B, each).astype(np.int32)
            used = np.where(page * np.arange(each) < np.array(lengths)[:, None], order, P)
            pools = _pool(k, order, P, page), _pool(v, order, P, page)
            args = q, *pools, _TABLE(used, P, page), counts
            ms = milliseconds(lambda x: _PAGES(*x), [args])
            error = difference(_PAGES(*args), exact)
            row(case=f"{name} pages of {page}", ms=ms, error=error, gb_per_s=size / ms / 1e6)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _pool(x: jax.Array, order: Any, P: int, page: int) -> jax.Array:
    """The entries of buffers x [B, S, K, D] in pages."""
    pages = x.reshape(-1, page, *x.shape[2:])
    return jnp.zeros((P, *pages.shape[1:]), x.dtype).at[order.reshape(-1)].set(pages)


def difference(found: jax.Array, exact: jax.Array) -> float:
    """||a - b|| / ||b||."""
    found, exact = found.astype(jnp.float32), exact.astype(jnp.float32)
    return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))


def placed(tree: Any) -> Any:
    """Arrays said to belong where they are, as those of a `Storage` are."""
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding, tree))


def at(rows: Rows, length: int, running: int) -> Rows:
    """The same rows, each with so many tokens; the first ones run."""
    B = len(rows.reason)

    def new(values: Any) -> jax.Array:
        x = jnp.asarray(values, jnp.int32)
        return placed(x) if rows.token.committed else x

    held = np.full(B, length)
    state = dataclasses.replace(rows.state, length=new(held), position=new(held))
    reason = np.where(np.arange(B) < running, RUNNING, STOPPED)
    left = new(np.full(B, 2 * STEPS))
    return dataclasses.replace(rows, state=state, reason=new(reason), left=left)


class Models:
    """Programs of a whole model; all are compiled first, several at a time."""

    def __init__(self, args: argparse.Namespace, sizes: Sequence[int], emit: Emit) -> None:
        self.args, self.sizes, self.emit = args, sizes, emit
        self.config = HybridConfig.preset(args.shape, mixer=args.mixer)
        self.model = HybridLM.init(self.config, dtype=args.dtype)
        self.packed = PackedModel.of(self.model)
        self.threads = ThreadPoolExecutor()
        self.pending: list[Any] = []
        words = -(-self.config.vocab_size // 32)
        self.mask = np.full((args.slots, words), 0x55555555, np.uint32)  # even tokens
        self.top = min(20, self.config.vocab_size)

    def run(self, parts: Sequence[str]) -> None:
        known = {"sampling": self.sampling, "decode": self.decode, "prefill": self.prefill}
        start, compiled = time.perf_counter(), compilations()
        plans = [plan() for name, plan in known.items() if name in parts]
        for plan in plans:  # what comes before the `yield` compiles
            next(plan)
        traced = time.perf_counter() - start
        for waiting in self.pending:
            waiting.result()
        took = time.perf_counter() - start
        print(f"compiled {len(compiled)}: traced in {traced:.1f} s, all in {took:.1f}", flush=True)
        compiled.clear()
        for plan in plans:
            next(plan)
        print(f"compiled since: {len(compiled)}, {sum(compiled):.1f} s", flush=True)

    def compile(self, call: Call) -> None:
        self.pending.append(self.threads.submit(call.compile()))

    def storage(self, capacity: int, page: int, slots: int = 0) -> Any:
        slots = slots or self.args.slots
        return Storage(
            self.model, slots=slots, capacity=capacity, pages=slots * -(-capacity // page),
            page_size=page, prefill_chunk=2048, processor=None, solver="chebyshev",
        )  # fmt: skip

    def settings(self, fixed: bool, top: int = 0, **sampling: Any) -> Settings:
        slots, gka = self.args.slots, self.config.gka
        params = [SamplingParams(**sampling)] * slots
        most = [top] * slots if fixed else None
        found = stack_settings(None, params, [[]] * slots, [None] * slots, [0] * slots, most)
        if gka is not None:
            found = dataclasses.replace(found, num_iter=np.full(slots, gka.num_iter, np.int32))
        return placed(jax.tree.map(jnp.asarray, found))

    def decode(self) -> Iterator[None]:
        """One step of `slots` rows with `length` tokens; with an eighth of them running, too."""
        slots, length, last = self.args.slots, self.args.length, self.sizes[-1]
        capacity, none = length + 2 * STEPS, np.zeros(slots, bool)
        plain, fixed = self.settings(False), self.settings(True)
        stores: dict[int, Any] = {}

        def pages(page: int, settings: Settings, top: int = 0, allowed: Any = None) -> Call:
            order = np.random.default_rng(0).permutation(stores[page].nowhere)
            table = order.reshape(slots, -1).astype(np.int32)
            return stores[page].decode(none, STEPS, settings, top, table, none, allowed)

        box: Any = argparse.Namespace()

        def buffers() -> Call:
            args = self.packed, box.rows, none, np.int32(STEPS), plain
            return Call(programs.decode.on(None), args, {})

        def empty(store: Any) -> None:
            """Until it is needed: there is no room for all of them."""
            store.rows = dataclasses.replace(store.rows, state=None)

        for page in self.sizes:
            stores[page] = self.storage(capacity, page)
            self.compile(pages(page, plain))
            if page == last:
                stores[page].count(True)
                for allowed in (None, self.mask):
                    self.compile(pages(page, fixed, self.top, allowed))
                stores[page].count(False)
            empty(stores[page])
        box.rows = placed(programs.empty.on(None)(self.packed, slots, capacity)[0])
        self.compile(buffers())
        empty(box)
        yield

        def tell(case: str, store: Any, make: Callable[[], Call], running: int = slots) -> None:
            def again(_: Any) -> Any:
                store.rows = at(store.rows, length, running)
                store.rows, *found = make()()
                return found

            ms = milliseconds(again, [None], queue=False) / STEPS
            self.emit("decode", case, running, length, ms)

        for page, store in stores.items():
            state = placed(random_state(self.model, slots, capacity, store.pool))
            store.rows = dataclasses.replace(store.rows, state=state)
            del state
            for running in (slots, slots // 8):
                tell(f"pages of {page}", store, lambda p=page: pages(p, plain), running)
            if page == last:
                store.count(True)
                asked = {
                    "nothing asked": fixed,
                    "penalties and biases": self.settings(True, **PENALTIES),
                    "20 most likely": self.settings(True, self.top),
                    "temperature 1": self.settings(True, temperature=1.0),
                    "temperature 1, top_p 0.9": self.settings(True, temperature=1.0, top_p=0.9),
                }
                for name, settings in asked.items():
                    case = f"pages of {page}, fixed, {name}"
                    tell(case, store, lambda s=settings: pages(last, s, self.top))
                case = f"pages of {page}, fixed, a mask"
                tell(case, store, lambda: pages(last, fixed, self.top, self.mask))
            empty(store)
        state = placed(random_state(self.model, slots, capacity))
        box.rows = dataclasses.replace(box.rows, state=state)
        del state
        for running in (slots, slots // 8):
            tell("buffers", box, buffers, running)
        empty(box)
        yield

    def sampling(self) -> Iterator[None]:
        """The choice alone, of all slots: the program `first`."""
        slots, V = self.args.slots, self.config.vocab_size
        store = self.storage(64, 64)
        starts, left = np.ones(slots, bool), np.full(slots, 9, np.int32)
        logits = jax.random.normal(jax.random.key(0), store.logits.shape, store.logits.dtype)
        store.logits, fixed = placed(logits), self.settings(True)
        cases = {
            "plain": (self.settings(False), 0, None),
            "fixed, nothing asked": (fixed, self.top, None),
            "fixed, penalties and biases": (self.settings(True, **PENALTIES), self.top, None),
            "fixed, 20 most likely": (self.settings(True, self.top), self.top, None),
            "fixed, a mask": (fixed, self.top, self.mask),
        }

        def call(settings: Settings, top: int, allowed: Any) -> Call:
            store.count(top > 0)
            return store.first(starts, left, settings, top, allowed)

        for case in cases.values():
            self.compile(call(*case))
        yield

        def again(case: Any) -> Any:
            store.rows, *found = call(*case)()
            return found

        for name, case in cases.items():
            self.emit("sampling", name, slots, V, milliseconds(again, [case]))
        yield

    def prefill(self) -> Iterator[None]:
        """The logits of the first new token of one prompt: in a slot, and in buffers."""
        prompt, chunks = self.args.prompt, [int(size) for size in self.args.chunks.split(",")]
        capacity, page, longest = prompt + 64, self.sizes[-1], chunks[0]
        num_iter = self.config.gka and np.array([self.config.gka.num_iter], np.int32)
        store = self.storage(capacity, page, slots=8)
        order = np.random.default_rng(0).permutation(store.nowhere).tolist()
        tokens = np.random.default_rng(0).integers(0, 50, (1, prompt)).astype(np.int32)
        box: Any = argparse.Namespace()

        def pages(start: int, chunk: int) -> Call:
            store.prefill_chunk = chunk
            part = tokens[:, start : start + chunk]
            return store.prefill(3, start, part, chunk, order, num_iter)

        def buffers(start: int) -> Call:
            part, count = tokens[:, start : start + longest], np.array([longest], np.int32)
            args = self.packed, box.rows, box.logits, part, count, num_iter
            return Call(programs.prefill.on(None), args, dict(fresh=start == 0))

        for chunk in chunks:
            store.prefill_chunk = chunk
            for start in store.starts():
                if start < prompt:
                    self.compile(pages(start, chunk))
        box.rows, box.logits = programs.empty.on(None)(self.packed, 1, capacity)
        for start in (0, longest):
            self.compile(buffers(start))
        yield

        def in_a_slot(chunk: int) -> jax.Array:
            for start in range(0, prompt, chunk):
                store.rows, store.logits, _ = pages(start, chunk)()
            return store.logits + 0  # the next call is given the logits themselves

        def alone(_: Any) -> jax.Array:
            box.rows, box.logits = programs.empty.on(None)(self.packed, 1, capacity)
            for start in range(0, prompt, longest):
                box.rows, box.logits = buffers(start)()
            return box.logits

        ms, exact = milliseconds(alone, [None], queue=False), alone(None)[0]
        self.emit("prefill", f"buffers, chunks of {longest}", 1, prompt, ms)
        for chunk in chunks:
            ms = milliseconds(in_a_slot, [chunk], queue=False)
            error = difference(in_a_slot(chunk)[3], exact)
            self.emit("prefill", f"pages of {page}, chunks of {chunk}", 1, prompt, ms, error)
        yield


if __name__ == "__main__":
    main()
