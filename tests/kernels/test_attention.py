"""Full, sliding-window, continued and decode attention against the dense definition."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmf_jax.pallas_kernels import attention, compat, decode_attention, two_window_attention
from hmf_jax.pallas_kernels.dispatch import why_no_hopper
from hmf_jax.pallas_kernels.ops.attention import chunked, cudnn, mosaic
from hmf_jax.pallas_kernels.ops.attention.inputs import Inputs
from hmf_jax.pallas_kernels.ops.attention.reference import visible_keys
from tests.util import rel

# Documents of 9 and 21 tokens with padding before, between and after them.
SEGMENT_IDS = jnp.array(
    [[0] * 3 + [1] * 9 + [2] * 21 + [0] * 4, [5] * 21 + [0] * 2 + [4] * 9 + [0] * 5]
)
KEYWORDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {"lengths": jnp.array([37, 21])},
    "packed": {"segment_ids": SEGMENT_IDS},
}


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Blocks of 8 queries and 8 keys, so that short inputs cross many of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "QUERY_BLOCK", 8)
        patch.setattr(chunked, "SCORES_PER_BLOCK", 64)
        patch.setattr(chunked, "KEY_BLOCK", 16)
        yield


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def qkv(
    batch=2, length=37, heads=4, kv_heads=2, dim=8, keys=None, dtype: Any = np.float32
) -> tuple[Any, Any, Any]:
    keys = length if keys is None else keys
    shapes = (length, heads), (keys, kv_heads), (keys, kv_heads)
    q, k, v = (normal(i, batch, *shape, dim, dtype=dtype) for i, shape in enumerate(shapes))
    return q, k, v


def value_and_grads(op, *args, cotangent=None):
    """Output of `op` and the gradients of a fixed linear function of it."""
    o, pull = jax.vjp(op, *args)
    return o, *pull(jnp.asarray(normal(9, *o.shape) if cotangent is None else cotangent, o.dtype))


QUICK = {"xla_backend_optimization_level": 0}  # the tests spend their time in the compiler
compiled = jax.jit(value_and_grads, static_argnums=0, compiler_options=QUICK)


def assert_equals_reference(op, *args, limit=2e-6):
    """op(impl) is a function of `args`: outputs and gradients agree. Returns ours."""
    ours = compiled(op("chunked"), *args)
    assert_close(ours, compiled(op("reference"), *args), limit)
    return ours


attention_jit = jax.jit(
    functools.partial(attention, impl="chunked"),
    static_argnames=("window", "past", "scale"),
    compiler_options=QUICK,
)


def assert_close(actual, expected, limit=2e-6):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert rel(a, b) < limit or np.abs(np.asarray(a) - np.asarray(b)).max() < limit


# The definition


@pytest.mark.parametrize(
    ("window", "keywords"),
    [(None, "plain"), (9, "plain"), (5, "lengths"), (5, "packed")]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in ((1, "plain"), (100, "plain"), (None, "lengths"), (None, "packed"))
    ],
)
def test_chunked_equals_reference(window, keywords):
    def op(impl):
        return lambda *a: attention(*a, window=window, impl=impl, **KEYWORDS[keywords])

    args = qkv()
    assert_equals_reference(op, *args)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "dim", "window"),
    [(1, 2, 1, 4, 1), (17, 4, 1, 8, 16)]
    + [
        pytest.param(*shape, marks=pytest.mark.slow)
        for shape in ((1, 2, 2, 4, None), (7, 3, 3, 5, 7), (8, 6, 2, 16, 9))
    ],
)
def test_shapes(length, heads, kv_heads, dim, window):
    def op(impl):
        return lambda *a: attention(*a, window=window, impl=impl)

    args = qkv(1, length, heads, kv_heads, dim)
    assert_equals_reference(op, *args)


def test_window_counts_the_token_itself():
    """Zero queries weigh all visible keys alike: the output lists them."""
    length, window = 9, 3
    v = jnp.eye(length)[None, :, None]
    q = jnp.zeros_like(v)
    for impl in ("chunked", "reference"):
        run = jax.jit(functools.partial(attention, window=window, impl=impl))
        weights = np.asarray(run(q, q, v))[0, :, 0]
        for i in range(length):
            keys = [j for j in range(length) if i - window < j <= i]
            assert np.flatnonzero(weights[i]).tolist() == keys
            np.testing.assert_allclose(weights[i, keys], 1 / len(keys), rtol=1e-6)


def test_query_heads_share_key_heads_in_blocks():
    q, k, v = qkv(heads=6, kv_heads=2)
    shared = attention_jit(q, k, v)
    assert rel(shared, attention_jit(q, np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2))) < 1e-6


def test_scale():
    q, k, v = qkv()
    default = attention_jit(q, k, v)
    assert rel(attention_jit(q * 8**-0.5, k, v, scale=1.0), default) < 1e-6
    assert rel(attention_jit(q, k, v, scale=0.1), default) > 0.1


def test_float64_stays_float64():
    with jax.enable_x64(True):
        args = qkv(dtype=np.float64)
        ours = assert_equals_reference(
            lambda impl: functools.partial(attention, window=11, impl=impl), *args, limit=1e-14
        )
        assert all(x.dtype == jnp.float64 for x in ours)


@pytest.mark.parametrize("impl", ["chunked", pytest.param("reference", marks=pytest.mark.slow)])
def test_bfloat16_in_and_out(impl):
    args = [jnp.asarray(x, jnp.bfloat16) for x in qkv()]
    ours = compiled(functools.partial(attention, window=20, impl=impl), *args)
    exact = compiled(
        functools.partial(attention, window=20, impl="reference"),
        *(np.asarray(x, np.float32) for x in args),
    )
    assert all(x.dtype == jnp.bfloat16 for x in ours)
    for a, b, limit in zip(ours, exact, (5e-3, 2e-2, 2e-2, 2e-2), strict=True):
        assert rel(a, b) < limit


@pytest.mark.parametrize("window", [None, 20])
def test_bfloat16_scores_are_float32(window):
    """Scores near 100, which bfloat16 would round by 0.2, and many small terms of a sum."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(1))
    run = functools.partial(attention, window=window, scale=12.0)
    low = jax.jit(functools.partial(run, impl="chunked"))(q, k, v)
    high = jax.jit(functools.partial(run, impl="reference"))(
        *(x.astype(jnp.float32) for x in (q, k, v))
    )
    assert low.dtype == jnp.bfloat16 and rel(low, high) < 4e-3


