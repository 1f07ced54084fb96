"""GKA: laws, the worked example, the implicit gradient, num_iter at run time, golden tensors."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from hmf_jax.pallas_kernels import gka, gka_step
from tests.goldens import golden
from tests.kernels.recurrent_laws import RecurrentLaws, normal, unit
from tests.util import rel

# Enough for the truncated iteration (the reference's gradient) to be the exact solve in float64.
CONVERGED = 140


def op(*, initial_state, **kwargs):
    """`gka` with its two states stacked on a last axis, as the laws want one array."""
    if initial_state is not None:
        initial_state = (initial_state[..., 0], initial_state[..., 1])
    o, states = gka(initial_state=initial_state, num_iter=CONVERGED, **kwargs)
    return o, jnp.stack(states, axis=-1)


def step(*, state, **kwargs):
    o, states = gka_step(state=(state[..., 0], state[..., 1]), num_iter=CONVERGED, **kwargs)
    return o, jnp.stack(states, axis=-1)


def draw(rng, B, T, H, K, D=6):
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    arrays = {
        "q": unit(normal(rng, B, T, H, D)),
        "k": unit(normal(rng, B, T, K, D)),
        "v": normal(rng, B, T, K, D),
        "alpha": sigmoid(normal(rng, B, T, H)),
        "g": -np.abs(normal(rng, B, T, H)) * 0.3,
        "beta": sigmoid(normal(rng, B, T, H)) + 1e-6,
    }
    root = normal(rng, B, H, D, D)
    states = (root @ root.swapaxes(-1, -2) / D, normal(rng, B, H, D, D))
    return arrays, np.stack(states, axis=-1)


def inputs(B=2, T=21, H=4, K=2, D=6, seed=0, dtype: jax.typing.DTypeLike = jnp.float32):
    """Arrays in gka's order and a pair of states."""
    arrays, states = draw(np.random.default_rng(seed), B, T, H, K, D)
    arrays = tuple(jnp.asarray(x, dtype) for x in arrays.values())
    return arrays, (jnp.asarray(states[..., 0], dtype), jnp.asarray(states[..., 1], dtype))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("x64")
class TestGKA(RecurrentLaws):
    """In float64: the solver amplifies rounding, and laws should not hide behind tolerances."""

    per_token = ("q", "k", "v", "alpha", "g", "beta")
    op = op
    step = step

    def draw(self, rng, B, T, H, K):
        return draw(rng, B, T, H, K)

    def arguments(self, B=2, T=37, H=4, K=2, seed=0, dtype=jnp.float64):
        return super().arguments(B, T, H, K, seed, dtype)

    def test_named_implementation_never_falls_back(self):
        arrays, state = self.arguments(T=3)
        with pytest.raises(ValueError, match="unknown"):
            self.run(arrays, state, impl="fast")
        with pytest.raises(ValueError, match="has no implementation"):
            self.run(arrays, state, impl="cudnn")

    @pytest.mark.parametrize("decay_kk", [True, False])
    def test_truncated_iteration_equals_reference(self, decay_kk):
        arrays, state = inputs(B=3, dtype=jnp.float64)
        options = {
            "num_iter": np.asarray([1, 2, 7]),
            "ridge": 0.05,
            "scale": 1.3,
            "decay_kk": decay_kk,
        }
        run = partial(gka, **options, initial_state=state, chunk_size=8)
        chunked, reference = (
            jax.jit(partial(run, impl=i))(*arrays) for i in ("chunked", "reference")
        )
        for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(reference), strict=True):
            assert rel(a, b) < 1e-12


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("num_iter", "expected"),
    [
        (30, [(0.19907, 0.398139), (0.26395, 0.946326), (0.037655, -0.772416)]),
        (1, [(0.091754, 0.183507), (0.392137, 0.726639), (-0.000285, -0.87109)]),
        (0, [(0.106066, 0.212132), (-0.198921, 0.461292), (0.058167, -0.40339)]),
    ],
)
def test_worked_example(x64, impl, num_iter, expected):
    """Three tokens, one head of two dimensions, worked out by hand from the equations."""
    q = jnp.asarray([(1, 0), (0.6, 0.8), (0, 1)], jnp.float64)[None, :, None]
    k = jnp.asarray([(0.6, 0.8), (1, 0), (0.8, -0.6)], jnp.float64)[None, :, None]
    v = jnp.asarray([(1, 2), (-1, 0.5), (0.25, 3)], jnp.float64)[None, :, None]
    alpha, g, beta = (
        jnp.asarray(x, jnp.float64)[None, :, None]
        for x in [(0.3, 0.6, 0.9), (-0.1, -0.2, -0.05), (0.5, 0.9, 0.7)]
    )
    run = jax.jit(partial(gka, num_iter=num_iter, chunk_size=2, impl=impl))
    o, (h_kk, h_kv) = run(q, k, v, alpha, g, beta)
    np.testing.assert_allclose(o[0, :, 0], expected, atol=1e-6)
    expected = [[1.154188, -0.141744], [-0.141744, 0.301008]]
    np.testing.assert_allclose(h_kk[0, 0], expected, atol=1e-6)
    expected = [[-0.555676, 1.794888], [0.08226, -0.57048]]
    np.testing.assert_allclose(h_kv[0, 0], expected, atol=1e-6)


