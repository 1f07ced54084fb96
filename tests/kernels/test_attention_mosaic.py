"""The Hopper attention kernels against the definition: windows, packing, caches, gradients.

On a CPU they run in the Mosaic interpreter; tests marked `gpu` run them.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from hmf_jax.pallas_kernels.ops.attention import mosaic, reference
from hmf_jax.pallas_kernels.ops.attention.chunked import document_ids
from hmf_jax.pallas_kernels.ops.attention.inputs import Inputs
from hmf_jax.pallas_kernels.ops.attention.mosaic_tiles import TILE, Options, spans_of
from hmf_jax.pallas_kernels.ops.two_window_attention import mosaic as two_window_mosaic
from hmf_jax.pallas_kernels.ops.two_window_attention import reference as two_window_reference
from hmf_jax.pallas_kernels.ops.two_window_attention.inputs import Inputs as TwoWindowInputs
from tests.util import rel

# Operands, probabilities and results are rounded to bfloat16 (2^-9).
BOUND = 6e-3
ONE = ("q", "k", "v")
TWO = ("q", "k", "v", "k_fading", "v_fading", "q_fading")


def by_name(op: Any, inputs: Any) -> Any:
    """An implementation that takes its arrays by name."""

    def run(**keywords: Any) -> jax.Array:
        arrays = {name: keywords.pop(name) for name in inputs._fields if name in keywords}
        return op(inputs(**arrays), **keywords)

    return run


ONE_OURS = by_name(mosaic.attention, Inputs)
ONE_EXACT = by_name(reference.attention, Inputs)
TWO_OURS = by_name(two_window_mosaic.two_window_attention, TwoWindowInputs)
TWO_EXACT = by_name(two_window_reference.two_window_attention, TwoWindowInputs)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def draw(names: tuple[str, ...], B=1, T=150, H=2, K=1, D=64, past=0) -> dict[str, jax.Array]:
    """bfloat16 arrays by name; keys and values are `past` tokens longer than queries."""
    return {
        name: jnp.asarray(
            normal(i, B, T, H, D) if name[0] == "q" else normal(i, B, past + T, K, D), jnp.bfloat16
        )
        for i, name in enumerate(names)
    }


def reference_results(op: Any, arrays: dict[str, jax.Array], **keywords: Any) -> dict[str, Any]:
    """`results` on the CPU, where nothing is rounded to TF32 and compiling takes no minutes."""
    with jax.default_device(jax.devices("cpu")[0]):
        here, options = (
            {name: np.asarray(x) if isinstance(x, jax.Array) else x for name, x in given.items()}
            for given in (arrays, keywords)
        )
        return results(op, here, **options)


def results(op: Any, arrays: dict[str, Any], **keywords: Any) -> dict[str, np.ndarray]:
    """Output and gradients of op(*arrays, **keywords), the cotangent a function of the shape."""

    @jax.jit
    def run(arrays):
        o, pull = jax.vjp(lambda arrays: op(**arrays, **keywords), arrays)
        do = jnp.asarray(normal(9, *o.shape), jnp.bfloat16).astype(o.dtype)
        return {"o": o} | {f"d{name}": x for name, x in pull(do)[0].items()}

    return jax.tree.map(lambda x: np.asarray(x, np.float32), run(arrays))


def assert_equals_reference(
    ours: Any, theirs: Any, arrays: dict[str, jax.Array], interpret: bool = True, **keywords: Any
) -> dict[str, np.ndarray]:
    """The kernels and float32 agree, row by row, in everything. Returns what the kernels gave."""
    keywords = {"offset": None, "segment_ids": None, "lengths": None} | keywords
    keywords["scale"] = arrays["q"].shape[-1] ** -0.5
    actual = results(partial(ours, interpret=interpret), arrays, **keywords)
    exact = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    for name, rows in reference_results(theirs, exact, **keywords).items():
        for row, expected in enumerate(rows):
            if np.any(expected):
                error = rel(actual[name][row], expected)
                assert error < BOUND, f"{name}, row {row}: {error:.1e}"
            else:
                assert np.max(np.abs(actual[name][row])) < 1e-6, f"{name}, row {row}: not zero"
    return actual


def check_two(arrays: dict[str, jax.Array], **keywords: Any) -> dict[str, np.ndarray]:
    fixed: dict[str, Any] = {} if "q_fading" in arrays else {"q_fading": None}
    return assert_equals_reference(TWO_OURS, TWO_EXACT, arrays, **fixed, **keywords)


def check_one(arrays: dict[str, jax.Array], **keywords: Any) -> dict[str, np.ndarray]:
    keywords = {"window": None, "past": None} | keywords
    return assert_equals_reference(ONE_OURS, ONE_EXACT, arrays, **keywords)


def packed(B: int, T: int) -> jax.Array:
    """Documents of many lengths, padding before, between, inside and after them."""
    ids = np.ones((B, T), np.int32)
    ids[:, :2] = 0
    ids[:, T // 5 : T // 5 + 3] = 0
    ids[0, T // 3 :] = 2
    ids[:, T // 2 : T // 2 + 9] = 3
    ids[-1, T - T // 7 :] = 0
    return jnp.asarray(ids)


def with_nan(arrays: dict[str, jax.Array], valid: jax.Array) -> dict[str, jax.Array]:
    """NaN wherever `valid` [B, S] is not true."""
    return {n: jnp.where(valid[:, :, None, None], x, jnp.nan) for n, x in arrays.items()}


# -- two windows ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "window", "T", "options"),
    [
        (TWO[:-1], 40, 128, {"H": 4, "K": 2}),
        (TWO, 64, 200, {"H": 1}),
        (TWO, 64, 260, {"H": 6, "K": 2}),
        (TWO[:-1], 1, 129, {"D": 128, "B": 2}),
        (TWO, 128, 700, {"H": 4, "K": 2}),
        (TWO[:-1], 192, 512, {"D": 128}),
        (TWO, 300, 150, {}),
    ],
)
def test_two_windows(names, window, T, options):
    """Tied and untied; shorter and longer than tiles; rows longer and shorter than the window."""
    check_two(draw(names, T=T, **options), window=window)


@pytest.mark.parametrize(
    ("names", "window", "B", "T"),
    [(TWO[:-1], 30, 1, 150), pytest.param(TWO, 100, 2, 650, marks=pytest.mark.slow)],
)
def test_two_windows_of_packed_documents(names, window, B, T):
    """Nothing that padding holds counts, and no gradient reaches it."""
    ids = packed(B, T)
    got = check_two(with_nan(draw(names, B=B, T=T, H=B), ids != 0), window=window, segment_ids=ids)
    assert all(not np.any(x[np.asarray(ids) == 0]) for x in got.values())


ON_GPU_TOO = pytest.mark.parametrize(
    "interpret", [True, pytest.param(False, marks=pytest.mark.gpu, id="gpu")]
)


@ON_GPU_TOO
def test_two_windows_continue_a_sequence(interpret):
    """Older tokens lie in front of new ones, as many as each window needs; some are empty."""
    T, window, offset = 70, 65, jnp.asarray([40, 900])
    queries = draw(("q", "q_fading"), B=2, T=T, H=1)
    keys = {}
    for names, past in ((("q", "k", "v"), window - 1), (("q", "k_fading", "v_fading"), 140)):
        own = draw(names, B=2, T=T, past=past)
        del own["q"]
        filled = jnp.arange(past + T) >= jnp.maximum(past - offset, 0)[:, None]
        keys |= with_nan(own, filled)
    check_continued(
        TWO_OURS,
        TWO_EXACT,
        queries | keys,
        interpret,
        offset=offset,
        window=window,
    )


def check_continued(
    ours: Any, theirs: Any, arrays: dict[str, jax.Array], interpret: bool, **keywords: Any
) -> None:
    """The kernels, given NaN in empty entries, agree with float32, given zeros."""
    keywords |= {"segment_ids": None, "lengths": None, "scale": 0.125}
    got = results(partial(ours, interpret=interpret), arrays, **keywords)
    exact = {n: jnp.nan_to_num(x).astype(jnp.float32) for n, x in arrays.items()}
    for name, expected in reference_results(theirs, exact, **keywords).items():
        assert rel(got[name], expected) < BOUND, name


# -- one key set ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ({"T": 200, "H": 1}, {}),
        pytest.param({"T": 400, "H": 6, "K": 2}, {}, marks=pytest.mark.slow),
        pytest.param({"T": 400, "D": 128}, {"window": 200}, marks=pytest.mark.slow),
        pytest.param({"T": 1, "B": 2}, {}, marks=pytest.mark.slow),
        pytest.param({"T": 128, "H": 8, "K": 4}, {"window": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"T": 300, "B": 2}, {"lengths": jnp.asarray([20, 290])}, marks=pytest.mark.slow
        ),
        pytest.param({"T": 700}, {"segment_ids": packed(1, 700)}, marks=pytest.mark.slow),
    ],
)
def test_causal_attention(options, keywords):
    check_one(draw(ONE, **options), **keywords)


@ON_GPU_TOO
@pytest.mark.parametrize("window", [None, pytest.param(100, marks=pytest.mark.slow)])
def test_queries_continue_a_cache(window, interpret):
    """Entry j is token j; entries that are not written yet may hold anything."""
    T, S, offset = 40, 200, jnp.asarray([13, 150])
    q = draw(("q",), B=2, T=T, H=1)
    keys = draw(ONE, B=2, T=S)
    del keys["q"]
    keys = with_nan(keys, jnp.arange(S) < (offset + T)[:, None])
    keywords = {"offset": offset, "window": window, "past": None}
    check_continued(ONE_OURS, ONE_EXACT, q | keys, interpret, **keywords)


def test_log_sum_exp():
    """Natural, over all key sets; queries of padding alone: zero output, infinity."""
    T = 2 * TILE
    arrays = draw(TWO[:-1], T=T, H=1)
    q, k, v, k_fading, v_fading = arrays.values()
    options = Options(((50, 99), (0, 49)), T, 0.125, interpret=True)
    doc = jnp.asarray(np.arange(T) < TILE, jnp.int32)[None]
    places = jnp.zeros((2, 1, 2), jnp.int32)
    o, lse = mosaic.forward(options, (q,), (k_fading, k), (v_fading, v), places, doc)
    assert not np.any(o[:, TILE:]) and np.all(np.isposinf(lse[:, :, TILE:]))
    i, j = np.mgrid[:TILE, :TILE]
    scores = [
        np.where(
            (i - j >= newest) & (i - j <= oldest),
            0.125 * np.einsum("ihd,jd->hij", *(np.asarray(x[0, :TILE], float) for x in pair)),
            -np.inf,
        )
        for (newest, oldest), pair in zip(
            options.windows, ((q, k_fading[:, :, 0]), (q, k[:, :, 0])), strict=True
        )
    ]
    want = np.logaddexp.reduce(np.concatenate(scores, -1), -1)
    np.testing.assert_allclose(np.asarray(lse)[0, :, :TILE], want, atol=1e-3)


# -- which tiles are visited ----------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    length=st.integers(1, 60),
    past=st.integers(0, 50),
    offset=st.integers(0, 60),
    window=st.none() | st.integers(1, 70),
    newest=st.integers(0, 30),
    starts=st.none() | st.lists(st.integers(0, 3), min_size=60, max_size=60),
    by_key=st.booleans(),
)
def test_every_visible_pair_is_visited(length, past, offset, window, newest, starts, by_key):
    """And tiles that are said to need no mask need none."""
    size, total, entries = 16, 64, 112
    continued = starts is None
    if not continued:
        past, entries = 0, total
    first = max(past - offset, 0) if continued else 0
    oldest = mosaic.FAR if window is None else newest + window - 1
    doc = None
    ids = np.ones(total, int)
    if not continued:
        segment_ids = jnp.asarray([np.asarray(starts[:length])])
        real = document_ids(segment_ids, None, length)
        assert real is not None
        doc = jnp.pad(real, [(0, 0), (0, total - length)]).astype(jnp.int32)
        ids = np.asarray(doc)[0]
    i, j = np.arange(total)[:, None], np.arange(entries)
    distance = past + i - j
    visible = (distance >= newest) & (distance <= oldest) & (j >= first)
    needed = visible & (i < length)
    if not continued:
        visible = visible & (ids[:, None] == ids)
        needed = visible & (ids[:, None] != 0)
    options = Options(((newest, oldest),), length, 1.0, interpret=True)
    places = jnp.asarray([[[past, first]]], jnp.int32)
    q, k = jnp.zeros((1, total, 1, 1)), jnp.zeros((1, entries, 1, 1))
    spans = spans_of(options, q, (k,), places, doc, size, size, by_key=by_key)
    tiles = visible.reshape(total // size, size, entries // size, size).swapaxes(1, 2)
    pairs = needed.reshape(tiles.shape[0], size, tiles.shape[1], size).swapaxes(1, 2)
    if by_key:
        tiles, pairs = tiles.swapaxes(0, 1), pairs.swapaxes(0, 1)
    for row, (begin, end, full_begin, full_end) in enumerate(np.asarray(spans)[0, 0]):
        number = np.arange(tiles.shape[1])
        assert 0 <= begin <= end <= len(number)
        visited = (number >= begin) & (number < end)
        full = visited & (number >= full_begin) & (number < full_end)
        assert np.all(visited | ~pairs[row].any((-1, -2)))
        assert np.all(~full | tiles[row].all((-1, -2)))


def test_interior_tiles_need_no_mask():
    """A window of 8 tiles: 9 are visited, 7 of them as a whole; 7 of 8 while the row is young."""
    T, window = 32 * TILE, 8 * TILE
    q = k = jnp.zeros((1, T, 1, 1))
    options = Options(((0, window - 1), (window, 2 * window - 1)), T, 1.0, interpret=True)
    places = jnp.zeros((2, 1, 2), jnp.int32)
    here, fading = np.asarray(spans_of(options, q, (k, k), places, None, TILE, TILE))[:, 0]
    assert here[7].tolist() == [0, 8, 0, 7]
    assert here[20].tolist() == [12, 21, 13, 20] and fading[20].tolist() == [4, 13, 5, 12]
    assert fading[7].tolist()[:2] == [0, 0]


# -- lowering, errors, GPU ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "keywords", "backward"),
    [
        (TWO, {"window": 2048}, ["dq", "dq", "dkv", "dkv"]),
        (TWO[:-1], {"window": 2048, "packed": True}, ["dq", "dkv", "dkv"]),
        (ONE, {}, ["dq", "dkv"]),
    ],
)
def test_lowers_for_cuda(names, keywords, backward):
    """From a CPU host; tied weights share one pass for dq, keys and values are never repeated."""
    shapes = {
        n: jax.ShapeDtypeStruct((1, 8192, 32 if n[0] == "q" else 8, 128), jnp.bfloat16)
        for n in names
    }
    ids = packed(1, 8192) if keywords.pop("packed", False) else None
    fixed = dict(offset=None, segment_ids=ids, lengths=None, scale=0.1) | keywords
    if names == ONE:
        op = partial(ONE_OURS, window=None, past=None, **fixed)
    else:
        op = partial(TWO_OURS, **fixed)
        op = partial(op, q_fading=None) if names == TWO[:-1] else op

    def gradients(arrays):
        o, pull = jax.vjp(lambda arrays: op(**arrays), arrays)
        return pull(o)

    text = jax.jit(gradients).trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    found = [re.findall(r"\\00attention_([a-z]+)", call)[0] for call in calls]
    assert sorted(found) == sorted(["forward", *backward])
    assert all("tensor<1x8192x8x128xbf16>" in call.rpartition(" : ")[2] for call in calls)


def test_errors_say_what_is_wrong():
    keywords: dict[str, Any] = dict(
        offset=None, segment_ids=None, lengths=None, window=None, past=None
    )
    arrays = draw(ONE, T=4)
    with pytest.raises(ValueError, match="positive scale, got -1"):
        ONE_OURS(**arrays, scale=-1.0, **keywords)
    with pytest.raises(ValueError, match="head_dim 64 and 128, got 32"):
        ONE_OURS(**draw(ONE, T=4, D=32), scale=1.0, **keywords)
    exact = arrays | {"v": arrays["v"].astype(jnp.float32)}
    with pytest.raises(ValueError, match="take bfloat16, got bfloat16, bfloat16, float32"):
        ONE_OURS(**exact, scale=1.0, **keywords)


@pytest.mark.slow
def test_no_races(monkeypatch):
    """The interpreter's race detector follows every copy, barrier and product."""
    params = partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", params)
    check_two(draw(TWO, T=400), window=90)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("names", [TWO, TWO[:-1]])
