"""GKA's Triton kernels against NumPy in float64, token by token; impl "triton" against "chunked".

With jax-triton installed they run on any machine in Triton's interpreter (float32, slowly), and
are compiled for compute capabilities 8.0 and 9.0; on an NVIDIA GPU they really run.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from hmf_jax.pallas_kernels import gka, gka_step
from hmf_jax.pallas_kernels import triton as shared
from hmf_jax.pallas_kernels.ops.gka import triton, triton_decode, triton_solver
from hmf_jax.pallas_kernels.ops.gka.inputs import Inputs, Options, Token
from tests.kernels.recurrent_laws import normal, unit
from tests.util import rel

RIDGE = 0.02
Case = dict[str, Any]
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(shared.MISSING is not None, reason=str(shared.MISSING))


class Memory:
    """A numpy array, as Triton's interpreter wants tensors."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, str(array.dtype)

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    new_empty = set_ = lambda self, *_, **__: self
    storage_offset = size = stride = copy_ = lambda self, *_: None


def interpret(*args, kernel, out_shape, grid, input_output_aliases=None, **options):
    """`jax_triton.triton_call` in Triton's interpreter."""
    options = {n: x for n, x in options.items() if n not in ("name", "num_warps", "num_stages")}
    arrays = [np.array(x) if isinstance(x, jax.Array | np.ndarray) else x for x in args]
    out = [np.full(x.shape, np.nan, x.dtype) for x in jax.tree.leaves(out_shape)]
    for i, o in (input_output_aliases or {}).items():
        out[o] = arrays[i]
    memory = [Memory(x) if isinstance(x, np.ndarray) else x for x in (*arrays, *out)]
    with np.errstate(all="ignore"):
        kernel[grid](*memory, **options)
    return jax.tree.unflatten(jax.tree.structure(out_shape), [jnp.asarray(x) for x in out])


@pytest.fixture
def interpreter(monkeypatch):
    if not INTERPRET:
        pytest.skip("test_in_the_interpreter runs this one")
    monkeypatch.setattr(triton_solver, "triton_call", interpret)
    monkeypatch.setattr(triton_decode, "triton_call", interpret)
    from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

    def patch(tensor, scope, plain=interpreter._patch_lang_tensor):
        plain(tensor, scope)  # its int(array of one element) is an error since NumPy 2.5
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