def test_zero_keys_give_the_mean():
    _, _, v = qkv(heads=2)
    q = np.zeros_like(v)
    o, *grads = compiled(functools.partial(attention, impl="chunked"), q, q, v)
    mean = np.cumsum(v, axis=1) / np.arange(1, 38)[:, None, None]
    assert rel(o, mean) < 1e-6
    assert all(np.isfinite(x).all() for x in grads)


# Continuing: a cache, or the past in front of the new tokens


def chronological(x: np.ndarray, start: int, past: int, length: int) -> np.ndarray:
    """Tokens start - past .. start + length of x [B, T, ...]; NaN before token 0."""
    kept = x[:, max(start - past, 0) : start + length]
    empty = past + length - kept.shape[1]
    return np.pad(kept, [(0, 0), (empty, 0), (0, 0), (0, 0)], constant_values=np.nan)


@settings(max_examples=25, deadline=None)
@given(
    pieces=st.lists(st.sampled_from([1, 9]), min_size=1, max_size=7),
    window=st.sampled_from([None, 7, 50]),
    layout=st.sampled_from(["cache", "past"]),
)
def test_any_split_equals_the_whole(pieces, window, layout):
    q, k, v = qkv(length=66)
    start, outputs = 0, []
    for length in pieces:
        if layout == "cache":  # what lies behind the written part must not matter
            written = np.arange(66) < start + length
            keys = [np.where(written[:, None, None], x, np.nan) for x in (k, v)]
            past = None
        else:
            past = 66 if window is None else window - 1
            keys = [chronological(x, start, past, length) for x in (k, v)]
        offset = jnp.full(2, start)
        outputs.append(
            attention_jit(
                q[:, start : start + length], *keys, window=window, offset=offset, past=past
            )
        )
        start += length
    assert rel(np.concatenate(outputs, axis=1), whole(window)[:, :start]) < 2e-6