def exact(q, k, v, alpha, g, beta, h, u, *, starts, decay_kk, bp_lambda, ridge=0.02):
    """GKA with a direct solve, one head per key head; autodiff of it is the exact gradient."""
    D = q.shape[-1]

    def token(carry, inputs):
        q, k, v, alpha, g, beta, start = inputs
        h, u = (jnp.where(start, 0, s) for s in carry)
        k, v = beta[..., None] * k, beta[..., None] * v
        decay = jnp.exp(g)[..., None, None]
        h = (decay if decay_kk else 1) * h + k[..., None] * k[..., None, :]
        u = decay * u + k[..., None] * v[..., None, :]
        f = jnp.linalg.norm(h, axis=(-2, -1), keepdims=True)
        f = f if bp_lambda else jax.lax.stop_gradient(f)
        x = jnp.linalg.solve(h + ridge * f * jnp.eye(D), q[..., None])[..., 0]
        blend = q + alpha[..., None] * (x - q)
        return (h, u), D**-0.5 * jnp.einsum("bhd,bhde->bhe", blend, u)

    tokens = tuple(x.swapaxes(0, 1) for x in (q, k, v, alpha, g, beta))
    states, o = jax.lax.scan(token, (h, u), (*tokens, jnp.asarray(starts)))
    return o.swapaxes(0, 1), states


@pytest.mark.parametrize(
    ("bp_lambda", "decay_kk"), [(1, 1), (0, 1), pytest.param(1, 0, marks=pytest.mark.slow)]
)
def test_gradient_is_that_of_the_exact_solve(x64, bp_lambda, decay_kk):
    """Every input, both initial states and lambda through them, across chunks and documents."""
    arrays, states = inputs(B=2, T=11, H=2, K=2, D=4, dtype=jnp.float64)
    segment_ids = np.asarray([[1] * 6 + [2] * 5] * 2)
    rng = np.random.default_rng(1)
    d_o = jnp.asarray(normal(rng, *arrays[0].shape))
    d_h, d_u = (jnp.asarray(normal(rng, *s.shape)) for s in states)

    def loss(op):
        def run(arrays, states):
            o, (h, u) = op(arrays, states)
            return jnp.sum(o * d_o) + jnp.sum(h * d_h) + jnp.sum(u * d_u)

        return jax.value_and_grad(run, argnums=(0, 1))

    def direct(arrays, states):
        starts = np.diff(segment_ids[0], prepend=1) != 0
        return exact(*arrays, *states, starts=starts, decay_kk=decay_kk, bp_lambda=bp_lambda)

    def chunked(arrays, states):
        return gka(
            *arrays,
            num_iter=CONVERGED,
            decay_kk=decay_kk,
            bp_lambda=bp_lambda,
            initial_state=states,
            segment_ids=jnp.asarray(segment_ids),
            chunk_size=4,
            impl="chunked",
        )

    value, expected = jax.jit(loss(direct))(arrays, states)
    actual_value, actual = jax.jit(loss(chunked))(arrays, states)
    assert abs(actual_value - value) < 1e-10 * abs(value)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert rel(a, b) < 1e-10