@needs_triton
@pytest.mark.skipif(INTERPRET, reason="already there")
def test_in_the_interpreter():
    """Triton's interpreter must be chosen before triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "interpreted", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-4000:]


def draw(B=3, T=200, H=4, K=2, D=32, seed=0, dtype: Any = np.float32, docs=True) -> Case:
    """Arguments of `states` and `solve` with what is hard: zero keys from a zero state, beta 0,
    strong decay, documents of many lengths. Floats of `dtype`, or float32 where only that goes."""
    rng = np.random.default_rng(seed)
    q, k = unit(normal(rng, B, T, H, D)), unit(normal(rng, B, T, K, D))
    g = -np.abs(normal(rng, B, T, H)) * 0.1
    beta = 1 / (1 + np.exp(-normal(rng, B, T, H)))
    root = normal(rng, B, H, D, D)
    initial = root @ root.swapaxes(-1, -2) / D
    g[:, 20:22], g[:, 100:101] = -40, -300
    beta[:, 30:34] = 0
    k[-1, :9], initial[-1], k[0, 66:70] = 0, 0, 0
    doc = np.zeros((B, T), np.int32)
    for start in (3, 40, 64, 150):
        doc[1:2, start:] += 1
    return {
        "q": jnp.asarray(q, dtype),
        "k": jnp.asarray(k, dtype),
        "v": jnp.asarray(normal(rng, B, T, K, D), dtype),
        "g": jnp.asarray(g, jnp.float32),
        "beta": jnp.asarray(beta, jnp.float32),
        "doc": jnp.asarray(doc) if docs else None,
        "initial": jnp.asarray(initial, jnp.float32),
        "num_iter": jnp.asarray(np.resize([30, 7, 1], B), jnp.int32),
    }


def prepared(case: Case) -> tuple[Any, Any, Any, Any]:
    """cum, start, beta, doc as the kernels take them."""
    B, T, H = case["g"].shape
    g = np.asarray(case["g"], np.float64)
    doc = np.zeros((B, T), int) if case["doc"] is None else np.asarray(case["doc"])
    cum, start = np.zeros((B, T, H)), np.zeros((B, T, H))
    for t in range(T):
        first = t % triton_solver.CHUNK == 0
        carried = 0 if t < triton_solver.CHUNK else doc[:, t - t % triton_solver.CHUNK - 1]
        again = np.asarray(first | (doc[:, t] != doc[:, t - 1]))
        cum[:, t] = g[:, t] + np.where(again.reshape(-1, 1), 0, cum[:, t - 1])
        start[:, t] = np.where((doc[:, t] == carried)[:, None], np.exp(cum[:, t]), 0)
    as32 = partial(jnp.asarray, dtype=jnp.float32)
    return as32(cum), as32(start), case["beta"], case["doc"]


def chebyshev(h, b, num_iter):
    """(x, f) of (H + RIDGE f) x = b, f = ||H||_F, for h [B, ..., D, D], b [B, ..., D]."""
    f = np.linalg.norm(h, axis=(-2, -1))[..., None]
    with np.errstate(all="ignore"):
        h = h / f[..., None]
        step, contraction = 2 / (1 + 2 * RIDGE), (0.5 / (1 + 2 * RIDGE)) ** 2
        z, z_prev, omega = step * b, 0 * b, 2.0
        for n in range(int(max(num_iter))):
            omega = 1 / (1 - contraction * omega)
            residual = np.einsum("...ij,...j->...i", h, z) + RIDGE * z - b
            new = omega * (z - step * residual) - (omega - 1) * z_prev
            on = (n < num_iter).reshape(-1, *[1] * (z.ndim - 1))
            z, z_prev = np.where(on, new, z), z
        return np.where(f > 0, z / f, 0), f[..., 0]


def expected(case: Case, u="k", states: Any = None):
    """States, last state, norms and solution in float64, token by token.

    With `states`, those are what the chunks start from.
    """
    case = {n: x if x is None else np.asarray(x).astype(np.float64) for n, x in case.items()}
    T, H = case["q"].shape[1:3]
    k, u = (
        np.repeat(case[n], H // case[n].shape[2], 2) * case["beta"][..., None] for n in ("k", u)
    )
    doc = np.zeros(k.shape[:2]) if case["doc"] is None else case["doc"]
    now, made, xs, fs = case["initial"], [], [], []
    for t in range(T):
        if t % triton_solver.CHUNK == 0:
            made.append(now)
            now = (
                now
                if states is None
                else np.asarray(states, np.float64)[:, :, t // triton_solver.CHUNK]
            )
        same = doc[:, t] == (doc[:, t - 1] if t else 0)
        decay = np.exp(case["g"][:, t]) * same[:, None]
        now = decay[..., None, None] * now + k[:, t, :, :, None] * u[:, t, :, None, :]
        x, f = chebyshev(now, case["q"][:, t], case["num_iter"])
        xs.append(x)
        fs.append(f)
    return np.stack(made, 2), now, np.stack(fs, 1), np.stack(xs, 1)


def check_states_and_solve(case: Case, jit: Any = jax.jit, state_error=1e-5, solve_error=1e-4):
    args = prepared(case)
    low = case["q"].dtype
    for u in "kv":
        run = jit(partial(triton_solver.states, dtype=jnp.float32))
        states, final = run(case["k"], case[u], *args, case["initial"])
        right = expected(case, u)
        assert rel(states, right[0]) < state_error and rel(final, right[1]) < state_error
        assert states.dtype == final.dtype == jnp.float32
    run = jit(partial(triton_solver.states, dtype=low))
    states, _ = run(case["k"], case["k"], *args, case["initial"])
    _, _, f_right, x_right = expected(case, states=states.astype(jnp.float32))
    run = jit(partial(triton_solver.solve, ridge=RIDGE))
    x, f = run(case["q"], case["k"], *args, states, case["num_iter"], None)
    assert x.dtype == low and f.dtype == jnp.float32
    assert rel(f, f_right) < 1e-5
    np.testing.assert_allclose(f, f_right, rtol=1e-4)
    for row in range(len(x)):
        assert rel(x[row], x_right[row]) < solve_error
    if x.shape[1] > 9 and case["doc"] is None:
        assert not x[-1, :9].any() and x[-1, 9].all()  # zero keys
    again, same_f = run(case["q"], case["k"], *args, states, case["num_iter"], f)
    np.testing.assert_array_equal(again, x)
    np.testing.assert_array_equal(same_f, f)
    return x, x_right


def decode_case(B=5, S=7, H=4, K=2, D=32, seed=0, dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(seed)
    root = normal(rng, S, H, D, D) * np.exp(normal(rng, D))
    arrays = (
        jnp.asarray(unit(normal(rng, B, H, D)), dtype),
        jnp.asarray(unit(normal(rng, B, K, D)), dtype),
        jnp.asarray(normal(rng, B, K, D), dtype),
        *(jnp.asarray(x, jnp.float32) for x in rng.random((3, B, H)) * [[[1]], [[-0.3]], [[1]]]),
    )
    num_iter = jnp.asarray(np.resize([30, 0, 9, 3, 1], B), jnp.int32)
    slots = rng.permutation(S)[:B].astype(np.int32)
    states = (jnp.asarray(root @ root.swapaxes(-1, -2) / D), jnp.asarray(normal(rng, S, H, D, D)))
    return arrays, num_iter, slots, tuple(x.astype(jnp.float32) for x in states)


def decode(*arrays, **options):
    return triton_decode.decode(Token(*arrays), Options(**options))


def check_decode(case, jit: Any = jax.jit, decay_kk=True, o_error=1e-5):
    arrays, num_iter, slots, states = case
    slots[1] = -3  # inactive
    states = (states[0].at[int(slots[0])].set(0), states[1])
    beta = arrays[5].at[0, 0].set(0)  # a covariance that stays zero
    arrays = (*arrays[:5], beta)
    options = dict(ridge=RIDGE, scale=0.3, decay_kk=decay_kk)
    run = jit(partial(decode, **options))
    o, new = run(*arrays, num_iter, jnp.asarray(slots), *states)
    active = np.flatnonzero(slots >= 0)
    q, k, v, alpha, g, beta = (np.asarray(x).astype(np.float64)[active] for x in arrays)
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) * beta[..., None] for x in (k, v))
    h, u = (np.asarray(x, np.float64)[slots[active]] for x in states)
    decay = np.exp(g)[..., None, None]
    h = (decay if decay_kk else 1) * h + k[..., :, None] * k[..., None, :]
    u = decay * u + k[..., :, None] * v[..., None, :]
    num_iter = np.asarray(num_iter)[active]
    solution = alpha[..., None] * (chebyshev(h, q, num_iter)[0] - q)
    blend = np.where(num_iter[:, None, None] > 0, q + solution, q)
    o_right = options["scale"] * np.einsum("bhd,bhde->bhe", blend, u)
    assert o.dtype == arrays[2].dtype and not o[1].any()
    assert rel(o[active].astype(jnp.float32), o_right) < o_error
    untouched = np.setdiff1d(np.arange(len(states[0])), slots)
    for a, b, old in zip(new, (h, u), states, strict=True):
        assert rel(a[slots[active]], b) < 1e-6
        np.testing.assert_array_equal(a[untouched], old[untouched])


def test_why_not(monkeypatch):
    shared.why_no_triton.cache_clear()

    def why_not(dtypes=(jnp.float32,) * 3, D=64, solver="chebyshev", state: Any = jnp.float32):
        q, k, v = (jax.ShapeDtypeStruct((2, 9, 4, D), dtype) for dtype in dtypes)
        h = jax.ShapeDtypeStruct((2, 4, D, D), state)
        inputs: Any = Inputs(q, k, v, *[None] * 5, h, h)  # type: ignore[arg-type]
        return triton.why_not(inputs, solver) or ""

    low, full = (jnp.bfloat16,) * 3, (jnp.float32,) * 3
    if jax.default_backend() != "gpu":
        assert "jax-triton" in why_not() or "NVIDIA" in why_not()
    monkeypatch.setattr(triton, "why_no_triton", lambda: "no device")
    assert why_not() == "no device"
    monkeypatch.setattr(triton, "why_no_triton", lambda: None)
    assert not why_not(low, 128) and not why_not(full, 64)
    assert "bfloat16, float32" in why_not((*low[:2], *full[:1]))
    assert "float16" in why_not((jnp.float16,) * 3)
    assert "head dims" in why_not(low, 96)
    assert "float32 states" in why_not(low, state=jnp.bfloat16)
    assert "not 'cg'" in why_not(solver="cg")
    monkeypatch.setattr(triton, "compute_capability", lambda: "8.6")
    assert "shared memory" in why_not(full, 128)
    assert not why_not(full, 64) and not why_not(low, 128)


def operator_case(T=65, D=32, dtype: Any = np.float32, B=3) -> Any:
    """q, k, v, alpha, g, beta; two states; segment ids with padding and documents; num_iter."""
    case = draw(B=B, T=T, D=D, dtype=dtype, seed=T)
    if dtype == jnp.bfloat16:  # gradients of the only key in H are mostly rounding
        case["initial"] = case["initial"].at[-1].set(case["initial"][0])
        case["g"] = jnp.maximum(case["g"], -1)
    rng = np.random.default_rng(T + 1)
    alpha = jnp.asarray(rng.random(case["g"].shape), jnp.float32)
    arrays = (case["q"], case["k"], case["v"], alpha, case["g"], case["beta"])
    states = (case["initial"], jnp.asarray(normal(rng, *case["initial"].shape), jnp.float32))
    segments = np.asarray(case["doc"]) + 1
    segments[0, T // 2 : T // 2 + 3] = segments[1, -(T // 5) : T] = 0
    return arrays, states, jnp.asarray(segments), jnp.asarray([12, 0, 30][:B], jnp.int32)


def check_operator(case, jit: Any = jax.jit, error=1e-4, gradient_error=1e-4, **options):
    """Outputs and all gradients against "chunked" in float64, row by row."""
    arrays, states, segments, num_iter = case
    low = arrays[0].dtype
    rng = np.random.default_rng(0)
    weights = [normal(rng, *x.shape) for x in (arrays[0], *states)]

    def run(impl, arrays, states):
        o, new = gka(
            *arrays,
            num_iter=num_iter,
            initial_state=states,
            segment_ids=segments,
            impl=impl,
            **options,
        )
        return sum(jnp.sum(x * w) for x, w in zip((o, *new), weights, strict=True)), (o, *new)

    def gradient(impl):
        return jit(jax.grad(partial(run, impl), argnums=(0, 1), has_aux=True))

    with jax.default_matmul_precision("highest"):
        grads, out = gradient("triton")(arrays, states)
    assert [x.dtype for x in out] == [low, jnp.float32, jnp.float32]
    assert [x.dtype for x in grads[0]] == [x.dtype for x in arrays]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), (arrays, states))
        grads64, out64 = jax.jit(jax.grad(partial(run, "chunked"), argnums=(0, 1), has_aux=True))(
            *wide
        )
    names = ("o", "h_kk", "h_kv", "q", "k", "v", "alpha", "g", "beta", "d_h_kk", "d_h_kv")
    pairs = zip(
        names, (*out, *grads[0], *grads[1]), (*out64, *grads64[0], *grads64[1]), strict=True
    )
    for name, a, b in pairs:
        limit = error if name in names[:3] else gradient_error
        for row in range(len(a)):
            assert rel(a[row].astype(jnp.float32), b[row]) < limit, (name, row)


def check_step(case, jit: Any = jax.jit, error=1e-5, gradient_error=1e-4, **options):
    """`gka_step` on slots, two of them outside, its gradients, and without slots."""
    arrays, num_iter, slots, states = case
    slots[1], slots[3] = len(states[0]), -1
    rng = np.random.default_rng(0)
    weights = [normal(rng, *x.shape) for x in (arrays[0], *states)]

    def run(impl, slots, arrays, states):
        o, new = gka_step(
            *arrays, state=states, slots=slots, num_iter=num_iter, impl=impl, **options
        )
        return o, *new

    def loss(impl, arrays, states):
        out = run(impl, jnp.asarray(slots), arrays, states)
        return sum(jnp.sum(x * w) for x, w in zip(out, weights, strict=True)), out

    def gradient(impl):
        return jax.grad(partial(loss, impl), argnums=(0, 1), has_aux=True)

    def as64(fn, *args):
        with jax.enable_x64(True):
            return jax.jit(fn)(*jax.tree.map(lambda x: x.astype(jnp.float64), args))

    grads, out = jit(gradient("triton"))(arrays, states)
    grads64, out64 = as64(gradient("chunked"), arrays, states)
    assert out[0].dtype == arrays[2].dtype and not out[0][np.asarray([1, 3])].any()
    for a, b in zip(out, out64, strict=True):
        assert rel(a.astype(jnp.float32), b) < error
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads64), strict=True):
        assert a.dtype in (jnp.float32, arrays[0].dtype)
        assert rel(a.astype(jnp.float32), b) < gradient_error
    untouched = np.setdiff1d(np.arange(len(states[0])), slots)
    for a, b in zip(out[1:], states, strict=True):
        np.testing.assert_array_equal(a[untouched], b[untouched])
    args = arrays, tuple(x[: len(slots)] for x in states)
    out, out64 = (
        jit(partial(run, "triton", None))(*args),
        as64(partial(run, "chunked", None), *args),
    )
    assert rel(out[0].astype(jnp.float32), out64[0]) < error


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="it may run there")
def test_refused_without_a_gpu():
    arrays, states, *_ = operator_case(T=1)
    reason = r"pip install hmf-jax\[triton\]" if shared.MISSING else "NVIDIA GPU"
    with pytest.raises(ValueError, match=f"gka cannot run impl='triton' here.*{reason}"):
        gka(*arrays, initial_state=states, impl="triton")
    with pytest.raises(ValueError, match=f"gka_step cannot run impl='triton' here.*{reason}"):
        gka_step(*(x[:, 0] for x in arrays), state=states, impl="triton")
    with pytest.raises(ValueError, match="Chebyshev solver, not 'cg'"):
        gka(*arrays, solver="cg", impl="triton")


def test_auto_prefers_it_to_chunked(monkeypatch):
    ran = []

    def operator(inputs, options):
        ran.append(inputs.q.shape)
        return inputs.q, (inputs.h_kk, inputs.h_kv)

    monkeypatch.setattr(triton, "why_no_triton", lambda: None)
    monkeypatch.setattr(triton, "gka_triton", operator)
    monkeypatch.setattr(triton_decode, "gka_decode", operator)
    arrays, states, *_ = operator_case(T=1)
    gka(*arrays, initial_state=states)
    gka_step(*(x[:, 0] for x in arrays), state=states)
    assert ran == [(3, 1, 4, 32), (3, 4, 32)]
    gka(*arrays, initial_state=states, solver="cg")
    gka(*arrays, initial_state=states, impl="chunked")
    assert len(ran) == 2


@needs_triton
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("T", "docs"), [(1, False), (64, False), (65, True), (200, True)])
def test_interpreted_states_and_solve(T, docs):
    check_states_and_solve(draw(B=2 if docs else 3, T=T, docs=docs), jit=lambda f: f)


@needs_triton
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("decay_kk", [True, False])
def test_interpreted_decode(decay_kk):
    check_decode(decode_case(), jit=lambda f: f, decay_kk=decay_kk)


@needs_triton
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("T", "options"),
    [
        (1, {}),
        (65, {"bp_lambda": False}),
        (130, {"decay_kk": False, "ridge": 0.05, "scale": 1.3}),
    ],
)
def test_interpreted_operator(monkeypatch, T, options):
    monkeypatch.setattr(triton, "why_no_triton", lambda: None)
    check_operator(operator_case(T), jit=lambda f: f, **options)


@needs_triton
@pytest.mark.usefixtures("interpreter")
def test_interpreted_lengths(monkeypatch):
    """The same as segment ids of ones and zeros; rows of length 0 and T."""
    monkeypatch.setattr(triton, "why_no_triton", lambda: None)
    arrays, states, _, num_iter = operator_case(T=65)
    lengths = jnp.asarray([0, 65, 9], jnp.int32)
    ids = jnp.asarray(np.arange(65) < np.asarray(lengths)[:, None], jnp.int32)
    run = partial(gka, *arrays, num_iter=num_iter, initial_state=states, impl="triton")
    got, expected = run(lengths=lengths), run(segment_ids=ids)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.asarray(got[0])[np.asarray(ids) == 0].any()


@needs_triton
@pytest.mark.usefixtures("interpreter")
def test_interpreted_step(monkeypatch):
    monkeypatch.setattr(triton, "why_no_triton", lambda: None)
    check_step(decode_case(), jit=lambda f: f, decay_kk=False, ridge=0.05, scale=1.3)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("D", triton.HEAD_DIMS)
def test_compiles_without_a_gpu(monkeypatch, capability, dtype, D):
    import jax_triton  # pyright: ignore[reportMissingImports]

    library = jax_triton.triton_lib.triton_kernel_call_lib
    monkeypatch.setattr(library, "get_compute_capability", lambda device: capability)
    case = draw(B=1, T=65, H=2, K=1, D=D, dtype=dtype)
    args = prepared(case)

    def run(case: Case, args: tuple[Any, Any, Any, Any]):
        states, final = triton_solver.states(
            case["k"], case["k"], *args, case["initial"], dtype=dtype
        )
        x, f = triton_solver.solve(
            case["q"], case["k"], *args, states, case["num_iter"], None, ridge=RIDGE
        )
        return x, f, final

    arrays, num_iter, slots, states = decode_case(B=2, D=D, dtype=dtype)
    step = partial(decode, ridge=RIDGE, scale=1.0, decay_kk=True)
    step: Any = jax.jit(step, donate_argnums=(8, 9))
    names = ("gka_states", "gka_norm", "gka_solve", "gka_decode")
    programs = [(jax.jit(run), (case, args)), (step, (*arrays, num_iter, slots, *states))]
    texts = [f.trace(*a).lower(lowering_platforms=("cuda",)).as_text() for f, a in programs]
    assert "".join(texts).count("triton_kernel_call") == len(names)
    assert texts[1].count("output_operand_alias") >= 2  # the states stay where they are


@needs_triton
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradient_compiles_without_a_gpu(monkeypatch, dtype):
    import jax_triton  # pyright: ignore[reportMissingImports]

    library = jax_triton.triton_lib.triton_kernel_call_lib
    monkeypatch.setattr(library, "get_compute_capability", lambda device: 80)
    monkeypatch.setattr(triton, "why_no_triton", lambda: None)
    arrays, states, segments, num_iter = operator_case(dtype=dtype)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def run(arrays, states):
        o, new = gka(
            *arrays, initial_state=states, segment_ids=segments, num_iter=num_iter, impl="triton"
        )
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in (o, *new))

    text = run.trace(arrays, states).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call") == 5  # both states, norms, solve; solve in reverse
    assert not re.search(r"dot_general.*bf16", text)  # sums of gradients are float32


@needs_triton
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (simulated) devices")
def test_shard_map_splits_heads_without_collectives(monkeypatch):
    import jax_triton  # pyright: ignore[reportMissingImports]

    library = jax_triton.triton_lib.triton_kernel_call_lib
    monkeypatch.setattr(library, "get_compute_capability", lambda device: 80)
    monkeypatch.setattr(triton, "why_no_triton", lambda: None)
    shape = (2, 1, 2, 2)
    devices = np.asarray(jax.devices()[: math.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, ("dp", "fsdp", "tp", "rep"))
    case = draw(B=2, T=65, H=8, K=2)
    states = (case["initial"],) * 2

    @jax.jit
    def run(q, k, v, g, states):
        o, states = gka(q, k, v, None, g, initial_state=states, impl="triton", mesh=mesh)
        token = (q[:, 0], k[:, 0], v[:, 0], None, g[:, 0], None)
        one, states = gka_step(*token, state=states, impl="triton", mesh=mesh)
        return o, one, states

    traced = run.trace(case["q"], case["k"], case["v"], case["g"], states)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "triton_kernel_call" in line]
    assert len(calls) == 5  # both states, norms, solve, decode
    assert all("tensor<1x2x" in line for line in calls)  # rows over dp, heads over tp and rep
    assert not re.search(r"stablehlo\.(all_|collective)", text)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("T", [1, 63, 65, 200])
@pytest.mark.parametrize(
    ("D", "dtype"), [(d, t) for d in triton.HEAD_DIMS for t in (jnp.float32, jnp.bfloat16)]
)
def test_operator(T, D, dtype):
    errors = (3e-2, 4e-2) if dtype == jnp.bfloat16 else (1e-4, 5e-4)
    case = operator_case(T, D, dtype)
    check_operator(case, error=errors[0], gradient_error=errors[1])


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("options", [{"decay_kk": False}, {"bp_lambda": False, "scale": 1.3}])
def test_operator_options(options):
    check_operator(operator_case(), gradient_error=5e-4, **options)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("D", triton.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_step(D, dtype):
    errors = (4e-3, 4e-3) if dtype == jnp.bfloat16 else (1e-5, 1e-4)
    check_step(decode_case(D=D, dtype=dtype), error=errors[0], gradient_error=errors[1])


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(
    ("D", "dtype"), [(d, t) for d in triton.HEAD_DIMS for t in (jnp.float32, jnp.bfloat16)]
)
def test_states_and_solve(T, D, dtype):
    low = dtype == jnp.bfloat16
    errors = (2e-5, 1e-2) if low else (1e-5, 1e-4)
    for docs in (True, False):
        case = draw(T=T, D=D, dtype=dtype, docs=docs, seed=T)
        check_states_and_solve(case, state_error=errors[0], solve_error=errors[1])


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("num_iter", range(0, 31, 5))
def test_solve_for_every_count(num_iter):
    case = draw(B=2, D=64)
    case["num_iter"] = jnp.full(2, num_iter, jnp.int32)
    check_states_and_solve(case)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("D", triton.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decode(D, dtype):
    for B, S in ((1, 1), (5, 9), (64, 64)):
        case = decode_case(B=max(B, 2), S=max(S, 2), D=D, dtype=dtype)
        check_decode(case, o_error=1e-5 if dtype == jnp.float32 else 4e-3)


@pytest.mark.gpu
@needs_triton
def test_decode_in_place():
    """Donated states are updated where they are."""
    arrays, num_iter, slots, states = decode_case(B=64, S=64, D=128)
    step = partial(decode, ridge=RIDGE, scale=1.0, decay_kk=True)
    program = jax.jit(step, donate_argnums=(8, 9)).lower(*arrays, num_iter, slots, *states)
    memory: Any = program.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * states[0].nbytes
    assert memory.temp_size_in_bytes < states[0].nbytes // 8


def test_draw_is_hard():
    """The cases hold what they promise, so that no check above passes for want of it."""
    case = draw()
    cum, start, beta, doc = prepared(case)
    assert (cum < -300).any() and (start == 0).any() and not beta[:, 30:34].any()
    assert len(np.unique(doc)) == 5
    f = expected({**case, "doc": None})[2]
    assert not f[-1, :9].any() and (f[-1, 9:] > 0).any()