@functools.cache
def whole(window):
    run = jax.jit(functools.partial(attention, window=window, impl="reference"))
    return np.asarray(run(*qkv(length=66)))


@pytest.mark.parametrize(
    ("past", "window"),
    [(None, 6), (12, 40)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in ((None, None), (0, 6), (12, None), (12, 1))
    ],
)
def test_rows_at_different_offsets(past, window):
    offset = jnp.array([0, 5, 21])
    length = 19
    keys = 48 if past is None else past + length

    def op(impl):
        return lambda *a: attention(*a, window=window, offset=offset, past=past, impl=impl)

    args = qkv(3, length, keys=keys)
    _, _, d_k, _ = assert_equals_reference(op, *args)
    if past:  # the first row has no past yet
        assert not np.asarray(d_k)[0, :past].any()
        assert np.asarray(d_k)[2, :past].any() == (window != 1)


# Padding and packing


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 6])
def test_packed_equals_separate(window):
    """Outputs and gradients, whatever surrounds a document."""
    args = qkv()
    packed = functools.partial(attention, window=window, segment_ids=SEGMENT_IDS, impl="chunked")
    alone = functools.partial(attention, window=window, impl="reference")
    cotangent = normal(9, *args[0].shape)
    ours = compiled(packed, *args, cotangent=cotangent)
    for row, start, end in ((0, 3, 12), (0, 12, 33), (1, 0, 21), (1, 23, 32)):
        part = (slice(row, row + 1), slice(start, end))
        expected = compiled(alone, *(x[part] for x in args), cotangent=cotangent[part])
        for a, b in zip(ours, expected, strict=True):
            assert rel(a[part], b) < 2e-6


@pytest.mark.parametrize(
    ("impl", "keywords"),
    [
        ("chunked", "lengths"),
        ("chunked", "packed"),
        pytest.param("reference", "packed", marks=pytest.mark.slow),
    ],
)
def test_padding_never_leaks(keywords, impl):
    kwargs = KEYWORDS[keywords]
    if keywords == "lengths":
        pad = np.arange(37) >= kwargs["lengths"][:, None]
    else:
        pad = kwargs["segment_ids"] == 0
    args = qkv()
    op = functools.partial(attention, impl=impl, **kwargs)
    cotangent = normal(9, *args[0].shape)
    clean = compiled(op, *args, cotangent=cotangent)
    holes = (np.where(pad[:, :, None, None], np.nan, x) for x in (*args, cotangent))
    dirty = compiled(op, *(next(holes) for _ in args), cotangent=next(holes))
    for a, b in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.asarray(a)[pad].any()


@pytest.mark.parametrize("op", [attention, two_window_attention])
def test_lengths_equal_segment_ids(op):
    args = qkv(4)
    args = args if op is attention else (*args, *args[1:])
    window = {} if op is attention else {"window": 5}
    lengths = jnp.array([0, 37, 1, 20])
    valid = np.arange(37) < np.asarray(lengths)[:, None]
    kwargs = {"lengths": lengths}, {"segment_ids": jnp.asarray(valid, jnp.int32)}
    ours, expected = (compiled(functools.partial(op, **window, **k), *args) for k in kwargs)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert not np.asarray(a)[~valid].any()