def test_lambda_carries_gradient_into_the_initial_covariance(x64):
    """bp_lambda matters for h_kk: dropping lambda's path there is a known flaw of other codes."""
    arrays, states = inputs(T=5, dtype=jnp.float64)

    def loss(h_kk, bp_lambda=True):
        state = (h_kk, states[1])
        return jnp.sum(gka(*arrays, num_iter=40, bp_lambda=bp_lambda, initial_state=state)[0])

    value = jax.jit(loss)
    with_lambda = jax.jit(jax.grad(loss))(states[0])
    without = jax.jit(jax.grad(partial(loss, bp_lambda=False)))(states[0])
    assert rel(without, with_lambda) > 0.01
    eps = 1e-5
    slope = (value(states[0] * (1 + eps)) - value(states[0] * (1 - eps))) / (2 * eps)
    assert abs(jnp.sum(with_lambda * states[0]) - slope) < 1e-4 * abs(slope)


def test_num_iter_per_row_at_run_time():
    """One compilation serves every count; each row gets its own; 0 leaves query and alpha alone."""
    arrays, states = inputs(B=3)
    traces = []

    @jax.jit
    def run(arrays, num_iter):
        traces.append(None)

        def loss(arrays):
            o, final = gka(*arrays, num_iter=num_iter, initial_state=states, chunk_size=8)
            return jnp.sum(o**2), (o, final)

        return jax.grad(loss, has_aux=True)(arrays)

    grads, (o, (h_kk, h_kv)) = run(arrays, np.asarray([0, 3, 12], np.int32))
    for row, num_iter in enumerate((0, 3, 12)):
        grads_row, (o_row, final_row) = run(arrays, np.full(3, num_iter, np.int32))
        np.testing.assert_array_equal(o[row], o_row[row])
        np.testing.assert_array_equal(h_kk[row], final_row[0][row])  # whatever num_iter
        np.testing.assert_array_equal(h_kv[row], final_row[1][row])
        for a, b in zip(grads, grads_row, strict=True):
            np.testing.assert_array_equal(a[row], b[row])
    assert len(traces) == 1
    assert not grads[3][0].any() and grads[3][1].any()

    for counts in (3, np.asarray([0, 3, 12])):
        apply = partial(gka, num_iter=counts, initial_state=states, chunk_size=8)
        assert rel(jax.jit(apply)(*arrays)[0][1], o[1]) < 1e-5
    assert rel(jax.jit(partial(apply, impl="reference"))(*arrays)[0], o) < 1e-5


def test_zero_iterations_is_gated_linear_attention(x64):
    (q, k, v, alpha, g, beta), (h_kk, h_kv) = inputs(B=1, T=9, H=1, K=1, dtype=jnp.float64)
    run = jax.jit(partial(gka, num_iter=0, chunk_size=4))
    o, (h, u) = run(q, k, v, alpha, g, beta, initial_state=(h_kk, h_kv))
    decay = jnp.exp(g[0, :, 0].cumsum())
    weight = jnp.tril(decay[:, None] / decay)
    k, v = beta[0] * k[0, :, 0], beta[0] * v[0, :, 0]
    expected = decay[:, None] * (q[0, :, 0] @ h_kv[0, 0]) + (weight * (q[0, :, 0] @ k.T)) @ v
    assert rel(o[0, :, 0], expected / 6**0.5) < 1e-12
    assert rel(h[0, 0], decay[-1] * h_kk[0, 0] + (weight[-1, :, None] * k).T @ k) < 1e-12
    assert rel(u[0, 0], decay[-1] * h_kv[0, 0] + (weight[-1, :, None] * k).T @ v) < 1e-12


@pytest.mark.parametrize("impl", ["chunked", pytest.param("reference", marks=pytest.mark.slow)])
def test_zero_covariance_solves_to_zero(impl):
    """x = 0 where H is 0, without a NaN forward or backward, until the first key that is not 0."""
    (q, k, v, alpha, _, beta), (_, h_kv) = inputs(T=9)
    k = k.at[:, :5].set(0)
    state = (jnp.zeros_like(h_kv), h_kv)

    def run(q, k, v, alpha, beta, state):
        o, final = gka(
            q, k, v, alpha, None, beta, initial_state=state, num_iter=9, chunk_size=4, impl=impl
        )
        return jnp.sum(o), (o, final)

    run = jax.jit(jax.grad(run, argnums=range(6), has_aux=True))
    grads, (o, final) = run(q, k, v, alpha, beta, state)
    blend = (1 - alpha[..., None]) * q
    expected = jnp.einsum("bthd,bhde->bthe", blend[:, :5], h_kv) / 6**0.5
    assert rel(o[:, :5], expected) < 1e-6
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((o, final, grads)))


