"""The GKA decode kernel: against the reference, slots, in-place updates, lowering for CUDA, GPU."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh

from hmf_jax.pallas_kernels import gka_step
from hmf_jax.pallas_kernels.ops.gka import mosaic_decode
from hmf_jax.pallas_kernels.ops.gka.inputs import Options, Token
from hmf_jax.pallas_kernels.ops.gka.mosaic_decode import gka_decode
from tests.kernels.recurrent_laws import normal, unit
from tests.util import rel

# The kernel's only inline code is a barrier of one warpgroup, which the interpreter need not know.
INTERPRET = plgpu.InterpretGPUParams(inline_mgpu="ignore", detect_races=True)


def inputs(B, H, K, D, S=None, dtype: Any = jnp.float32, seed=0) -> Any:
    """(q, k, v, alpha, g, beta) and states of S rows; covariances of low rank: ill-conditioned."""
    rng = np.random.default_rng(seed)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    token = [unit(normal(rng, B, H, D)), unit(normal(rng, B, K, D)), normal(rng, B, K, D)]
    gates = [sigmoid(normal(rng, B, H)), -np.exp(normal(rng, B, H) - 2), sigmoid(normal(rng, B, H))]
    root = normal(rng, S or B, H, D, 8)
    states = root @ root.swapaxes(-1, -2), normal(rng, S or B, H, D, D)
    arrays = *(jnp.asarray(x, dtype) for x in token), *(jnp.asarray(x, jnp.float32) for x in gates)
    return arrays, tuple(jnp.asarray(x, jnp.float32) for x in states)


def step64(arrays, num_iter, states, *, ridge=0.02, scale=None, decay_kk=True):
    """The step in float64 NumPy, straight from the equations."""
    q, k, v, alpha, g, beta, h, u = (np.asarray(x, np.float64) for x in (*arrays, *states))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) * beta[..., None] for x in (k, v))
    decay = np.exp(g)[..., None, None]
    h = (decay if decay_kk else 1) * h + k[..., :, None] * k[..., None, :]
    u = decay * u + k[..., :, None] * v[..., None, :]
    f = np.linalg.norm(h, axis=(-2, -1))[..., None]
    f = np.where(f == 0, np.nan, f)
    lam = ridge * f
    step, c4 = 2 / (2 * lam + f), (0.5 * f / (2 * lam + f)) ** 2
    x, x_prev, omega = step * q, 0 * q, 2
    for n in range(max(num_iter)):
        omega = 1 / (1 - c4 * omega)
        residual = np.einsum("bhde,bhe->bhd", h, x) + lam * x - q
        new = omega * x - (step * omega * residual + (omega - 1) * x_prev)
        on = (n < np.asarray(num_iter))[:, None, None]
        x, x_prev = np.where(on, new, x), np.where(on, x, x_prev)
    x = np.where(np.isnan(f), 0, x)
    blend = np.where(np.asarray(num_iter)[:, None, None] > 0, q + alpha[..., None] * (x - q), q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return scale * np.einsum("bhd,bhde->bhe", blend, u), (h, u)


def kernel(arrays, num_iter, slots, states, **options):
    interpret: Any = options.pop("interpret", None)
    static: Any = {"decay_kk": True} | options
    everything: Any = (*arrays, num_iter, slots, *states)
    return gka_decode(Token(*everything), Options(**static), interpret=interpret)


def mesh_of(*shape):
    devices = np.asarray(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, ("dp", "fsdp", "tp", "rep"))


def ints(*values):
    return jnp.asarray(values, jnp.int32)


@pytest.mark.parametrize(
    ("decay_kk", "early"),
    [(True, 16), (False, 64)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in ((True, 64), (False, 16))],
)
def test_kernel_equals_reference(monkeypatch, decay_kk, early):
    """In the interpreter (which also looks for races): rows with their own num_iter, grouped kv."""
    monkeypatch.setattr(mosaic_decode, "_early_rows", lambda blocks, D: early)
    arrays, states = inputs(3, 2, 1, 64)
    options = {"ridge": 0.05, "scale": 1.3, "decay_kk": decay_kk}
    num_iter = ints(0, 5, 2)
    run = jax.jit(partial(kernel, **options, interpret=INTERPRET))
    o, final = run(arrays, num_iter, None, states)
    expected = gka_step(*arrays, state=states, num_iter=num_iter, impl="reference", **options)
    assert rel(o, expected[0]) < 2e-6
    for a, b in zip(final, expected[1], strict=True):
        assert rel(a, b) < 1e-6


def test_kernel_head_dim_128_bfloat16():
    arrays, states = inputs(1, 2, 2, 128, dtype=jnp.bfloat16)
    run = jax.jit(partial(kernel, ridge=0.02, scale=0.1, interpret=INTERPRET))
    o, final = run(arrays, ints(3), None, states)
    expected, final64 = step64(arrays, (3,), states, scale=0.1)
    assert o.dtype == jnp.bfloat16
    assert rel(o, expected) < 4e-3
    for a, b in zip(final, final64, strict=True):
        assert rel(a, b) < 1e-6


SLOTS = ints(4, -1, 0, 5)  # of 5 state rows: two rows are inactive


def facade(arrays, num_iter, slots, states, impl):
    return gka_step(*arrays, state=states, slots=slots, num_iter=num_iter, impl=impl)


def check_slots(run):
    """Rows 0 and 2 use state rows 4 and 0; nothing else changes; inactive rows return zeros."""
    arrays, states = inputs(4, 2, 1, 64, S=5)
    num_iter = ints(3, 4, 0, 2)
    o, final = run(arrays, num_iter, SLOTS, states)
    active, rows = np.asarray([0, 2]), np.asarray([4, 0])
    expected, new = step64([x[active] for x in arrays], num_iter[active], [s[rows] for s in states])
    assert rel(o[active], expected) < 3e-6
    assert not np.asarray(o)[[1, 3]].any()
    for before, after, a in zip(states, final, new, strict=True):
        assert rel(after[rows], a) < 1e-6
        np.testing.assert_array_equal(after[1:4], before[1:4])


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_slots(impl):
    check_slots(jax.jit(partial(facade, impl=impl)))


def test_slots_kernel():
    check_slots(jax.jit(partial(kernel, ridge=0.02, scale=64**-0.5, interpret=INTERPRET)))


@pytest.mark.slow
def test_facade_runs_the_kernel_and_its_gradient(monkeypatch):
    """impl "mosaic" takes what `gka_step` takes; its gradients are those of "chunked"."""
    monkeypatch.setattr(mosaic_decode, "why_no_hopper", lambda: None)
    monkeypatch.setattr(mosaic_decode, "_launch", partial(_interpreted, mosaic_decode._launch))
    arrays, states = inputs(3, 2, 1, 64, S=4)

    def loss(impl, slots, arrays, states):
        o, final = facade(arrays, ints(0, 2, 3), slots, states, impl)
        return jnp.sum(o**2) + sum(jnp.sum(s * s) for s in final), o

    for slots in (None, ints(3, -1, 1)):
        used = states if slots is not None else tuple(s[:3] for s in states)
        grads = {}
        for impl in ("mosaic", "chunked"):
            grad = jax.jit(jax.grad(partial(loss, impl, slots), argnums=(0, 1), has_aux=True))
            grads[impl] = grad(arrays, used)
        for a, b in zip(*(jax.tree.leaves(g) for g in grads.values()), strict=True):
            assert rel(a, b) < 1e-4

    q, k, v, *_ = arrays
    run = partial(gka_step, q, k, v, num_iter=2)
    o, _ = run(None, None, None, None, impl="mosaic")
    assert rel(o, run(None, None, None, None, impl="chunked")[0]) < 1e-5


def _interpreted(launch, static, token):
    return launch(static._replace(interpret=INTERPRET), token)


def test_auto_picks_the_kernel_where_it_can_run(monkeypatch):
    def uses_kernel(*shape, **kwargs):
        arrays, states = inputs(*shape)
        run = partial(gka_step, state=states, **kwargs)
        return "gka_decode" in str(jax.make_jaxpr(run)(*arrays))

    assert jax.default_backend() == "gpu" or not uses_kernel(2, 2, 1, 64)
    monkeypatch.setattr(mosaic_decode, "why_no_hopper", lambda: None)
    assert uses_kernel(2, 2, 1, 64)
    assert not uses_kernel(2, 2, 1, 32)
    assert not uses_kernel(2, 2, 1, 64, solver="cg")
    assert not uses_kernel(2, 2, 1, 64, impl="chunked")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("rows", "D"),
    [(40, 128)] + [pytest.param(1, D, marks=pytest.mark.slow) for D in (64, 128)],
)
@pytest.mark.parametrize("with_slots", [True, False])
def test_lowers_for_cuda_and_updates_in_place(dtype, rows, D, with_slots):
    """Every variant, from a CPU host; the custom call writes into its own state operands."""
    arrays, states = inputs(rows, 4, 2, D, S=rows, dtype=dtype)
    slots = jnp.arange(rows, dtype=jnp.int32) if with_slots else None

    @partial(jax.jit, donate_argnums=3)
    def run(arrays, num_iter, slots, states):
        return kernel(arrays, num_iter, slots, states, ridge=0.02, scale=1.0)

    traced = run.trace(arrays, ints(*[30] * rows), slots, states)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = (line for line in text.splitlines() if "custom_call @mosaic_gpu" in line)
    aliases = re.findall(r"output_tuple_indices = \[(\d)\], *operand_index = (\d)", call)
    assert aliases == [("1", "8"), ("2", "9")]
    assert len(re.findall(r"tf.aliasing_output|jax.buffer_donor", text)) == 2


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (simulated) devices")
def test_shard_map_splits_heads_without_collectives(monkeypatch):
    monkeypatch.setattr(mosaic_decode, "why_no_hopper", lambda: None)
    mesh = mesh_of(2, 1, 2, 2)
    arrays, states = inputs(4, 8, 2, 64)

    @jax.jit
    def run(arrays, states):
        return gka_step(*arrays, state=states, impl="mosaic", mesh=mesh)

    text = run.trace(arrays, states).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = (line for line in text.splitlines() if "custom_call @mosaic_gpu" in line)
    assert "tensor<2x2x64x64xf32>" in call  # rows over dp, heads over tp and rep
    assert not re.search(r"stablehlo\.(all_|collective)", text)


def test_bad_input(monkeypatch):
    arrays, states = inputs(2, 2, 1, 64)
    run = partial(kernel, ridge=0.02, scale=1.0)
    q, k, *rest = arrays
    with pytest.raises(ValueError, match="k has shape"):
        run((q, k[:1], *rest), ints(1, 1), None, states)
    with pytest.raises(ValueError, match="say which one each uses: slots"):
        run(arrays, ints(1, 1), None, [s[:1] for s in states])
    with pytest.raises(ValueError, match="slots is float32"):
        run(arrays, ints(1, 1), jnp.zeros(2), states)
    with pytest.raises(ValueError, match="float32 states"):
        run(arrays, ints(1, 1), None, [s.astype(jnp.bfloat16) for s in states])
    with pytest.raises(ValueError, match="ridge=-1"):
        kernel(arrays, ints(1, 1), None, states, ridge=-1, scale=1.0)
    other = inputs(2, 2, 1, 32)
    with pytest.raises(ValueError, match="head_dim 64 and 128, got 32"):
        run(other[0], ints(1, 1), None, other[1])

    run = partial(gka_step, *arrays)
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="cannot run impl='mosaic' here.*Hopper"):
            run(state=states, impl="mosaic")
    monkeypatch.setattr(mosaic_decode, "why_no_hopper", lambda: None)
    with pytest.raises(ValueError, match="Chebyshev solver, not 'cg'"):
        run(state=states, solver="cg", impl="mosaic")
    with pytest.raises(ValueError, match="slots is float32"):
        run(state=states, slots=jnp.zeros(2))
    with pytest.raises(ValueError, match="give one"):
        run(state=None, slots=ints(0, 1))
    if jax.device_count() > 1:
        with pytest.raises(ValueError, match="dp = fsdp = 1"):
            run(state=states, slots=ints(0, 1), mesh=mesh_of(2, 1, 1, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("B", "H", "K", "D"),
    [(1, 8, 2, 128), (3, 4, 4, 64), (64, 32, 8, 128), (2, 6, 2, 128), (2, 14, 2, 64)]
    + [(2, 10, 2, 128), (2, 6, 1, 64), (9, 28, 4, 128), (2, 32, 2, 128)],
)
def test_gpu_is_accurate(B, H, K, D, dtype):
    """Ill-conditioned states, a zero state, extreme decay, num_iter 0 to 100 by row: to 1e-5."""
    arrays, states = inputs(B, H, K, D, dtype=dtype, seed=B)
    q, k, v, alpha, g, beta = arrays
    g = g.at[0, 0].set(-1e4).at[-1, -1].set(-30.0)
    beta = beta.at[0, 1].set(0)
    states = (states[0].at[0, :2].set(0), states[1])
    arrays = (q, k, v, alpha, g, beta)
    num_iter = np.resize([30, 0, 100, 1, 7], B)
    run = jax.jit(partial(facade, impl="auto"), donate_argnums=3)
    expected, final64 = step64(arrays, num_iter, states)
    o, final = run(arrays, jnp.asarray(num_iter, jnp.int32), None, states)
    for row in range(B):  # by row: no row hides behind the others' norm
        assert rel(o[row], expected[row]) < (1e-5 if dtype == jnp.float32 else 4e-3)
        for a, b in zip(final, final64, strict=True):
            assert rel(a[row], b[row]) < 1e-6


@pytest.mark.gpu
def test_gpu_slots_leave_other_rows_alone():
    check_slots(jax.jit(partial(facade, impl="mosaic")))


@pytest.mark.gpu
def test_gpu_many_steps_in_place():
    """A scan over donated states: as accurate as float64 after 300 steps, no copy of a state."""
    arrays, states = inputs(5, 32, 8, 128)
    num_iter = ints(*[30] * 5)

    def run(arrays, states):
        def step(states, _):
            o, states = facade(arrays, num_iter, None, states, "mosaic")
            return states, o

        return jax.lax.scan(step, states, length=300)

    run = jax.jit(run, donate_argnums=1)
    size = sum(s.nbytes for s in states)
    memory: Any = run.lower(arrays, states).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size // 8
    final64 = states
    for _ in range(300):
        _, final64 = step64(arrays, [0] * 5, final64)
    final, o = run(arrays, states)
    for a, b in zip(final, final64, strict=True):
        assert rel(a, b) < 1e-5
    expected, _ = step64(arrays, [30] * 5, final64)
    o_next, _ = facade(arrays, num_iter, None, final, "mosaic")
    assert rel(o_next, expected) < 1e-5
    assert np.isfinite(o).all()