def test_two_windows_on_gpu(names, D):
    arrays = draw(names, B=2, T=1500, H=8, K=2, D=D)
    check_two(arrays, window=256, interpret=False)
    ids = packed(2, 1500)
    check_two(with_nan(arrays, ids != 0), window=256, segment_ids=ids, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "ids"), [(None, None), (512, None), (None, packed(2, 2000))])
def test_causal_attention_on_gpu(window, ids):
    arrays = draw(ONE, B=2, T=2000, H=8, K=2, D=128)
    check_one(arrays, window=window, segment_ids=ids, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("group", "D"), [(1, 64), (3, 64), (3, 128), (5, 128), (6, 64), (7, 64), (7, 128), (16, 128)]
)
def test_head_groups_on_gpu(group, D):
    """Query heads per key/value head: any number, not only powers of two."""
    shape: Any = dict(B=2, H=2 * group, K=2, D=D)
    check_one(draw(ONE, T=700, **shape), window=200, interpret=False)
    past = dict(past=333, offset=jnp.array([333, 20]))
    check_one(draw(ONE, T=300, **shape, past=333), **past, interpret=False)
    check_two(draw(TWO, T=700, **shape), window=128, interpret=False)


@pytest.mark.gpu
def test_gradients_repeat_on_gpu():
    """No sum depends on which CTA is first: the same bits every time."""
    arrays = draw(TWO[:-1], B=2, T=4133, H=8, K=2, D=128)
    keywords: dict[str, Any] = dict(offset=None, segment_ids=None, lengths=None, q_fading=None)
    op = partial(TWO_OURS, window=512, scale=0.1)
    first, second = (results(op, arrays, **keywords) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)