def test_left_out_gates():
    """alpha, beta default to 1 and g to no decay; beta scales k and v of each query head."""
    (q, k, v, alpha, g, beta), _ = inputs()
    ones, zeros = jnp.ones_like(alpha), jnp.zeros_like(g)
    run = jax.jit(gka)
    np.testing.assert_array_equal(run(q, k, v)[0], run(q, k, v, ones, zeros, ones)[0])
    wide_k, wide_v = (jnp.repeat(x, 2, axis=2) * beta[..., None] for x in (k, v))
    o, state = run(q, k, v, alpha, g, beta)
    scaled, scaled_state = run(q, wide_k, wide_v, alpha, g)
    assert rel(o, scaled) < 1e-6
    assert rel(state[0], scaled_state[0]) < 1e-6


def test_float32_is_accurate():
    """float32 against the float64 oracle where chunks, decay and the solver all matter."""
    arrays, states = inputs(B=1, T=300, H=2, K=1, D=32)
    o, final = jax.jit(gka)(*arrays, initial_state=states)
    with jax.enable_x64(True):
        arrays, states = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (arrays, states))
        o_ref, final_ref = jax.jit(partial(gka, impl="reference"))(*arrays, initial_state=states)
    assert rel(o, o_ref) < 1e-5
    for a, b in zip(final, final_ref, strict=True):
        assert rel(a, b) < 1e-6


def test_step_does_not_depend_on_the_default_precision():
    arrays, states = inputs(T=1)
    for precision in ("bfloat16", "highest"):
        with jax.default_matmul_precision(precision):
            text = str(jax.make_jaxpr(gka_step)(*(x[:, 0] for x in arrays), states))
        assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST,") > 0


def test_bad_options():
    arrays, states = inputs(T=2)
    for num_iter, problem in {
        -1: "from 0 to 1000",
        2.5: "float64",
        (1, 2, 3): r"\(2,\)",
        (1, -2): "from 0 to 1000",
    }.items():
        with pytest.raises(ValueError, match=f"num_iter.*{problem}"):
            gka(*arrays, num_iter=num_iter)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ridge=-0.1"):
        gka(*arrays, ridge=-0.1)
    with pytest.raises(ValueError, match="h_kv has shape"):
        gka(*arrays, initial_state=(states[0], states[1][:1]))
    with pytest.raises(ValueError, match="use gka for sequences"):
        gka_step(*arrays, state=states)
    with pytest.raises(ValueError, match="3 key/value heads"):
        gka(arrays[0], *(jnp.ones((2, 2, 3, 6)),) * 2)


@partial(jax.jit, static_argnames=("decay_kk", "bp_lambda"))
def value_and_gradients(arrays, do, num_iter, *, decay_kk=True, bp_lambda=True):
    def loss(*arrays):
        o, state = gka(
            *arrays, num_iter=num_iter, decay_kk=decay_kk, bp_lambda=bp_lambda, impl="chunked"
        )
        return jnp.sum(o * do), (o, state)

    return jax.grad(loss, argnums=range(5), has_aux=True)(*arrays)


@pytest.mark.parametrize(
    ("prefix", "num_iter", "options"),
    [
        ("g30", 30, {}),
        pytest.param("g5", 5, {}, marks=pytest.mark.slow),
        pytest.param("g0", 0, {}, marks=pytest.mark.slow),
        pytest.param("g30_nobp", 30, {"bp_lambda": False}, marks=pytest.mark.slow),
        pytest.param("nogk30", 30, {"decay_kk": False}, marks=pytest.mark.slow),
        ("nogk30_nobp", 30, {"decay_kk": False, "bp_lambda": False}),
    ],
)
def test_golden(prefix, num_iter, options):
    case = load_file(golden("op_gka") / "expected.safetensors")
    case = {name: jnp.asarray(x, jnp.float32) for name, x in case.items()}
    names = ("q", "k", "v", "alpha", "g")
    arrays = tuple(case[name] for name in names)
    grads, (o, (h_kk, h_kv)) = value_and_gradients(arrays, case["do"], num_iter, **options)
    actual = {"o": o, "h_kk": h_kk, "h_kv": h_kv}
    actual |= {f"d{name}": g for name, g in zip(names, grads, strict=True)}
    recorded = {n.split(".")[1]: x for n, x in case.items() if n.startswith(f"{prefix}.")}
    assert {"dk", "dg"} <= recorded.keys() <= actual.keys()
    for name, expected in recorded.items():
        assert rel(actual[name][: len(expected)], expected) < 2e-5, name
