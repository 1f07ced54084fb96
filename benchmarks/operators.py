"""The operators as benchmarks see them: inputs, calls, errors.

Inputs are random but valid: unit-length queries and keys, decays near exp(-0.05), gates in (0, 1).

The relative error of a row is not taken on the problem that is timed, where a token-by-token
reference would take minutes, but on a shorter one: batch 1, the same heads and dtype, and at most
`ERROR_TOKENS` tokens (three windows for windowed attention). Expected are, from the same inputs
cast to float32 and with full-precision matrix products,

  fwd      the output of impl "reference" (token by token; dense for attention);
  fwd_bwd  the output and every gradient, the worst counts; for GKA those of impl "chunked", because
           "reference" differentiates the iteration where all others differentiate the solution;
  decode   the output of one step of impl "reference".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.rows import Row
from benchmarks.timing import SETS, milliseconds
from pallas_kernels.attention import attention, decode_attention
from pallas_kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from pallas_kernels.gka import gka, gka_step
from pallas_kernels.shapes import SHAPES, Shape
from pallas_kernels.ssd import ssd, ssd_step
from pallas_kernels.two_window_attention import two_window_attention, two_window_decode

Array = jax.Array
Inputs = dict[str, Array]
Normal = Callable[..., Array]  # dims -> float32 noise [B, T, *dims]
ERROR_TOKENS = 256
DECODE_STEPS = 16  # tokens per call of the timed loop: real decoding runs inside jit too


class Operator(Protocol):
    """How to make inputs for one operator and how to call it.

    Attributes:
      weights: names of inputs without batch and time axes.
      float32: names of inputs that keep float32 whatever the dtype of the row.
    """

    weights: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()

    def inputs(self, normal: Normal, s: Shape) -> Inputs:
        """Arrays of a sequence [B, T, ...], float32."""
        ...

    def run(self, x: Inputs, s: Shape, **options: Any) -> Array:
        """Output [B, T, H, D] of a sequence."""
        ...

    def state(self, normal: Normal, s: Shape) -> Any:
        """What decoding starts from: a recurrent state, or a cache of T keys and values."""
        ...

    def step(self, x: Inputs, state: Any, s: Shape, **options: Any) -> tuple[Array, Any]:
        """(output [B, H, D], state) of one token; `x` has no time axis."""
        ...


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _decay(x: Array) -> Array:
    return jax.nn.log_sigmoid(x + 3)


class _GKA(Operator):
    float32 = ("alpha", "g", "beta")

    def inputs(self, normal, s):
        return {
            "q": _unit(normal(s.heads, s.head_dim)),
            "k": _unit(normal(s.kv_heads, s.head_dim)),
            "v": normal(s.kv_heads, s.head_dim),
            "alpha": jax.nn.sigmoid(normal(s.heads)),
            "g": _decay(normal(s.heads)),
            "beta": jax.nn.sigmoid(normal(s.heads)),
        }

    def run(self, x, s, **options):
        return gka(**x, **options)[0]

    def state(self, normal, s):
        k = _unit(normal(s.heads, s.head_dim))
        v = normal(s.heads, s.head_dim)
        return jnp.einsum("bthd,bthe->bhde", k, k), jnp.einsum("bthd,bthe->bhde", k, v)

    def step(self, x, state, s, **options):
        return gka_step(**x, state=state, **options)


class _GatedDeltaRule(Operator):
    float32 = ("g", "beta")

    def inputs(self, normal, s):
        return {
            "q": _unit(normal(s.heads, s.head_dim)),
            "k": _unit(normal(s.kv_heads, s.head_dim)),
            "v": normal(s.kv_heads, s.head_dim),
            "g": _decay(normal(s.heads)),
            "beta": jax.nn.sigmoid(normal(s.heads)),
        }

    def run(self, x, s, *, num_iter, **options):
        return gated_delta_rule(**x, **options)[0]

    def state(self, normal, s):
        return normal(s.heads, s.head_dim, s.head_dim)[:, 0]

    def step(self, x, state, s, *, num_iter, **options):
        return gated_delta_rule_step(**x, state=state, **options)


class _SSD(Operator):
    weights = ("A", "D")
    float32 = ("dt", "A", "D")

    def inputs(self, normal, s):
        return {
            "x": normal(s.kv_heads, s.head_dim),
            "B": _unit(normal(s.kv_heads, s.head_dim)),
            "C": _unit(normal(s.heads, s.head_dim)),
            "dt": jax.nn.softplus(normal(s.heads) - 3),
            "A": -jnp.linspace(1.0, 4.0, s.heads),
            "D": jnp.ones(s.heads),
        }

    def run(self, x, s, *, num_iter, **options):
        return ssd(**x, **options)[0]

    def state(self, normal, s):
        return normal(s.heads, s.head_dim, s.head_dim)[:, 0]

    def step(self, x, state, s, *, num_iter, **options):
        return ssd_step(**x, state=state, **options)


class _Attention(Operator):
    def inputs(self, normal, s):
        return {
            "q": normal(s.heads, s.head_dim),
            "k": normal(s.kv_heads, s.head_dim),
            "v": normal(s.kv_heads, s.head_dim),
        }

    def run(self, x, s, *, num_iter, **options):
        return attention(**x, **options)

    def state(self, normal, s):
        return normal(s.kv_heads, s.head_dim), normal(s.kv_heads, s.head_dim)

    def step(self, x, state, s, *, num_iter, **options):
        k, v = state
        keys = jnp.full(k.shape[0], k.shape[1], jnp.int32)
        return decode_attention(x["q"], k, v, keys, **options), state


class _TwoWindowAttention(_Attention):
    def inputs(self, normal, s):
        fading = {name + "_fading": normal(s.kv_heads, s.head_dim) for name in ("k", "v")}
        return super().inputs(normal, s) | fading

    def run(self, x, s, *, num_iter, **options):
        return two_window_attention(**x, window=s.window, **options)

    def state(self, normal, s):
        """The first 2W of T keys, or T padded to 2W: two rings of W entries."""
        k, v = super().state(normal, s)
        tokens = jnp.full(k.shape[0], k.shape[1], jnp.int32)
        room = max(0, 2 * s.window - k.shape[1])
        k, v = (jnp.pad(x, ((0, 0), (0, room), (0, 0), (0, 0)))[:, : 2 * s.window] for x in (k, v))
        return k, v, tokens

    def step(self, x, state, s, *, num_iter, **options):
        k, v, tokens = state
        used = jnp.minimum(tokens, s.window), jnp.clip(tokens - s.window, 0, s.window)
        return two_window_decode(x["q"], k, v, *used, **options), state


OPERATORS: dict[str, Operator] = {
    "gka": _GKA(),
    "gated_delta_rule": _GatedDeltaRule(),
    "ssd": _SSD(),
    "two_window_attention": _TwoWindowAttention(),
    "attention": _Attention(),
}
RECURRENT = ("gka", "gated_delta_rule", "ssd")


def measure(
    op: str,
    impl: str,
    *,
    shape: str,
    tp: int,
    batch: int,
    length: int,
    dtype: str,
    num_iter: int | None,
    pass_: str,
    env: dict[str, Any],
) -> Row:
    """Time one operator on one problem, and its error on a smaller one (see the module).

    Args:
      op: a key of `OPERATORS`; impl: an implementation of it, by name.
      shape, tp: a name of `pallas_kernels.shapes.SHAPES`, and how many devices share it: what one
        of them computes is measured, on one device.
      batch, length: rows, and tokens per row; for pass "decode" the keys that attention reads
        (recurrent operators do not depend on it).
      dtype: of the inputs; gates, decays and states are float32.
      num_iter: Chebyshev iterations (op "gka" only).
      pass_: "fwd", "fwd_bwd" or "decode".
      env: see `benchmarks.rows.environment`.

    Raises:
      ValueError: `impl` cannot run this.
    """
    if impl == "auto":
        raise ValueError("an operator's row names its implementation; 'auto' is for models")
    s = SHAPES[shape].per_device(tp)
    if pass_ == "decode" and op in RECURRENT:
        length = 1
    case = functools.partial(_Case, op, impl, s, dtype, num_iter)
    windows = 3 * s.window if op == "two_window_attention" else 0
    short = case(1, min(length, max(ERROR_TOKENS, windows)))
    error = short.error(pass_)
    ms = case(batch, length).milliseconds(pass_)
    dims = dict(batch=batch, length=length, heads=s.heads, kv_heads=s.kv_heads, head_dim=s.head_dim)
    name = shape if tp == 1 else f"{shape} tp{tp}"
    return Row(op, impl, dtype, dims, num_iter, pass_, ms, error, case=name, **env)


@dataclasses.dataclass(frozen=True)
class _Case:
    """One operator on one problem."""

    name: str
    impl: str
    shape: Shape
    dtype: str
    num_iter: int | None
    batch: int
    length: int

    @property
    def op(self) -> Operator:
        return OPERATORS[self.name]

    def _normal(self, seed: int, length: int) -> Normal:
        keys = iter(jax.random.split(jax.random.key(seed), 8))
        return lambda *dims: jax.random.normal(next(keys), (self.batch, length, *dims), jnp.float32)

    def inputs(self, seed: int, length: int) -> Inputs:
        x = self.op.inputs(self._normal(seed, length), self.shape)
        return {n: a if n in self.op.float32 else a.astype(self.dtype) for n, a in x.items()}

    def state(self) -> Any:
        """A state that 64 random tokens have built, or a cache of `length` keys."""
        recurrent = self.name in RECURRENT
        state = self.op.state(self._normal(99, 64 if recurrent else self.length), self.shape)
        return state if recurrent else jax.tree.map(self._cast, state)

    def _cast(self, x: Array) -> Array:
        return x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def forward(self, x: Inputs, impl: str) -> tuple[Array]:
        return (self.op.run(x, self.shape, impl=impl, num_iter=self.num_iter),)

    def forward_backward(self, x: Inputs, impl: str) -> tuple[Array, Inputs]:
        out, pull = jax.vjp(lambda x: self.forward(x, impl)[0], x)
        noise = jax.random.normal(jax.random.key(7), out.shape).astype(out.dtype)
        return out, pull(noise)[0]

    def decode(self, x: Inputs, state: Any, impl: str) -> tuple[Array, Any]:
        """x [B, T, ...]: one step after the other; output [B, T, H, D] and the state."""
        tokens = {n: jnp.moveaxis(a, 1, 0) for n, a in x.items() if n not in self.op.weights}
        weights = {n: x[n] for n in self.op.weights}

        def step(state: Any, token: Inputs) -> tuple[Any, Array]:
            out, state = self.op.step(
                token | weights, state, self.shape, impl=impl, num_iter=self.num_iter
            )
            return state, out

        state, out = jax.lax.scan(step, state, tokens)
        return jnp.moveaxis(out, 0, 1), state

    def milliseconds(self, pass_: str) -> float:
        if pass_ != "decode":
            fn = jax.jit(functools.partial(self._sequence(pass_), impl=self.impl))
            return milliseconds(fn, [self.inputs(i, self.length) for i in range(SETS)])
        loop = jax.jit(functools.partial(self.decode, impl=self.impl), donate_argnums=1)
        state = self.state()

        def call(x: Inputs) -> Array:
            nonlocal state
            out, state = loop(x, state)
            return out

        sets = [self.inputs(i, DECODE_STEPS) for i in range(SETS)]
        return milliseconds(call, sets) / DECODE_STEPS

    def error(self, pass_: str) -> float:
        """Worst relative error of what the pass returns (see the module)."""
        if pass_ == "decode":
            x, state = self.inputs(0, 1), self.state()
            got = jax.jit(functools.partial(self.decode, impl=self.impl))(x, state)[0]
            x, state = jax.tree.map(_up, (x, state))
            with jax.default_matmul_precision("highest"):
                want = jax.jit(functools.partial(self.decode, impl="reference"))(x, state)[0]
        else:
            oracle = "reference" if pass_ == "fwd" or self.name != "gka" else "chunked"
            x, fn = self.inputs(0, self.length), self._sequence(pass_)
            got = jax.jit(functools.partial(fn, impl=self.impl))(x)
            with jax.default_matmul_precision("highest"):
                want = jax.jit(functools.partial(fn, impl=oracle))(jax.tree.map(_up, x))
        return max(jax.tree.leaves(jax.tree.map(_relative, got, want)))

    def _sequence(self, pass_: str) -> Callable[..., Any]:
        return {"fwd": self.forward, "fwd_bwd": self.forward_backward}[pass_]


def _up(x: Array) -> Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _relative(a: Array, b: Array) -> float:
    a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a64 - b64) / np.linalg.norm(b64))
