"""Attention of rows whose keys and values lie in pages: as of buffers, wherever the pages lie."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.pallas_kernels import PageTable, decode_attention, gka_step, paged_decode_attention
from hmf_jax.pallas_kernels.ops.attention import cudnn
from tests.kernels.test_attention import dense_pass
from tests.util import mesh_of, rel

B, H, K, D, PAGE, M, P = 4, 4, 2, 8, 4, 3, 16
LENGTHS: Any = np.array([0, 12, 5, 4], np.int32)


def buffers() -> Any:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((B, H, D), np.float32)
    k, v = rng.standard_normal((2, B, M * PAGE, K, D), np.float32)
    return q, k, v


def table_of(order: np.ndarray) -> Any:
    """Row b has the pages order[b] as far as it has tokens."""
    return np.where(PAGE * np.arange(M) < LENGTHS[:, None], order, P).astype(np.int32)


def pools(k: np.ndarray, v: np.ndarray, table: np.ndarray, rubbish: float) -> list[Any]:
    """The buffers in pages; everything that no row has is rubbish."""
    made = []
    for x in (k, v):
        pool = np.full((P, PAGE, K, D), rubbish, np.float32)
        for b, m in np.ndindex(B, M):
            count = min(max(LENGTHS[b] - m * PAGE, 0), PAGE)
            if table[b, m] < P:
                pool[table[b, m], :count] = x[b, m * PAGE : m * PAGE + count]
        made.append(pool)
    return made


@pytest.mark.parametrize("impl", ["chunked", "reference", "cudnn"])
def test_equals_decoding_from_buffers(monkeypatch, impl):
    """Of pages in any order; "cudnn" with a stand-in that returns NaN for pages of length 0."""
    monkeypatch.setattr(cudnn, "why_not", lambda *args: None)
    monkeypatch.setattr(cudnn, "with_lse", dense_pass)
    q, k, v = buffers()
    table = table_of(np.random.default_rng(1).permutation(P)[: B * M].reshape(B, M))
    rubbish = 7.0 if impl == "cudnn" else np.nan

    @jax.jit
    def run(q, k, v, table):
        return paged_decode_attention(q, k, v, PageTable.of(table, P, PAGE), LENGTHS, impl=impl)

    found = run(q, *pools(k, v, table, rubbish), table)
    exact = decode_attention(q, k, v, jnp.asarray(LENGTHS), impl="reference")
    assert rel(found, exact) < 1e-6 and not np.asarray(found[0]).any()


@pytest.mark.parametrize("sizes", [dict(tp=2), dict(dp=2, tp=2)], ids=["tp2", "dp2-tp2"])
def test_a_mesh(monkeypatch, sizes):
    """Rows 0 and 1 have their pages in the first half, where the mesh splits both."""
    monkeypatch.setattr(cudnn, "why_not", lambda *args: None)
    monkeypatch.setattr(cudnn, "with_lse", dense_pass)
    q, k, v = buffers()
    order = np.random.default_rng(2).permutation(P // 2)[:6].reshape(2, M)
    table = table_of(np.concatenate([order, P // 2 + order]))
    mesh, pages = mesh_of(sizes), PageTable.of(table, P, PAGE)
    exact = decode_attention(q, k, v, jnp.asarray(LENGTHS), impl="reference")
    for impl in ("chunked", "cudnn"):
        arrays = q, *pools(k, v, table, 7.0), pages, jnp.asarray(LENGTHS)
        run = jax.jit(lambda *a, impl=impl: paged_decode_attention(*a, impl=impl, mesh=mesh))
        assert rel(run(*arrays), exact) < 1e-6


def test_a_table_writes_and_reads():
    table: Any = np.array([[2, 0], [3, P]], np.int32)
    pages = PageTable.of(table, P, PAGE)
    assert pages.owner[:5].tolist() == [0, 2, 0, 1, 2]
    assert pages.first[:4].tolist() == [4, 0, 0, 0]
    pool = jnp.zeros((P, PAGE, 1, 1))
    slots: Any = np.array([[3, 4, -1], [0, 4, 99]])  # the last two of row 1 have no page
    values: Any = np.arange(1.0, 7.0).reshape(2, 3, 1, 1)
    pool = pages.write(pool, slots, values)
    assert pool[2, 3] == 1 and pool[0, 0] == 2 and pool[3, 0] == 4 and jnp.sum(pool) == 7
    rows = pages.read(pool, jnp.array([5, 1]))[..., 0, 0]
    assert rows.tolist() == [[0, 0, 0, 1, 2, 0, 0, 0], [4, 0, 0, 0, 0, 0, 0, 0]]


def test_what_does_not_fit_is_refused():
    q, k, v = buffers()
    pool: Any = np.zeros((P, PAGE, K, D), np.float32)
    pages = PageTable.of(table_of(np.zeros((B, M), int)), P, PAGE)
    with pytest.raises(ValueError, match="table of 4 rows and 8 pages"):
        paged_decode_attention(q, pool[:8], pool[:8], pages, LENGTHS)
    with pytest.raises(ValueError, match="lengths must hold one integer per row"):
        paged_decode_attention(q, pool, pool, pages, LENGTHS[:2])
    with pytest.raises(ValueError, match="15 pages"):
        few = PageTable.of(table_of(np.zeros((B, M), int)), 15, PAGE)
        mesh = mesh_of(dict(dp=2))
        paged_decode_attention(q, pool[:15], pool[:15], few, LENGTHS, mesh=mesh)


def test_rows_that_are_not_active_keep_their_state():
    rng: Any = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 2, 4), np.float32)
    gates: Any = (np.full((2, 2), x, np.float32) for x in (0.5, -0.1, 0.7))
    alpha, g, beta = gates
    state: Any = tuple(
        np.stack([np.eye(4, dtype=np.float32)] * 2)[None].repeat(2, 0) for _ in range(2)
    )
    active: Any = np.array([False, True])
    k[0] = np.nan
    step = jax.jit(partial(gka_step, impl="chunked"))
    o, new = step(q, k, v, alpha, g, beta, state, active=active)
    q, k, v, alpha, g, beta = (x[1:] for x in (q, k, v, alpha, g, beta))
    exact, wanted = step(q, k, v, alpha, g, beta, tuple(x[1:] for x in state))
    for old, x, y in zip(state, new, wanted, strict=True):
        np.testing.assert_array_equal(x[0], old[0])
        np.testing.assert_allclose(x[1], y[0], rtol=1e-6)
    np.testing.assert_allclose(o[1], exact[0], rtol=1e-5)
    with pytest.raises(ValueError, match="without slots"):
        gka_step(q, k, v, alpha, g, beta, state, active=active[1:], slots=jnp.arange(1))


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "dim"), [(4, 128), (1, 64), (8, 256)])
def test_cudnn_equals_reference(group, dim):
    rng, page = np.random.default_rng(0), 64
    counts: Any = np.array([0, 1, 150, 192], np.int32)
    q = jnp.asarray(rng.standard_normal((4, 2 * group, dim)), jnp.bfloat16)
    k, v = jnp.asarray(rng.standard_normal((2, P, page, 2, dim)), jnp.bfloat16)
    order = np.random.default_rng(1).permutation(P)[: B * M].reshape(B, M)
    pages = PageTable.of(jnp.asarray(order), P, page)
    run = partial(paged_decode_attention, pages=pages, lengths=counts)
    exact = run(*(x.astype(jnp.float32) for x in (q, k, v)), impl="reference")
    assert rel(run(q, k, v, impl="cudnn"), exact) < 1e-2