def test_same_id_after_another_document_is_a_new_document():
    args = qkv()
    again = np.array([[1] * 10 + [2] * 10 + [1] * 17] * 2)
    fresh = np.array([[1] * 10 + [2] * 10 + [3] * 17] * 2)
    run = jax.jit(lambda ids: attention(*args, segment_ids=ids))
    np.testing.assert_array_equal(run(again), run(fresh))


# Decode


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_decode_equals_the_last_row_of_attention(impl):
    lengths = jnp.array([1, 13, 37])
    q, k, v = qkv(3)
    order = np.random.default_rng(0).permutation(37)
    used = order < lengths[:, None]  # token order[j] lies in entry j; rubbish behind the prefix
    order = np.stack([np.concatenate([order[u], order[~u]]) for u in used])
    buffers = [
        np.where(order[:, :, None, None] < lengths[:, None, None, None],
                 np.take_along_axis(x, order[:, :, None, None], axis=1), np.nan)
        for x in (k, v)
    ]  # fmt: skip
    o = jax.jit(lambda *a: decode_attention(*a, impl=impl))(q[:, 0], *buffers, lengths)
    rows = jnp.arange(3), lengths - 1
    aligned = np.zeros_like(q)
    aligned[rows] = q[:, 0]
    full = jax.jit(lambda *a: attention(*a, impl="reference"))(aligned, k, v)
    assert rel(o, full[rows]) < 1e-6


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_decode_of_an_empty_row_is_zero(impl):
    q, k, v = qkv(2, 20)
    lengths = jnp.array([0, 20])
    results = compiled(lambda q, k, v: decode_attention(q, k, v, lengths, impl=impl), q[:, 0], k, v)
    for x in results:
        assert np.isfinite(x).all() and not np.asarray(x[0]).any() and np.asarray(x[1]).any()


def test_decode_gradients():
    q, k, v = qkv(2, 20)
    lengths = jnp.array([3, 20])
    assert_equals_reference(
        lambda impl: lambda q, k, v: decode_attention(q, k, v, lengths, impl=impl), q[:, 0], k, v
    )


# Sizes


def test_real_block_sizes(monkeypatch):
    monkeypatch.setattr(chunked, "QUERY_BLOCK", 256)
    monkeypatch.setattr(chunked, "SCORES_PER_BLOCK", 2**18)
    assert_equals_reference(
        lambda impl: functools.partial(attention, impl=impl), *qkv(1, 1100, 2, 1, 8)
    )


@pytest.mark.parametrize("window", [None, pytest.param(64, marks=pytest.mark.slow)])
def test_memory_is_linear(window, monkeypatch):
    monkeypatch.setattr(chunked, "QUERY_BLOCK", 256)
    monkeypatch.setattr(chunked, "SCORES_PER_BLOCK", 2**18)

    def loss(q, k, v):
        return attention(q, k, v, window=window, impl="chunked").sum()

    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporaries(65536) < 2.5 * temporaries(32768) < 2**28  # one score matrix: 2**32


# cuDNN


def test_cudnn_is_refused_with_a_reason():
    q, k, v = args = [jnp.asarray(x, jnp.bfloat16) for x in qkv()]
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
            attention(*args, impl="cudnn")
        with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
            decode_attention(q[:, 0], k, v, jnp.array([1, 2]), impl="cudnn")
    with pytest.raises(ValueError, match="segment_ids"):
        attention(*args, segment_ids=jnp.ones((2, 37), int), impl="cudnn")
    with pytest.raises(ValueError, match="offset"):
        attention(*args, offset=jnp.zeros(2, int), impl="cudnn")
    with pytest.raises(ValueError, match="no implementation 'triton'"):
        attention(*args, impl="triton")


def test_mosaic_is_refused_with_a_reason():
    args = [jnp.asarray(x, jnp.bfloat16) for x in qkv()]
    if why_no_hopper():
        with pytest.raises(ValueError, match="need an NVIDIA Hopper GPU"):
            attention(*args, impl="mosaic")
        with pytest.raises(ValueError, match="need an NVIDIA Hopper GPU"):
            two_window_attention(*args, *args[1:], window=4, impl="mosaic")


