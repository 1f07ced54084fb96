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
from benchmarks.timing import SETS, DeviceTime, device_time, milliseconds
from hmf_jax.pallas_kernels import (
    attention,
    decode_attention,
    gated_delta_rule,
    gated_delta_rule_step,
    gka,
    gka_step,
    ssd,
    ssd_step,
    two_window_attention,
    two_window_decode,
)
from hmf_jax.pallas_kernels.shapes import SHAPES, Shape

Array = jax.Array
Inputs = dict[str, Array]
Normal = Callable[..., Array]  # dims -> float32 noise [B, T, *dims]
ERROR_TOKENS = 256
COTANGENT = "cotangent"  # the name of the output's gradient among the inputs of a backward pass
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
    error: bool = True,
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
      error: whether to take the error; else the row has none.

    Raises:
      ValueError: `impl` cannot run this.
    """
    if impl == "auto":
        raise ValueError("an operator's row names its implementation; 'auto' is for models")
    s = SHAPES[shape].per_device(tp)
    if pass_ == "decode" and op in RECURRENT:
        length = 1
    problem = _Problem(op, s, dtype, num_iter, pass_)
    fn = problem.function(impl)
    windows = 3 * s.window if op == "two_window_attention" else 0
    short = min(length, max(ERROR_TOKENS, windows))
    found = _error(problem, impl, short) if error else None
    ms, profile = problem.milliseconds(fn, batch, length)
    extra = {} if profile is None else profile.per(DECODE_STEPS if pass_ == "decode" else 1)
    dims = dict(batch=batch, length=length, heads=s.heads, kv_heads=s.kv_heads, head_dim=s.head_dim)
    name = shape if tp == 1 else f"{shape} tp{tp}"
    return Row(op, impl, dtype, dims, num_iter, pass_, ms, found, name, extra, **env)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """One pass of one operator, for any batch and length."""

    name: str
    shape: Shape
    dtype: str
    num_iter: int | None
    pass_: str

    @property
    def op(self) -> Operator:
        return OPERATORS[self.name]

    def function(self, impl: str) -> Callable[..., Any]:
        """The jitted pass. "fwd": inputs -> output; "fwd_bwd": inputs, with a cotangent of the
        output among them, -> (output, gradients);
        "decode": (inputs, state) -> (outputs, state), token by token, the state donated."""
        options: dict[str, Any] = dict(impl=impl, num_iter=self.num_iter)

        def forward(x: Inputs) -> Array:
            return self.op.run(x, self.shape, **options)

        def forward_backward(x: Inputs) -> tuple[Array, Inputs]:
            cotangent = x[COTANGENT]
            out, pull = jax.vjp(forward, {n: a for n, a in x.items() if n != COTANGENT})
            return out, pull(cotangent.astype(out.dtype))[0]

        def decode(x: Inputs, state: Any) -> tuple[Array, Any]:
            tokens = {n: jnp.moveaxis(a, 1, 0) for n, a in x.items() if n not in self.op.weights}
            weights = {n: x[n] for n in self.op.weights}

            def step(state: Any, token: Inputs) -> tuple[Any, Array]:
                out, state = self.op.step(token | weights, state, self.shape, **options)
                return state, out

            state, out = jax.lax.scan(step, state, tokens)
            return out, state

        if self.pass_ == "decode":
            return jax.jit(decode, donate_argnums=1)
        return jax.jit({"fwd": forward, "fwd_bwd": forward_backward}[self.pass_])

    def inputs(self, seed: int, batch: int, length: int) -> Inputs:
        return _make(self, batch, length)(jax.random.key(seed))

    def state(self, batch: int, length: int) -> Any:
        """A state as 64 random tokens leave it, or a cache of `length` keys."""

        @jax.jit
        def make(key: Array) -> Any:
            if self.name in RECURRENT:
                return self.op.state(_normal(key, batch, 64), self.shape)
            return jax.tree.map(self.cast, self.op.state(_normal(key, batch, length), self.shape))

        return make(jax.random.key(99))

    def cast(self, x: Array) -> Array:
        return x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def milliseconds(
        self, fn: Callable[..., Any], batch: int, length: int
    ) -> tuple[float, DeviceTime | None]:
        if self.pass_ != "decode":
            sets = [self.inputs(i, batch, length) for i in range(SETS)]
            return milliseconds(fn, sets), device_time(lambda: fn(sets[0]))
        state = self.state(batch, length)

        def call(x: Inputs) -> Array:
            nonlocal state
            out, state = fn(x, state)
            return out

        sets = [self.inputs(i, batch, DECODE_STEPS) for i in range(SETS)]
        return milliseconds(call, sets) / DECODE_STEPS, device_time(lambda: call(sets[0]))

    def error(self, fn: Callable[..., Any], length: int) -> float:
        """Worst relative error of what the pass returns (see the module), for one row."""
        if self.pass_ == "decode":
            x, state = self.inputs(0, 1, 1), self.state(1, length)
            x32, state32 = jax.tree.map(_up, (x, state))
            got = fn(x, state)[0]
            with jax.default_matmul_precision("highest"):
                want = self.function("reference")(x32, state32)[0]
        else:
            solution = self.pass_ == "fwd_bwd" and self.name == "gka"
            x = self.inputs(0, 1, length)
            got = fn(x)
            with jax.default_matmul_precision("highest"):
                want = self.function("chunked" if solution else "reference")(jax.tree.map(_up, x))
        return max(jax.tree.leaves(jax.tree.map(_relative, got, want)))


@functools.cache
def _error(problem: _Problem, impl: str, length: int) -> float:
    return problem.error(problem.function(impl), length)


@functools.cache
def _make(problem: _Problem, batch: int, length: int) -> Callable[[Array], Inputs]:
    """Jitted: key -> inputs of a problem."""
    op = problem.op

    def make(key: Array) -> Inputs:
        x = op.inputs(_normal(key, batch, length), problem.shape)
        x = {n: a if n in op.float32 else problem.cast(a) for n, a in x.items()}
        if problem.pass_ == "fwd_bwd":
            shape = batch, length, problem.shape.heads, problem.shape.head_dim
            x[COTANGENT] = problem.cast(jax.random.normal(jax.random.fold_in(key, 7), shape))
        return x

    return jax.jit(make)


def _normal(key: Array, batch: int, length: int) -> Normal:
    keys = iter(jax.random.split(key, 8))
    return lambda *dims: jax.random.normal(next(keys), (batch, length, *dims), jnp.float32)


def _up(x: Array) -> Array:
    """A float32 copy (a copy even of float32: the original may be donated)."""
    return jnp.array(x, jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)


def _relative(a: Array, b: Array) -> float:
    a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a64 - b64) / np.linalg.norm(b64))
