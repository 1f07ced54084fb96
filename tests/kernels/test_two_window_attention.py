"""B'MOJO-F attention: the union of both windows, however a sequence is cut, padded or packed."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmf_jax.pallas_kernels import two_window_attention, two_window_decode
from hmf_jax.pallas_kernels.ops.attention import chunked
from hmf_jax.pallas_kernels.ops.two_window_attention import cudnn
from tests.goldens import expected, golden
from tests.kernels.test_attention import (
    KEYWORDS,
    QUICK,
    SEGMENT_IDS,
    assert_close,
    assert_equals_reference,
    chronological,
    compiled,
    cuda_lowering,  # noqa: F401 (fixture)
    dense_pass,
    dense_scores,
    normal,
    small_blocks,  # noqa: F401 (fixture)
    value_and_grads,
)
from tests.util import rel

two_window_jit = jax.jit(
    two_window_attention, static_argnames=("window", "impl"), compiler_options=QUICK
)


def inputs(batch=2, length=37, heads=4, kv_heads=2, dim=8) -> tuple[Any, ...]:
    """q, k, v, k_fading, v_fading, q_fading."""
    shapes = [(length, heads)] + [(length, kv_heads)] * 4 + [(length, heads)]
    return tuple(normal(10 + i, batch, *shape, dim) for i, shape in enumerate(shapes))


def op(impl, **kwargs):
    """A function of all six arrays, or of five: tied weights."""

    def run(q, k, v, k_fading, v_fading, q_fading=None):
        return two_window_attention(
            q, k, v, k_fading, v_fading, q_fading=q_fading, impl=impl, **kwargs
        )

    return run


# The definition


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_every_query_sees_the_union_of_its_windows(impl):
    """Zero queries weigh all visible keys alike: the output lists them."""
    length, window = 13, 3
    zero = np.zeros((1, length, 1, 2 * length), np.float32)
    v = np.eye(length, 2 * length, dtype=np.float32)[None, :, None]
    v_fading = np.eye(length, 2 * length, length, dtype=np.float32)[None, :, None]
    o = two_window_jit(zero, zero, v, zero, v_fading, window=window, impl=impl)
    for i, weights in enumerate(np.asarray(o)[0, :, 0]):
        here = [j for j in range(length) if i - window < j <= i]
        fading = [j for j in range(length) if i - 2 * window < j <= i - window]
        if i == 6:
            assert (here, fading) == ([4, 5, 6], [1, 2, 3])
        seen = here + [length + j for j in fading]
        assert np.flatnonzero(weights).tolist() == seen
        np.testing.assert_allclose(weights[seen], 1 / len(seen), rtol=1e-6)


@pytest.mark.parametrize(
    ("window", "keywords", "arrays"),
    [(5, "plain", 5), (4, "packed", 6), (4, "lengths", 6)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [(w, "plain", 6) for w in (1, 5, 25, 90)] + [(4, "packed", 5)]
    ],
)
def test_chunked_equals_reference(window, keywords, arrays):
    """Six arrays, or five: tied weights."""
    assert_equals_reference(
        lambda impl: op(impl, window=window, **KEYWORDS[keywords]), *inputs()[:arrays]
    )


def test_one_token():
    args = inputs(length=1)
    assert rel(two_window_jit(*args[:5], window=4), np.repeat(args[2], 2, axis=2)) < 1e-6


def test_keeps_the_dtype_of_the_values():
    args = inputs()[:5]
    exact = two_window_jit(*args, window=6)
    assert exact.dtype == jnp.float32
    o = two_window_jit(*(jnp.asarray(x, jnp.bfloat16) for x in args), window=6)
    assert o.dtype == jnp.bfloat16 and rel(o, exact) < 2e-2


@pytest.mark.parametrize(
    ("impl", "blocks"),
    [("chunked", "small")]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("chunked", "real"), ("reference", "small"), ("reference", "real"))
    ],
)
def test_golden(impl, blocks, monkeypatch):
    """Outputs and gradients of the original's kernels. Its fading keys are cut to what it uses:
    queries W.., keys ..L-W."""
    if blocks == "real":
        monkeypatch.setattr(chunked, "QUERY_BLOCK", 256)
        monkeypatch.setattr(chunked, "SCORES_PER_BLOCK", 2**18)
    case = golden("op_bmojo")
    window = json.loads((case / "case.json").read_text())["window"]
    tensors = {k: x.astype(np.float32) for k, x in expected(case).items()}

    def run(q, k, v, q_fading, k_fading, v_fading):
        rest = [(0, 0), (0, window), (0, 0), (0, 0)]
        q_fading = jnp.pad(q_fading, [(0, 0), (window, 0), (0, 0), (0, 0)])
        k_fading, v_fading = jnp.pad(k_fading, rest), jnp.pad(v_fading, rest)
        return two_window_attention(
            q, k, v, k_fading, v_fading, q_fading=q_fading, window=window, impl=impl
        )

    names = "qi", "ki", "vi", "qf", "kf", "vf"
    o, pull = jax.vjp(jax.jit(run), *(tensors[name] for name in names))
    assert rel(o, tensors["o"]) < 1e-5
    for name, grad in zip(names, pull(jnp.asarray(tensors["do"])), strict=True):
        assert rel(grad[:1], tensors["d" + name]) < 1e-5


# Any cut of the sequence


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    pieces=st.lists(st.sampled_from([1, 9]), min_size=1, max_size=7),
    window=st.sampled_from([1, 6, 40]),
    tied=st.booleans(),
)
def test_any_split_equals_the_whole(pieces, window, tied):
    q, k, v, k_fading, v_fading, q_fading = inputs(length=66)
    start, outputs = 0, []
    for length in pieces:
        now = slice(start, start + length)
        here = [chronological(x, start, window, length) for x in (k, v)]
        fading = [chronological(x, start, 2 * window, length) for x in (k_fading, v_fading)]
        offset = jnp.full(2, start)
        own = None if tied else q_fading[:, now]
        outputs.append(
            two_window_jit(q[:, now], *here, *fading, window=window, q_fading=own, offset=offset)
        )
        start += length
    assert rel(np.concatenate(outputs, axis=1), whole(window, tied)[:, :start]) < 2e-6


@functools.cache
def whole(window, tied):
    args = inputs(length=66)
    q_fading = None if tied else args[5]
    return np.asarray(two_window_jit(*args[:5], window=window, q_fading=q_fading, impl="reference"))


def test_gradients_of_rows_at_different_offsets():
    window, length, offset = 5, 19, jnp.array([0, 3, 8, 30])
    q, _, _, _, _, q_fading = inputs(4, length)
    here = [normal(i, 4, window + length, 2, 8) for i in (1, 2)]
    fading = [normal(i, 4, 2 * window + length, 2, 8) for i in (3, 4)]
    args = q, *here, *fading, q_fading
    assert_equals_reference(lambda impl: op(impl, window=window, offset=offset), *args)


# Padding and packing


def test_packed_equals_separate():
    """Documents isolate both windows: outputs and gradients, whatever surrounds a document."""
    window, args = 4, inputs()
    cotangent = normal(9, *args[0].shape)
    packed = op("chunked", window=window, segment_ids=SEGMENT_IDS)
    ours, alone = compiled(packed, *args, cotangent=cotangent), op("reference", window=window)
    for row, start, end in ((0, 3, 12), (0, 12, 33), (1, 0, 21), (1, 23, 32)):
        part = (slice(row, row + 1), slice(start, end))
        expected = compiled(alone, *(x[part] for x in args), cotangent=cotangent[part])
        for a, b in zip(ours, expected, strict=True):
            assert rel(a[part], b) < 2e-6


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_padding_never_leaks(impl):
    pad = (SEGMENT_IDS == 0)[:, :, None, None]
    args, cotangent = inputs(), normal(9, 2, 37, 4, 8)
    run = op(impl, window=6, segment_ids=SEGMENT_IDS)
    clean = compiled(run, *args, cotangent=cotangent)
    holes = (np.where(pad, np.nan, x) for x in (*args, cotangent))
    dirty = compiled(run, *(next(holes) for _ in args), cotangent=next(holes))
    for a, b in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.asarray(a)[pad[:, :, 0, 0]].any()


# Decode


def ring_decode(arrays, q_fading, start, window, impl):
    """All tokens from `start` [B] on, one by one, through the ring buffers.

    One buffer [in-context ring | readable fading ring] and a pending ring: writing token i moves
    the pending entry in slot i mod W, token i - W, to the readable ring.
    """
    q, k, v, k_fading, v_fading = arrays
    batch, length = q.shape[:2]
    rows = jnp.arange(batch)

    def write(buffer, pending, here, fading, i):
        slot = i % window
        buffer = buffer.at[rows, slot].set(here)
        buffer = buffer.at[rows, window + slot].set(pending[rows, slot])
        return buffer, pending.at[rows, slot].set(fading)

    def step(state, t):
        i = start + t
        at = jnp.minimum(i, length - 1)
        k_state, v_state = (
            write(buffer, pending, here[rows, at], fading[rows, at], i)
            for (buffer, pending), here, fading in zip(
                state, (k, v), (k_fading, v_fading), strict=True
            )
        )
        o = two_window_decode(
            q[rows, at],
            k_state[0],
            v_state[0],
            jnp.minimum(i + 1, window),
            jnp.clip(i - window + 1, 0, window),
            q_fading=None if q_fading is None else q_fading[rows, at],
            impl=impl,
        )
        return (k_state, v_state), o

    def filled(x, x_fading):  # as a prefill of `start` tokens leaves them
        x, x_fading = np.asarray(x), np.asarray(x_fading)
        buffer = np.full((batch, 2 * window, *x.shape[2:]), np.nan, np.float32)
        pending = np.full((batch, window, *x.shape[2:]), np.nan, np.float32)
        for b in range(batch):
            for j in range(start[b]):
                buffer[b, j % window] = x[b, j]
                buffer[b, window + j % window] = pending[b, j % window]
                pending[b, j % window] = x_fading[b, j]
        return jnp.asarray(buffer), jnp.asarray(pending)

    state = filled(k, k_fading), filled(v, v_fading)
    steps = jnp.arange(length - min(start))
    return np.asarray(jax.jit(lambda s: jax.lax.scan(step, s, steps)[1])(state))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("window", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_ring_decode_equals_forward_past_two_windows(window, tied, impl):
    args = tuple(jnp.asarray(x) for x in inputs(3, 26))
    q_fading = None if tied else args[5]
    full = np.asarray(two_window_jit(*args[:5], window=window, q_fading=q_fading, impl="reference"))
    start = np.array([0, 7, 13])
    steps = ring_decode(args[:5], q_fading, start, window, impl)
    for row, first in enumerate(start):
        assert rel(steps[: 26 - first, row], full[row, first:]) < 2e-6


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_decode_of_an_empty_row_is_zero(tied):
    q, k, v, *_, q_fading = (x[:, :8] for x in inputs())
    full, none = jnp.array([0, 4]), jnp.array([0, 2])

    def run(impl):
        return jax.jit(
            lambda q, k, v, q_fading: two_window_decode(
                q, k, v, full, none, q_fading=None if tied else q_fading, impl=impl
            )
        )(q[:, 0], k, v, q_fading[:, 0])

    assert not np.asarray(run("chunked")[0]).any()
    assert_close(run("chunked"), run("reference"))


# cuDNN


def test_decode_lowers_to_cudnn(cuda_lowering, monkeypatch):  # noqa: F811
    q, k, v, *_, q_fading = (jnp.asarray(x[:, :8], jnp.bfloat16) for x in inputs())
    lengths = jnp.array([4, 0], jnp.int32)

    def step(q, k, v, q_fading=None, impl="auto"):
        return two_window_decode(q, k, v, lengths, lengths, q_fading=q_fading, impl=impl)

    text = cuda_lowering(step, q[:, 0], k, v)
    assert "__cudnn$fmhaSoftmax" in text and '"mask_type": "PADDING"' in text
    text = cuda_lowering(step, q[:, 0], k, v, q_fading[:, 0])
    assert text.count("custom_call @__cudnn$fmhaSoftmax") == 1
    monkeypatch.setattr(cudnn.cudnn, "internals", None)
    text = cuda_lowering(lambda *args: step(*args), q[:, 0], k, v, q_fading[:, 0])
    assert "cudnn" not in text
    with pytest.raises(ValueError, match="hides the cuDNN passes"):
        step(q[:, 0], k, v, q_fading[:, 0], impl="cudnn")


@pytest.mark.parametrize("pieces", [2, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_decode_in_pieces_equals_reference(monkeypatch, tied, pieces):
    monkeypatch.setattr(cudnn.cudnn, "with_lse", dense_pass)
    monkeypatch.setattr(cudnn.cudnn, "_pieces", lambda *args, groups: pieces)
    monkeypatch.setattr(cudnn, "why_no_decode", lambda *args: None)
    q, k, v, *_, q_fading = inputs(4, 48)
    lengths = jnp.array([0, 10, 24, 24]), jnp.array([0, 0, 1, 24])

    def step(impl):
        return lambda q, k, v, q_fading: two_window_decode(
            q, k, v, *lengths, q_fading=None if tied else q_fading, impl=impl
        )

    args = (q[:, 0], k, v, q_fading[:, 0])
    ours, exact = (compiled(step(impl), *args) for impl in ("cudnn", "reference"))
    assert_close(ours, exact)


def dense_pass_backward(q, k, v, lse, o, do, window, scale):
    """As flash attention does it: p from the given log-sum-exp, ds = p (do . v - do . o)."""
    s = dense_scores(q, k, window=window, scale=scale)
    groups = [x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[-1]) for x in (q, o, do)]
    p = jnp.exp(s - lse.reshape(*s.shape[:-1], 1))
    delta = jnp.einsum("btkgd,btkgd->bkgt", groups[1], groups[2])
    ds = scale * p * (jnp.einsum("btkgd,bskd->bkgts", groups[2], v) - delta[..., None])
    dq = jnp.einsum("bkgts,bskd->btkgd", ds, k).reshape(q.shape)
    dk = jnp.einsum("bkgts,btkgd->bskd", ds, groups[0])
    return dq, dk, jnp.einsum("bkgts,btkgd->bskd", p, groups[2])


@pytest.mark.parametrize(
    ("lengths", "window"),
    [((37, 20), 5)]
    + [
        pytest.param(lengths, window, marks=pytest.mark.slow)
        for lengths, window in [(None, 5)] + [(n, w) for n in (None, (37, 20)) for w in (37, 90)]
    ],
)
def test_merged_passes_equal_reference(monkeypatch, window, lengths):
    """Outputs and gradients of two passes that know nothing of each other, merged."""
    monkeypatch.setattr(cudnn.cudnn, "with_lse", dense_pass)
    monkeypatch.setattr(cudnn, "_pass_backward", dense_pass_backward)
    monkeypatch.setattr(cudnn, "why_not", lambda *args: None)
    kwargs = {"window": window, "lengths": None if lengths is None else jnp.array(lengths)}
    ours, exact = (compiled(op(impl, **kwargs), *inputs()) for impl in ("cudnn", "reference"))
    assert_close(ours, exact)


def test_prefill_lowers_to_two_cudnn_passes(cuda_lowering, monkeypatch):  # noqa: F811
    args = [jnp.asarray(x[:, :32], jnp.float16) for x in inputs(dim=64)]  # no kernel of ours

    def gradients(*args):
        return jax.grad(lambda *a: op("auto", window=8)(*a).astype(jnp.float32).sum(), range(6))(
            *args
        )

    text = cuda_lowering(gradients, *args)
    calls = [line for line in text.splitlines() if "custom_call @__cudnn$fmha" in line]
    backward = [line for line in calls if "fmhaSoftmaxBackward" in line]
    assert (len(calls), len(backward)) == (4, 2)
    assert all('"sliding_window_length": 8' in line for line in calls)
    monkeypatch.setattr(cudnn, "_backward_pass", None)
    with pytest.raises(ValueError, match="hides the cuDNN passes"):
        op("cudnn", window=8)(*args)


# Query heads per key/value head, and head_dim.
GROUPS = [(4, 128), (3, 128), (5, 128), (6, 256), (7, 64), (7, 128), (8, 256), (16, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "group", "dim"),
    [(None, 4, 128)] + [((300, 0, 77), *shape) for shape in GROUPS],
)
def test_cudnn_equals_reference(lengths, group, dim):
    args = [jnp.asarray(x, jnp.bfloat16) for x in inputs(3, 300, 2 * group, 2, dim)]
    kwargs = {"window": 64, "lengths": None if lengths is None else jnp.array(lengths)}
    ours = compiled(op("cudnn", **kwargs), *args)
    exact = value_and_grads(op("reference", **kwargs), *(x.astype(jnp.float32) for x in args))
    assert_close(ours, exact, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tied", "pieces", "group", "dim"),
    [(tied, pieces, 4, 128) for tied in (True, False) for pieces in (None, 8)]
    + [(False, None, *shape) for shape in GROUPS],
)
def test_cudnn_decode_equals_reference(monkeypatch, tied, pieces, group, dim):
    if pieces is not None:
        monkeypatch.setattr(cudnn.cudnn, "_pieces", lambda *args, groups: pieces)
    window = 64
    arrays = inputs(4, 2 * window, 2 * group, 2, dim)
    q, k, v, q_fading = (jnp.asarray(arrays[i], jnp.bfloat16) for i in (0, 1, 2, 5))
    lengths = jnp.array([0, 30, window, window]), jnp.array([0, 0, 1, window])

    def step(impl, q, k, v, q_fading):
        q_fading = None if tied else q_fading
        return two_window_decode(q, k, v, *lengths, q_fading=q_fading, impl=impl)

    args = (q[:, 0], k, v, q_fading[:, 0])
    ours = step("cudnn", *args)
    assert_close(ours, step("reference", *(x.astype(jnp.float32) for x in args)), 1e-2)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window=0 must be a whole number"),
        ({"k_fading": np.zeros((2, 36, 2, 8))}, "shape of k_fading"),
        ({"q_fading": np.zeros((2, 36, 4, 8))}, "q_fading must have"),
        (
            {"k_fading": np.zeros((2, 37, 1, 8)), "v_fading": np.zeros((2, 37, 1, 8))},
            "2 heads of k",
        ),
        ({"k": np.zeros((2, 38, 2, 8)), "v": np.zeros((2, 38, 2, 8))}, "k must hold 0 past"),
        (
            {"k": np.zeros((2, 30, 2, 8)), "v": np.zeros((2, 30, 2, 8)), "offset": np.zeros(2)},
            "k must hold",
        ),
        ({"offset": jnp.zeros(1, int)}, "one integer per row"),
        ({"segment_ids": np.ones((2, 37)), "offset": jnp.zeros(2, int)}, "leave them None"),
        ({"impl": "triton"}, "no implementation 'triton'"),
    ],
)
def test_bad_input(change, message):
    names = "q", "k", "v", "k_fading", "v_fading", "q_fading"
    arguments = dict(zip(names, inputs(), strict=True)) | {"window": 4} | change
    with pytest.raises(ValueError, match=message):
        two_window_attention(**arguments)


def test_bad_decode_input():
    q, k, v, *_ = inputs(length=8)
    ones = jnp.ones(2, int)
    with pytest.raises(ValueError, match="q must be"):
        two_window_decode(q, k, v, ones, ones)
    with pytest.raises(ValueError, match="two rings of equal size"):
        two_window_decode(q[:, 0], k[:, :7], v[:, :7], ones, ones)
    with pytest.raises(ValueError, match="lengths_fading"):
        two_window_decode(q[:, 0], k, v, ones, jnp.ones(3, int))
    with pytest.raises(ValueError, match="q_fading"):
        two_window_decode(q[:, 0], k, v, ones, ones, q_fading=q)