@pytest.fixture
def cuda_lowering(monkeypatch):
    """Text of a function lowered for CUDA, on a machine that has neither a GPU nor cuDNN."""
    internals = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(internals, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    device = type("Device", (), {"compute_capability": "9.0", "platform": "none"})()
    monkeypatch.setattr(jax, "devices", lambda: [device])
    return lambda f, *args: (
        jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text().replace("\\22", '"')
    )


def test_cudnn_lowers_for_cuda(cuda_lowering):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(length=64))
    lengths = jnp.array([64, 3], jnp.int32)
    text = cuda_lowering(lambda *a: attention(*a), q, k, v)
    assert "__cudnn$fmhaSoftmax" in text
    assert '"mask_type": "CAUSAL"' in text and '"sliding_window_length": 0' in text
    text = cuda_lowering(lambda *a: attention(*a, window=16, lengths=lengths), q, k, v)
    assert '"mask_type": "CAUSAL"' in text and '"sliding_window_length": 16' in text
    text = cuda_lowering(
        jax.grad(lambda *a: attention(*a, window=16).astype(jnp.float32).sum()), q, k, v
    )
    assert "__cudnn$fmhaSoftmaxBackward" in text
    text = cuda_lowering(lambda *a: decode_attention(*a), q[:, 0], k, v, lengths)
    assert '"mask_type": "PADDING"' in text
    for kwargs in ({"offset": lengths}, {"segment_ids": jnp.ones((2, 64), jnp.int32)}):
        assert "cudnn" not in cuda_lowering(lambda *a, kw=kwargs: attention(*a, **kw), q, k, v)


