"""GKA with solver="cg": 20 steps do what 30 Chebyshev steps do, whatever the keys.

Solves are read off the operator: a token with a zero key, whose states are H and the identity,
returns x itself. See docs/num_iter.md.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmf_jax.pallas_kernels import gka, gka_step
from tests.kernels.recurrent_laws import unit
from tests.kernels.test_gka import exact, inputs
from tests.util import rel

RIDGE, D = 0.02, 64


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def families(T: int = 192) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Keys [T, D] and log-decays [T] that are hard in different ways."""
    rng = np.random.default_rng(0)
    draw = rng.standard_normal
    g = -0.02 * np.abs(draw(T))
    powers = np.arange(1, D + 1)
    wave = (np.arange(D) + 0.5) * np.pi / (2 * D)
    cases = {
        "random": draw((T, D)),
        "near-orthogonal": np.tile(np.eye(D), (T // D, 1)) + 0.02 * draw((T, D)),
        "common direction": unit(draw((T, D))) + 1.5 * unit(draw(D)),
        "one key": np.tile(draw(D), (T, 1)),
        "four keys": np.tile(draw((4, D)), (T // 4, 1)),
        "rank 8": draw((T, 8)) @ draw((8, D)),
        "power law": draw((T, D)) / powers,
        "power law, slow": draw((T, D)) / powers**0.5,
        "geometric": draw((T, D)) * 0.9**powers,
        "spectrum dense at both ends": draw((T, D)) * np.cos(wave),
    }
    keys = {name: (unit(k), g) for name, k in cases.items()}
    k = unit(draw((T, D)))
    keys["tiny"] = k * 1e-6, g
    keys["huge"] = k * 1e6, g
    keys["norms from 1e-3 to 1e3"] = k * np.exp(2.3 * draw((T, 1))), g
    keys["half are zero"] = k * (rng.random((T, 1)) < 0.5), g
    keys["extreme decay"] = k, np.where(rng.random(T) < 0.1, -30.0, -2.0)
    return keys


def systems(k: np.ndarray, g: np.ndarray, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(H [N, D, D], q [N, D]) at some of the tokens, with a random query and one near a key."""
    rng, h, found = np.random.default_rng(seed), np.zeros((D, D)), []
    for t, (k_t, g_t) in enumerate(zip(k, g, strict=True)):
        h = np.exp(g_t) * h + np.outer(k_t, k_t)
        if h.any() and t in (0, 1, 2, 5, 20, len(k) // 2, len(k) - 1):
            near = k_t / max(np.linalg.norm(k_t), 1e-30) + 0.3 * unit(rng.standard_normal(D))
            found += [(h, unit(rng.standard_normal(D))), (h, unit(near))]
    return tuple(np.stack(x) for x in zip(*found, strict=True))  # type: ignore[return-value]


def hardest(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The system on which n steps of cg do worst, as far as we know: eigenvalues at the extrema
    of the Chebyshev polynomial T_n, as large as the Frobenius norm (here 1) allows."""
    angle = np.pi * np.arange(n + 1) / n
    e, q = np.zeros(D), np.zeros(D)
    e[: n + 1] = np.sqrt(8 / (3 * n + 4)) * (1 + np.cos(angle)) / 2
    q[: n + 1] = np.where((angle == 0) | (angle == np.pi), 0.5**0.5, 1)
    basis = np.linalg.qr(np.random.default_rng(2).standard_normal((D, D)))[0]
    return ((basis * e) @ basis.T)[None], unit(basis @ q)[None]


def solve(h, q, num_iter, solver, dtype: jax.typing.DTypeLike = jnp.float64) -> np.ndarray:
    """x [N, D] after num_iter steps from H [N, D, D] and q [N, D]."""
    h, q = (jnp.asarray(x, dtype)[:, None] for x in (h, q))
    state = (h, jnp.broadcast_to(jnp.eye(D, dtype=dtype), h.shape))
    none = jnp.zeros_like(q)
    options = {"num_iter": num_iter, "ridge": RIDGE, "scale": 1.0, "solver": solver}
    x, _ = jit_step(q, none, none, None, None, None, state, **options)
    return np.asarray(x[:, 0], np.float64)


jit_step = jax.jit(partial(gka_step, impl="chunked"), static_argnames=("ridge", "scale", "solver"))


def errors(h, q, x) -> tuple[np.ndarray, np.ndarray]:
    """Relative errors [N] of solutions x: ||x - x*|| / ||x*||, and the same in the energy norm
    (d^T (H + lambda I) d)^1/2, which cg minimises."""
    a = h + RIDGE * np.linalg.norm(h, axis=(1, 2), keepdims=True) * np.eye(D)
    solution = np.linalg.solve(a, q[..., None])[..., 0]
    difference = x - solution
    norm = lambda d: np.linalg.norm(d, axis=-1)  # noqa: E731
    energy = lambda d: np.einsum("nd,nde,ne->n", d, a, d) ** 0.5  # noqa: E731
    return norm(difference) / norm(solution), energy(difference) / energy(solution)


def chebyshev_t(n: int, x: float) -> float:
    return float(np.cosh(n * np.arccosh(x)))


def bound(n: int) -> float:
    """Upper bound of cg's relative energy error after n steps, for any positive semidefinite H.

    ||H||_F^2 is the sum of the squared eigenvalues, so at most m of them are above ||H||_F divided
    by sqrt(m + 1). Of n steps m can remove those; n - m work on an interval shorter by sqrt(m + 1).
    """
    return min(1 / chebyshev_t(n - m, 1 + 2 * RIDGE * (m + 1) ** 0.5) for m in range(n + 1))


@pytest.fixture(scope="module")
def hard_systems() -> tuple[np.ndarray, np.ndarray]:
    found = [systems(*case) for case in families().values()] + [hardest(n) for n in (10, 20, 30)]
    h, q = (np.concatenate(x) for x in zip(*found, strict=True))
    return h, q


@pytest.mark.usefixtures("x64")
def test_20_steps_are_as_accurate_as_30_of_chebyshev(hard_systems):
    h, q = hard_systems
    plain, cg = (errors(h, q, solve(h, q, n, s))[0] for n, s in [(30, "chebyshev"), (20, "cg")])
    assert 3e-4 < plain.max() < 3.3e-4  # what 30 steps promise, and what they mostly do
    assert (cg <= plain).all()
    assert cg.max() < 2.1e-4
    assert np.median(cg) < 1e-5


@pytest.mark.usefixtures("x64")
def test_error_is_below_the_bound_and_below_chebyshev(hard_systems):
    """In the energy norm: n + 1 products with H beat any polynomial, Chebyshev's among them."""
    h, q = hard_systems
    for n in (1, 3, 8, 15, 25):
        _, plain = errors(h, q, solve(h, q, n, "chebyshev"))
        _, cg = errors(h, q, solve(h, q, n + 1, "cg"))
        assert (cg < plain * (1 + 1e-6) + 1e-12).all()
        assert (cg < bound(n + 1) + 1e-12).all()
    assert bound(25) < 1 / chebyshev_t(31, 1 + 2 * RIDGE) < bound(24)  # 31: Chebyshev's degree


@pytest.mark.usefixtures("x64")
def test_hardest_system():
    """Its error is known in closed form; this is where 20 steps come closest to failing."""
    for n in (5, 12, 20):
        h, q = hardest(n)
        assert abs(np.linalg.norm(h) - 1) < 1e-12
        _, energy = errors(h, q, solve(h, q, n, "cg"))
        expected = 1 / chebyshev_t(n, 1 + 2 * RIDGE * ((3 * n + 4) / 8) ** 0.5)
        assert abs(energy[0] / expected - 1) < 1e-6
        assert expected < bound(n)
        assert errors(h, q, solve(h, q, n + 1, "cg"))[1] < 1e-10  # n + 1 distinct eigenvalues


@settings(max_examples=30, deadline=None)
@given(
    exponents=st.lists(st.floats(-12, 0), min_size=1, max_size=D),
    weights=st.lists(st.floats(-6, 0), min_size=D, max_size=D),
)
def test_20_steps_whatever_the_spectrum(exponents, weights):
    """Eigenvalues and the query's components, over many orders of magnitude."""
    with jax.enable_x64(True):
        e = np.zeros(D)
        e[: len(exponents)] = 10.0 ** np.asarray(exponents)
        h, q = np.diag(e)[None], unit(10.0 ** np.asarray(weights))[None]
        norm, energy = errors(h, q, solve(h, q, 20, "cg"))
    assert norm[0] < 2.1e-4
    assert energy[0] < 1.7e-4


def test_float32(hard_systems):
    """Rounding costs no more than Chebyshev's, and steps after convergence do no harm."""
    h, q = hard_systems
    # Not above 1e-2, where the operator's own q + alpha (x - q) would round off a small x.
    size = np.logspace(-12, -2, len(h)) / np.linalg.norm(h, axis=(1, 2))
    h = h * size[:, None, None]
    h = np.asarray(h, np.float32).astype(np.float64)
    q = np.asarray(q, np.float32).astype(np.float64)
    for n, limit in [(20, 2.1e-4), (100, 3e-6)]:
        assert errors(h, q, solve(h, q, n, "cg", jnp.float32))[0].max() < limit
    assert errors(h, q, solve(h, q, 100, "chebyshev", jnp.float32))[0].max() < 3e-6


def test_size_of_the_right_hand_side_does_not_matter():
    """Squares of small cotangents would vanish in float32: cg is given a scaled one."""
    arrays, states = inputs(B=1, T=9)

    @jax.jit
    def gradient(size):
        def loss(q, k):
            o, _ = gka(q, k, *arrays[2:], initial_state=states, solver="cg", impl="chunked")
            return size * jnp.sum(o)

        return jax.grad(loss, argnums=(0, 1))(*arrays[:2])

    for a, b in zip(gradient(2.0**-70), gradient(1.0), strict=True):
        assert rel(a * 2.0**70, b) < 1e-6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("decay_kk", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_chunked_equals_reference(decay_kk):
    """Before convergence, with a count per row, padding and two documents."""
    arrays, state = inputs(B=4, D=12, dtype=jnp.float64)
    segment_ids = jnp.asarray([[1] * 21, [1] * 9 + [2] * 12, [0] * 4 + [1] * 17, [3] * 20 + [0]])
    run = partial(
        gka,
        num_iter=np.asarray([0, 1, 4, 9]),
        ridge=0.05,
        scale=1.3,
        decay_kk=decay_kk,
        initial_state=state,
        segment_ids=segment_ids,
        chunk_size=8,
        solver="cg",
    )
    chunked, reference = (jax.jit(partial(run, impl=i))(*arrays) for i in ("chunked", "reference"))
    for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(reference), strict=True):
        assert rel(a, b) < 1e-11
    plain = jax.jit(partial(run, solver="chebyshev"))(*arrays)
    assert rel(chunked[0], plain[0]) > 1e-3
    for a, b in zip(chunked[1], plain[1], strict=True):
        np.testing.assert_array_equal(a, b)  # states do not depend on the solver


@pytest.mark.usefixtures("x64")
def test_steps_continue_a_prefill():
    arrays, state = inputs(T=12, dtype=jnp.float64)
    options = {"num_iter": 3, "solver": "cg"}
    o, final = jax.jit(partial(gka, **options, chunk_size=4))(*arrays, initial_state=state)
    first, state = jax.jit(partial(gka, **options, chunk_size=4))(
        *(x[:, :10] for x in arrays), initial_state=state
    )
    assert rel(first, o[:, :10]) < 1e-12
    for t in (10, 11):
        o_t, state = jax.jit(partial(gka_step, **options))(*(x[:, t] for x in arrays), state)
        assert rel(o_t, o[:, t]) < 1e-12
    for a, b in zip(state, final, strict=True):
        assert rel(a, b) < 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("impl", ["chunked", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bp_lambda", [True, False])
def test_gradient_is_that_of_the_exact_solve(impl, bp_lambda):
    arrays, states = inputs(B=2, T=11, H=2, K=2, D=4, dtype=jnp.float64)

    def loss(op):
        def run(arrays, states):
            o, (h, u) = op(arrays, states)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(h) * u)

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1)))

    def direct(arrays, states):
        return exact(*arrays, *states, starts=np.zeros(11, bool), decay_kk=1, bp_lambda=bp_lambda)

    def solved(arrays, states):
        options = {"bp_lambda": bp_lambda, "chunk_size": 4, "impl": impl, "solver": "cg"}
        return gka(*arrays, initial_state=states, **options)

    for a, b in zip(
        jax.tree.leaves(loss(solved)(arrays, states)),
        jax.tree.leaves(loss(direct)(arrays, states)),
        strict=True,
    ):
        assert rel(a, b) < 1e-10


@pytest.mark.parametrize("impl", ["chunked", pytest.param("reference", marks=pytest.mark.slow)])
def test_zero_covariance_solves_to_zero(impl):
    """x = 0 where H is 0; no NaN forward or backward, for zero queries and repeated keys too."""
    (q, k, v, alpha, g, beta), _ = inputs(T=9)
    k = jnp.broadcast_to(k[:, 5:6], k.shape).at[:, :5].set(0)
    q = q.at[:, 7].set(0)

    def run(q, k, v, alpha, g, beta):
        o, final = gka(q, k, v, alpha, g, beta, solver="cg", chunk_size=4, impl=impl)
        return jnp.sum(o), (o, final)

    grads, (o, final) = jax.jit(jax.grad(run, argnums=range(6), has_aux=True))(
        q, k, v, alpha, g, beta
    )
    np.testing.assert_array_equal(o[:, :5], 0)
    np.testing.assert_array_equal(o[:, 7], 0)
    assert np.abs(np.asarray(o)[:, [5, 6, 8]]).min() > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((o, final, grads)))


def test_bad_options():
    arrays, state = inputs(T=2)
    with pytest.raises(ValueError, match="solver='gmres' is unknown"):
        gka(*arrays, solver="gmres")
    with pytest.raises(ValueError, match="'cg' needs ridge > 0"):
        gka(*arrays, initial_state=state, solver="cg", ridge=0.0)
    for num_iter in (-1, 1001, 2**31, [1, 2**31]):  # 2^31 is negative as int32
        with pytest.raises(ValueError, match="expected integers from 0 to 1000"):
            gka(*arrays, num_iter=np.array(num_iter))