def dense_scores(q, k, *, scale, window=None, lengths=None):
    """[B, K, H / K, T, S] in float32."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    s = scale * jnp.einsum("btkgd,bskd->bkgts", grouped, k).astype(jnp.float32)
    if lengths is None:
        oldest = None if window is None else window - 1
        visible = visible_keys(q.shape[1], k.shape[1], oldest=oldest)[:, None, None]
    else:
        visible = (jnp.arange(k.shape[1]) < lengths[:, None])[:, None, None, None]
    return jnp.where(visible, s, -1e9)


def dense_pass(q, k, v, **mask):
    """`cudnn.with_lse` on any device; where nothing is visible it returns NaN."""
    s = dense_scores(q, k, **mask)
    lse = jnp.where(jnp.any(s > -1e9, axis=-1), jax.nn.logsumexp(s, axis=-1), jnp.nan)
    o = jnp.einsum("bkgts,bskd->btkgd", jnp.exp(s - lse[..., None]), v.astype(jnp.float32))
    return o.reshape(q.shape).astype(v.dtype), lse.reshape(q.shape[0], -1, q.shape[1])


@pytest.mark.parametrize("pieces", [2, 8])
def test_decode_in_pieces_equals_reference(monkeypatch, pieces):
    """Outputs and gradients; pieces without an entry in use return NaN."""
    monkeypatch.setattr(cudnn, "with_lse", dense_pass)
    monkeypatch.setattr(cudnn, "_pieces", lambda *args, groups: pieces)
    monkeypatch.setattr(cudnn, "why_not", lambda *args: None)
    q, k, v = qkv(5, 48)
    lengths = jnp.array([0, 1, 24, 37, 48])

    def op(impl):
        return functools.partial(decode_attention, lengths=lengths, impl=impl)

    ours, exact = (compiled(op(impl), q[:, 0], k, v) for impl in ("cudnn", "reference"))
    assert_close(ours, exact)


@pytest.mark.parametrize("groups", [1, 2])
def test_pieces_are_equal_and_long(groups):
    for rows in (1, 3, 47, 66, 1200):
        for entries in (2, 500, 4096, 6144, 12346, 131072):
            n = cudnn._pieces(rows, entries, 2, groups=groups)
            assert n % groups == 0 and entries % n == 0
            assert n == groups or (entries // n >= 2048 and 1100 <= 2 * rows * n < 2200)


def test_buffers_are_cut_where_that_was_faster():
    cases = {
        (47, 32768, 8): 4,  # 376 blocks
        (84, 32768, 4): 4,
        (24, 32768, 8): 8,
        (6, 131072, 8): 32,
        (47, 32766, 8): 1,  # 4 does not divide
        (64, 8192, 8): 4,  # better by far if lengths differ
        (66, 4096, 8): 1,  # 4 pieces would have 1024 entries
        (15, 16384, 8): 1,  # 16 pieces would have 1024 entries
        (1, 131072, 8): 1,
    }
    assert {case: cudnn._pieces(*case, groups=1) for case in cases} == cases


def test_long_decode_lowers_to_one_pass_over_pieces(cuda_lowering, monkeypatch):
    shapes = (8,), (8192, 4), (8192, 4)
    args = [jax.ShapeDtypeStruct((100, *n, 128), jnp.bfloat16) for n in shapes]
    lengths = jax.ShapeDtypeStruct((100,), jnp.int32)

    def rows():
        text = cuda_lowering(lambda *a: decode_attention(*a), *args, lengths)
        (call,) = [line for line in text.splitlines() if "custom_call @__cudnn$fmha" in line]
        return [n for n in (100, 400) if f"tensor<{n}x{819200 // n}x4x128xbf16>" in call]

    assert rows() == [400]
    monkeypatch.setattr(cudnn, "internals", None)  # a jax that hides what the merge needs
    assert rows() == [100]


def test_programs_do_not_grow_with_the_number_of_pieces(cuda_lowering):
    """XLA took 29 s longer for the 36 layers of a model when 32 pieces were merged one by one."""

    def lines(rows, entries):
        shapes = (rows, 8, 128), (rows, entries, 8, 128), (rows, entries, 8, 128)
        args = [jax.ShapeDtypeStruct(n, jnp.bfloat16) for n in shapes]
        lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
        return len(cuda_lowering(lambda *a: decode_attention(*a), *args, lengths).splitlines())

    assert cudnn._pieces(3, 131072, 8, groups=1) == 64
    assert cudnn._pieces(100, 8192, 8, groups=1) == 2
    assert lines(3, 131072) == lines(100, 8192)


def test_a_jax_that_has_changed_hides_its_internals(monkeypatch):
    found = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    assert compat.find_cudnn() is found
    monkeypatch.setattr(found, "dot_product_attention", lambda query, key, value, *, scale: None)
    assert compat.find_cudnn() is None
    monkeypatch.delattr(found, "dot_product_attention")
    assert compat.find_cudnn() is None


def test_cudnn_takes_what_it_can(cuda_lowering):
    good = [jnp.zeros((1, 4, 2, 64), jnp.bfloat16)] * 3
    assert cudnn.why_not(Inputs(*good)) is None
    assert "bfloat16" in str(cudnn.why_not(Inputs(*(x.astype(jnp.float32) for x in good))))
    assert "head_dim" in str(cudnn.why_not(Inputs(*(x[..., :60] for x in good))))
    assert cudnn.why_not(Inputs(*(jnp.tile(x, 4) for x in good))) is None
    assert "head_dim 256 and" in str(cudnn.why_not(Inputs(*(jnp.tile(x, 3) for x in good))))


# Query heads per key/value head, and head_dim.
GROUPS = [(1, 256), (3, 64), (3, 128), (5, 128), (6, 256), (7, 64), (7, 128), (8, 256), (16, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("window", "lengths", "group", "dim"),
    [(w, n, 4, 128) for w in (None, 1, 100) for n in (None, (300, 0, 77))]
    + [(w, (300, 0, 77), *shape) for shape in GROUPS for w in (None, 100)],
)
def test_cudnn_equals_reference(window, lengths, group, dim):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(3, 300, 2 * group, 2, dim))
    kwargs = {"window": window, "lengths": None if lengths is None else jnp.array(lengths)}
    ours = compiled(functools.partial(attention, impl="cudnn", **kwargs), q, k, v)
    exact = value_and_grads(
        functools.partial(attention, impl="reference", **kwargs),
        *(x.astype(jnp.float32) for x in (q, k, v)),
    )
    assert_close(ours, exact, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("entries", "pieces", "group", "dim"),
    [(500, None, 4, 128), (500, 4, 4, 128), (16384, 8, 4, 128)]
    + [(500, pieces, *shape) for shape in GROUPS for pieces in (None, 4)],
)
def test_cudnn_decode_equals_reference(monkeypatch, entries, pieces, group, dim):
    if pieces is not None:
        monkeypatch.setattr(cudnn, "_pieces", lambda *args, groups: pieces)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(4, 1, 2 * group, 2, dim, keys=entries))
    lengths = jnp.array([0, 1, entries // 3, entries])
    ours = decode_attention(q[:, 0], k, v, lengths, impl="cudnn")
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    exact = decode_attention(q[:, 0], k, v, lengths, impl="reference")
    assert_close(ours, exact, 1e-2)


# Bad input


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_auto_looks_at_the_scale(monkeypatch, scale):
    """The kernels for Hopper take maxima before they scale, so the scale must be positive."""
    monkeypatch.setattr(mosaic, "why_no_hopper", lambda: None)
    q, k, v = (jnp.ones((1, 2, 1, 64), jnp.bfloat16),) * 3
    assert mosaic.why_not(0.5, q, k, v) is None
    assert "positive scale" in str(mosaic.why_not(scale, q, k, v))
    q, k, v = qkv()
    chosen = attention(q, k, v, scale=scale)
    assert_close(chosen, attention(q, k, v, scale=scale, impl="reference"), 1e-5)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), True, "1"])
def test_a_scale_is_a_finite_number(scale):
    q, k, v = qkv()
    with pytest.raises(ValueError, match="must be a finite number"):
        attention(q, k, v, scale=scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((2, 37, 8))}, "q must be"),
        ({"k": np.zeros((2, 37, 3, 8))}, "K dividing"),
        ({"k": np.zeros((2, 37, 2, 4))}, "k must be"),
        ({"v": np.zeros((2, 36, 2, 8))}, "shape of k"),
        ({"k": np.zeros((2, 40, 2, 8)), "v": np.zeros((2, 40, 2, 8))}, "0 past and 37 new"),
        ({"window": 0}, "window=0 must be a whole number"),
        ({"window": 2.5}, "window=2.5 must be a whole number"),
        ({"window": 2**31}, "must be a whole number from 1 to"),
        ({"past": 3}, "needs offset"),
        ({"past": 3, "offset": jnp.zeros(2, int)}, "3 past and 37 new"),
        ({"offset": jnp.zeros(3, int)}, "one integer per row"),
        ({"lengths": np.zeros((2, 1), np.int32)}, "one integer per row"),
        ({"segment_ids": jnp.ones((2, 36), int)}, "segment_ids must be"),
        (
            {"segment_ids": jnp.ones((2, 37), int), "offset": jnp.zeros(2, int)},
            "leave them",
        ),
        ({"lengths": jnp.ones(2, int), "offset": jnp.zeros(2, int)}, "leave them"),
        ({"impl": "fast"}, "unknown"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(zip("qkv", qkv(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_bad_decode_input():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="q must be"):
        decode_attention(q, k, v, jnp.ones(2, int))
    with pytest.raises(ValueError, match="lengths must"):
        decode_attention(q[:, 0], k, v, jnp.ones(3, int))
