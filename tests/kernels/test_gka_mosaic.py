"""The GKA kernels for prefill and training: against float64, laws, CUDA lowering, sharding, GPU.

On a CPU they run in the Mosaic interpreter (fixture `interpreted`), tests marked `gpu` run them.
"""

from __future__ import annotations

import json
import math
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh
from safetensors.flax import load_file

from hmf_jax.pallas_kernels import gka
from hmf_jax.pallas_kernels.ops.gka import mosaic
from hmf_jax.pallas_kernels.ops.gka.inputs import Inputs, Options
from tests.goldens import golden
from tests.kernels.recurrent_laws import normal, unit
from tests.util import rel

NAMES = ("q", "k", "v", "alpha", "g", "beta")
# Operands are rounded to bfloat16 (2^-9), the solver amplifies that; states are sums in float32.
STATE = 1e-5
BOUNDS = {"o": 1e-2, "h_kk": STATE, "h_kv": STATE}
GRADIENT = 3e-2


class Case(NamedTuple):
    """Arguments of gka and cotangents of its results; `arrays` in the order of NAMES."""

    arrays: tuple[Any, ...]
    states: tuple[Any, Any]
    num_iter: Any
    segment_ids: Any
    d_o: Any
    d_states: tuple[Any, Any]


def draw(B=1, T=100, H=1, K=1, D=64, *, num_iter: Any = 3, segments: Any = None, seed=0) -> Case:
    """bfloat16 q, k, v and do; gates of both signs of beta; states as large as what comes later.

    `segments`: ids [T] or [B, T]; None = one document.
    """
    rng = np.random.default_rng(seed)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    token = [unit(normal(rng, B, T, H, D)), unit(normal(rng, B, T, K, D)), normal(rng, B, T, K, D)]
    beta = sigmoid(normal(rng, B, T, H)) * np.where(rng.random((B, T, H)) < 0.2, -1, 1)
    gates = [sigmoid(normal(rng, B, T, H)), -0.2 * np.abs(normal(rng, B, T, H)), beta]
    root = normal(rng, B, H, D, 40)
    states = root @ root.swapaxes(-1, -2) / 40, normal(rng, B, H, D, D)
    d_states = (0.1 * normal(rng, B, H, D, D) for _ in range(2))
    low, high = partial(jnp.asarray, dtype=jnp.bfloat16), partial(jnp.asarray, dtype=jnp.float32)
    return Case(
        arrays=(*map(low, token), *map(high, gates)),
        states=(high(states[0]), high(states[1])),
        num_iter=jnp.broadcast_to(jnp.asarray(num_iter, jnp.int32), (B,)),
        segment_ids=jnp.broadcast_to(
            jnp.asarray(1 if segments is None else segments, jnp.int32), (B, T)
        ),
        d_o=low(normal(rng, B, T, H, D)),
        d_states=(high(next(d_states)), high(next(d_states))),
    )


def replace(case: Case, **arrays) -> Case:
    """The case with some of its arrays replaced, by name."""
    return case._replace(
        arrays=tuple(arrays.get(n, x) for n, x in zip(NAMES, case.arrays, strict=True))
    )


def array(case: Case, name: str) -> Any:
    return case.arrays[NAMES.index(name)]


def cut(case: Case, time: Any, **changes) -> Case:
    """The tokens `time` of a case."""
    arrays = tuple(x[:, time] for x in case.arrays)
    segment_ids, d_o = case.segment_ids[:, time], case.d_o[:, time]
    return case._replace(arrays=arrays, segment_ids=segment_ids, d_o=d_o)._replace(**changes)


@partial(jax.jit, static_argnames=("impl", "options"))
def _run(
    case: Case, impl: str, options: tuple[tuple[str, Any], ...], lengths: Any = None
) -> dict[str, jax.Array]:
    def op(arrays, states):
        return gka(
            *arrays,
            num_iter=case.num_iter,
            segment_ids=case.segment_ids,
            lengths=lengths,
            initial_state=states,
            impl=impl,
            **dict(options),
        )

    (o, states), pull = jax.vjp(op, case.arrays, case.states)
    grads, (dh_kk, dh_kv) = pull((case.d_o, case.d_states))
    results = {"o": o, "h_kk": states[0], "h_kv": states[1]}
    results |= {f"d{name}": x for name, x in zip(NAMES, grads, strict=True)}
    # h_kk is symmetric: only the symmetric part of its gradient means something.
    return results | {"dh_kk": (dh_kk + dh_kk.swapaxes(-1, -2)) / 2, "dh_kv": dh_kv}


def run(case: Case, **options) -> dict[str, jax.Array]:
    """Results and gradients of the kernels, by name."""
    return _run(case, "mosaic", tuple(options.items()))


def float64(case: Case, **options) -> dict[str, np.ndarray]:
    """The same from `gka_chunked` in float64, on the same (rounded) inputs."""

    def up(x):
        return jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    with jax.enable_x64(True):
        results = _run(jax.tree.map(up, case), "chunked", tuple(options.items()))
        return jax.tree.map(np.asarray, results)


def assert_close(actual, expected, **bounds) -> None:
    """Every array, row by row, so that no row hides behind the others' norm."""
    for name, want in expected.items():
        bound = (BOUNDS | bounds).get(name, bounds.get("gradient", GRADIENT))
        for row, b in enumerate(want):
            error = rel(actual[name][row], b)
            assert error < bound, f"{name}, row {row}: {error:.1e}, expected at most {bound:.0e}"


@pytest.fixture
def interpreted(monkeypatch):
    """impl "mosaic" of gka runs in the interpreter."""
    monkeypatch.setattr(mosaic, "why_no_hopper", lambda: None)
    monkeypatch.setattr(mosaic, "gka_mosaic", partial(mosaic.gka_mosaic, interpret=True))


def documents_of(*lengths: tuple[int, int]) -> np.ndarray:
    """Segment ids of (id, length) in order."""
    return np.concatenate([np.full(length, number) for number, length in lengths])


# Starts and ends away from chunks of 64; padding (0) at the start, between and inside documents.
PACKED = documents_of((0, 9), (5, 30), (0, 11), (5, 3), (7, 31), (0, 20), (2, 1), (9, 22))
WIDE = documents_of((0, 9), (1, 150), (2, 64), (0, 70), (2, 7), (1, 1), (0, 64), (4, 100))
TWO_ROWS = np.stack([WIDE, documents_of((1, 320), (2, 145))])
# 30 iterations reach the solution, of covariances of rank 1 too: rounding times up to 1 / ridge.
SOLVED = {"o": 5e-2, "gradient": 0.1}
SHAPES = {  # B, T, H, K, D; num_iter, segment ids, options, bounds
    "packed": ((2, 127, 2, 1, 64), (0, 4), PACKED, {"ridge": 0.05}, {}),
    "128, decay_kk": ((1, 70, 1, 1, 128), 3, None, {"decay_kk": False}, {}),
    "one token, bp_lambda": ((1, 1, 2, 1, 64), 3, None, {"bp_lambda": False, "scale": 1.0}, {}),
}
LARGER = {
    "64": ((2, 465, 4, 2, 64), (7, 30), TWO_ROWS, {"ridge": 0.5}, {}),
    "128": ((2, 465, 2, 1, 128), (30, 1), TWO_ROWS, {"decay_kk": False}, SOLVED),
    "one token": ((2, 1, 2, 2, 128), (3, 0), None, {}, {}),
    "long": ((1, 1000, 1, 1, 64), 30, None, {}, SOLVED),
    "bp_lambda": ((1, 127, 2, 1, 128), 30, PACKED, {"bp_lambda": False, "ridge": 0.1}, {}),
    "neither": ((1, 127, 2, 1, 64), 9, PACKED, {"bp_lambda": False, "decay_kk": False}, SOLVED),
}


def check_equals_float64(shape, num_iter, segments, options, bounds) -> None:
    case = draw(*shape, num_iter=num_iter, segments=segments)
    padding = np.asarray(case.segment_ids == 0)
    arrays = (jnp.where(padding[(...,) + (None,) * (x.ndim - 2)], jnp.nan, x) for x in case.arrays)
    case = case._replace(arrays=tuple(arrays))
    actual = run(case, **options)
    assert_close(actual, float64(case, **options), **bounds)
    assert actual["o"].dtype == jnp.bfloat16
    assert actual["h_kk"].dtype == actual["h_kv"].dtype == jnp.float32
    for name in ("o", *(f"d{n}" for n in NAMES)):
        assert not np.asarray(actual[name])[padding].any(), name


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "name", [n if n == "packed" else pytest.param(n, marks=pytest.mark.slow) for n in SHAPES]
)
def test_equals_float64(name):
    check_equals_float64(*SHAPES[name])


def check_lengths() -> None:
    """Results and gradients are those of segment ids of ones and zeros; rows of length 0 and T."""
    lengths, T = jnp.asarray([0, 70, 9], jnp.int32), 70
    ids = jnp.asarray(np.arange(T) < np.asarray(lengths)[:, None], jnp.int32)
    case = draw(3, T, 1, 1, 64)._replace(segment_ids=None)
    got = _run(case, "mosaic", (), lengths)
    expected = _run(case._replace(segment_ids=ids), "mosaic", ())
    for name, want in expected.items():
        np.testing.assert_array_equal(got[name], want, err_msg=name)
    np.testing.assert_array_equal(got["h_kk"][0], case.states[0][0])
    assert not np.asarray(got["o"])[np.asarray(ids) == 0].any()


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_lengths_equal_segment_ids():
    check_lengths()


@pytest.mark.gpu
def test_lengths_equal_segment_ids_on_gpu():
    check_lengths()


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", LARGER)
def test_equals_float64_larger(name):
    check_equals_float64(*LARGER[name])


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_no_races(monkeypatch, capsys):
    """The interpreter reports no access to memory that may still be in use."""
    detect = partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", detect)
    jax.clear_caches()
    run(draw(1, 200, 2, 1, 64))["dk"].block_until_ready()
    assert "RACE DETECTED" not in capsys.readouterr().out


# -- laws -----------------------------------------------------------------------------------------

PER_TOKEN = ("o", *(f"d{name}" for name in NAMES))


def joined(first, second) -> dict[str, np.ndarray]:
    """Results of a sequence from those of its two pieces."""
    whole = {n: np.concatenate([first[n], second[n]], axis=1) for n in PER_TOKEN}
    last = {n: second[n] for n in ("h_kk", "h_kv")}
    return whole | last | {n: first[n] for n in ("dh_kk", "dh_kv")}


def zeros(states) -> tuple[Any, Any]:
    return jax.tree.map(jnp.zeros_like, states)


@pytest.mark.usefixtures("interpreted")
class TestLaws:
    """Up to rounding: pieces of a sequence are cut into other chunks than the whole."""

    @pytest.mark.slow
    @pytest.mark.parametrize("at", [1, 50, 64])
    def test_split_anywhere(self, at):
        """States carry everything forward, their cotangents everything back."""
        case = draw(1, 100)
        first, second = cut(case, slice(0, at)), cut(case, slice(at, None))
        middle = run(first)
        end = run(second._replace(states=(middle["h_kk"], middle["h_kv"])))
        start = run(first._replace(d_states=(end["dh_kk"], end["dh_kv"])))
        assert_close(joined(start, end), run(case))

    @pytest.mark.slow
    def test_packed_equals_separate(self):
        case = draw(1, 100, segments=documents_of((3, 50), (1, 50)))
        first = run(cut(case, slice(0, 50), d_states=zeros(case.d_states)))
        second = run(cut(case, slice(50, None), states=zeros(case.states)))
        assert_close(joined(first, second), run(case))

    @pytest.mark.slow  # the packed case above has such padding
    def test_padding_is_a_no_op(self):
        """Wherever it is and whatever lies there."""
        case = draw(1, 50)

        def run_at(where: np.ndarray) -> dict[str, Any]:
            def fill(x, value):
                return jnp.full((1, 100, *x.shape[2:]), value, x.dtype).at[:, where].set(x)

            arrays, d_o = tuple(fill(x, jnp.nan) for x in case.arrays), fill(case.d_o, 7)
            segment_ids = jnp.zeros((1, 100), jnp.int32).at[:, where].set(5)
            padded = run(case._replace(arrays=arrays, d_o=d_o, segment_ids=segment_ids))
            for name in PER_TOKEN:
                assert not np.delete(np.asarray(padded[name]), where, axis=1).any(), name
            return {n: x[:, where] if n in PER_TOKEN else x for n, x in padded.items()}

        scattered = np.sort(np.random.default_rng(3).permutation(100)[:50])
        assert_close(run_at(scattered), run_at(np.arange(50)))

    def test_row_of_padding_keeps_the_state(self):
        case = draw(1, 100)
        padded = run(case._replace(segment_ids=jnp.zeros_like(case.segment_ids)))
        for name, state, cotangent in zip(
            ("h_kk", "h_kv"), case.states, case.d_states, strict=True
        ):
            np.testing.assert_array_equal(padded[name], state)
            symmetric = (cotangent + cotangent.swapaxes(-1, -2)) / 2
            assert rel(padded[f"d{name}"], symmetric if name == "h_kk" else cotangent) < 1e-6
        for name in PER_TOKEN:
            assert not padded[name].any(), name


# -- inputs that break solvers --------------------------------------------------------------------

FAILURES = ("no key", "no key yet", "one key", "no beta", "forget once", "forget always")


def failures(T=64, D=64, num_iter=3) -> Case:
    """One row for each of FAILURES."""
    case = draw(len(FAILURES), T, 1, 1, D, num_iter=num_iter)
    k, g, beta = (array(case, name) for name in ("k", "g", "beta"))
    k = k.at[0].set(0).at[1, : T // 2].set(0).at[2].set(k[2, 0])
    beta = beta.at[3].set(0)
    g = g.at[4, T // 2].set(-1e4).at[5].set(-1e4)
    h_kk, h_kv = case.states
    return replace(case, k=k, g=g, beta=beta)._replace(states=(h_kk.at[:3].set(0), h_kv))


def check_failures(case: Case) -> None:
    """Accurate where rounding is not amplified (ridge 1), finite where it is."""
    actual, expected = run(case, ridge=1.0), float64(case, ridge=1.0)
    always = FAILURES.index("forget always")  # no gradient reaches g; its sums cancel
    assert not expected["dg"][always].any()
    noise = np.abs(actual["dg"][always]).max() / np.abs(expected["dbeta"][always]).max()
    assert noise < 1e-2
    assert_close(actual | {"dg": actual["dg"].at[always].set(0)}, expected)


def check_failures_solved(case: Case) -> None:
    actual = run(case)
    assert all(np.isfinite(x.astype(jnp.float32)).all() for x in actual.values())
    for name, bound in {"h_kk": STATE, "h_kv": STATE, "dh_kv": GRADIENT}.items():
        for row, expected in enumerate(float64(case)[name]):
            assert rel(actual[name][row], expected) < bound, name


@pytest.mark.usefixtures("interpreted")
@pytest.mark.slow
def test_failure_inputs():
    check_failures(failures())


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_failure_inputs_solved():
    check_failures_solved(failures(T=70, num_iter=30))


# -- the original's tensors -----------------------------------------------------------------------

PREFIXES = {
    "g30": (30, {}),
    "g5": (5, {}),
    "g0": (0, {}),
    "g30_nobp": (30, {"bp_lambda": False}),
    "nogk30": (30, {"decay_kk": False}),
    "nogk30_nobp": (30, {"decay_kk": False, "bp_lambda": False}),
}


def golden_errors(prefix: str, rows: int) -> dict[str, tuple[float, float]]:
    """Relative errors of the kernels, and of the original's own in bfloat16 (nan: not recorded)."""
    directory = golden("op_gka")
    tensors = {n: jnp.asarray(x) for n, x in load_file(directory / "expected.safetensors").items()}
    recorded = json.loads((directory / "case.json").read_text())["checks"]
    num_iter, options = PREFIXES[prefix]
    q, k, v, alpha, g, d_o = (tensors[n][:rows] for n in ("q", "k", "v", "alpha", "g", "do"))
    B, T, H, D = q.shape
    state = jnp.zeros((B, H, D, D))
    case = Case(
        arrays=(q, k, v, *(x.astype(jnp.float32) for x in (alpha, g)), jnp.ones((B, T, H))),
        states=(state, state),
        num_iter=jnp.full(B, num_iter, jnp.int32),
        segment_ids=jnp.ones((B, T), jnp.int32),
        d_o=d_o,
        d_states=(state, state),
    )
    actual = run(case, **options)
    errors = {}
    for name, x in actual.items():
        if (expected := tensors.get(f"{prefix}.{name}")) is not None:
            both = min(rows, len(expected))
            error = rel(x[:both], expected[:both])
            errors[name] = error, recorded.get(f"{prefix}.bf16_{name}", math.nan)
    return errors


def check_golden(errors: dict[str, tuple[float, float]]) -> None:
    assert {"dk", "dg"} <= {n for n, (_, original) in errors.items() if original > 0}
    for name, (error, original) in errors.items():
        bound = STATE if name in ("h_kk", "h_kv") else 0.1 if math.isnan(original) else original
        assert error <= 1.05 * bound, name


@pytest.mark.usefixtures("interpreted")
@pytest.mark.slow
@pytest.mark.parametrize("prefix", PREFIXES)
def test_golden(prefix):
    """As accurate as the original's kernels, on the same bfloat16 inputs."""
    check_golden(golden_errors(prefix, rows=2 if prefix == "g30" else 1))


# -- lowering, sharding, dispatch -----------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch):
    """Dispatch takes this machine for one with a Hopper GPU."""
    monkeypatch.setattr(mosaic, "why_no_hopper", lambda: None)


def shapes(B, T, H, K, D) -> Any:
    """Arrays and states of gka, without contents."""
    token = [jax.ShapeDtypeStruct((B, T, n, D), jnp.bfloat16) for n in (H, K, K)]
    gates = [jax.ShapeDtypeStruct((B, T, H), jnp.float32)] * 3
    return (*token, *gates), (jax.ShapeDtypeStruct((B, H, D, D), jnp.float32),) * 2


def lowered(shape: tuple[int, ...], *, gradient: bool, **options) -> str:
    """The program for CUDA, from any host."""

    def forward(arrays, states):
        return gka(*arrays, initial_state=states, impl="mosaic", **options)

    def gradients(arrays, states):
        results, pull = jax.vjp(forward, arrays, states)
        return pull(results)

    traced = jax.jit(gradients if gradient else forward).trace(*shapes(*shape))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def kernels(text: str) -> list[tuple[str, str]]:
    """Name and types of every call of a Mosaic kernel."""
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    name = re.compile(r"\\00([a-z_]+?)_body")
    return [(name.findall(call)[0], call.rpartition(" : ")[2]) for call in calls]


FORWARD = ["scan", "solve"]
BACKWARD = ["scan", "solve_backward", "scan", "read_backward", "gram_backward"]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 131072, 8, 2, 128), {}),
        *(
            pytest.param(shape, options, marks=pytest.mark.slow)
            for shape in [(2, 65, 4, 1, 64), (1, 1, 2, 2, 128), (1, 64, 2, 2, 64)]
            for options in ({}, {"decay_kk": False, "bp_lambda": False})
        ),
    ],
)
def test_lowers_for_cuda(shape, options):
    """Every kernel, from a CPU host; keys and values are never repeated, and x never recomputed."""
    B, T, H, K, D = shape
    assert [name for name, _ in kernels(lowered(shape, gradient=False, **options))] == FORWARD
    calls = kernels(lowered(shape, gradient=True, **options))
    assert [name for name, _ in calls] == FORWARD + BACKWARD
    keys = f"tensor<{B}x{-(-T // 64) * 64}x{K}x{D}xbf16>"
    assert all(keys in types for _, types in calls)


def mesh_of(*shape: int) -> Mesh:
    devices = np.asarray(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, ("dp", "fsdp", "tp", "rep"))


@pytest.mark.usefixtures("hopper")
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (simulated) devices")
@pytest.mark.parametrize(
    ("mesh", "local", "gradient"),
    [
        ((1, 1, 2, 4), (4, 1, 1), True),
        ((2, 2, 2, 1), (1, 4, 1), False),
        pytest.param((2, 2, 2, 1), (1, 4, 1), True, marks=pytest.mark.slow),
    ],
)
def test_sharded_kernels_see_local_shapes(mesh, local, gradient):
    """No communication but the sums of the gradients of k and v that several devices share."""
    text = lowered((4, 64, 8, 2, 64), gradient=gradient, mesh=mesh_of(*mesh))
    calls = kernels(text)
    assert [name for name, _ in calls] == FORWARD + (BACKWARD if gradient else [])
    B, H, K = local
    for _, types in calls:
        assert f"tensor<{B}x64x{K}x64xbf16>" in types
    assert f"tensor<2x{B}x{H}x64x64xf32>" in calls[0][1]
    collectives = re.findall(r"stablehlo\.((?:all_|collective_|reduce_scatter)\w*)(.*)", text)
    assert [name for name, _ in collectives] == (["all_reduce"] * 2 if gradient else [])
    # "rep" devices share k and v; groups are written as mesh axes or as device numbers.
    numbers = np.arange(8).reshape(-1, mesh[-1]).tolist()
    for _, what in collectives:
        assert re.findall(r'axis_ref<name = "(\w+)">', what) == ["rep"] or f"<{numbers}>" in what


def uses_kernels(*shape: int, dtype: Any = jnp.bfloat16, state: Any = jnp.float32, **options):
    arrays, states = shapes(*shape)
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), arrays)
    states = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, state), states)
    run = lambda arrays, states: gka(*arrays, initial_state=states, **options)  # noqa: E731
    return "solve_body" in str(jax.make_jaxpr(run)(arrays, states))


# Arguments that the kernels do not take, and the reason that dispatch gives.
REFUSED = {
    "float32 inputs": ((64, {"dtype": jnp.float32}), "take bfloat16, got float32"),
    "bfloat16 states": ((64, {"state": jnp.bfloat16}), "float32 states, got bfloat16"),
    "head_dim": ((32, {}), "head_dim 64 and 128, got 32"),
    "solver": ((64, {"solver": "cg"}), "Chebyshev solver, not 'cg'"),
}


def test_auto_picks_the_kernels_where_they_can_run(monkeypatch):
    assert jax.default_backend() == "gpu" or not uses_kernels(1, 5, 2, 1, 64)
    monkeypatch.setattr(mosaic, "why_no_hopper", lambda: None)
    assert uses_kernels(1, 5, 2, 1, 64) and uses_kernels(1, 5, 2, 2, 128)
    assert not uses_kernels(1, 5, 2, 1, 64, impl="chunked")
    for (D, options), reason in REFUSED.values():
        assert not uses_kernels(1, 5, 2, 1, D, **options)
        with pytest.raises(ValueError, match=f"cannot run impl='mosaic' here.*{reason}"):
            uses_kernels(1, 5, 2, 1, D, impl="mosaic", **options)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="has a GPU")
def test_the_named_kernels_need_a_gpu():
    with pytest.raises(ValueError, match="cannot run impl='mosaic' here.*Hopper GPU"):
        uses_kernels(1, 5, 2, 1, 64, impl="mosaic")


def test_the_operator_checks_what_it_takes():
    case = draw(T=5)
    q, *rest = case.arrays
    h_kk, h_kv = case.states
    with pytest.raises(ValueError, match="gka_mosaic: its kernels take bfloat16"):
        everything: Any = (q.astype(jnp.float32), *rest, case.num_iter, None, h_kk, h_kv)
        mosaic.gka_mosaic(Inputs(*everything), Options(0.02, 1.0, decay_kk=True))


# -- the kernels themselves -----------------------------------------------------------------------

_ROWS = (
    documents_of((0, 30), (1, 150), (2, 64), (0, 70), (2, 7), (1, 1), (0, 64), (4, 600), (0, 14)),
    documents_of((1, 999), (2, 1)),
)
GPU = {
    "packed 64": ((2, 1000, 4, 2, 64), (7, 30), np.stack(_ROWS), {"ridge": 0.5}, {}),
    "packed 128": ((2, 1000, 4, 1, 128), (30, 0), np.stack(_ROWS), {}, SOLVED),
    "1": ((1, 1, 2, 1, 128), 30, None, {}, SOLVED),
    "63": ((3, 63, 4, 2, 64), (0, 10, 100), None, {"ridge": 0.5, "decay_kk": False}, {}),
    "64": ((1, 64, 2, 2, 128), 5, None, {"ridge": 0.5}, {}),
    "65": ((1, 65, 4, 2, 64), 30, None, {"bp_lambda": False}, SOLVED),
    # Query heads per key/value head that are no power of two.
    "groups of 3": ((2, 130, 6, 2, 128), 30, None, {}, SOLVED),
    "groups of 5": ((1, 130, 10, 2, 64), 30, None, {}, SOLVED),
    "groups of 6": ((1, 130, 6, 1, 128), 30, None, {}, SOLVED),
    "groups of 7": ((1, 130, 14, 2, 64), 30, None, {}, SOLVED),
    "groups of 7, 128": ((1, 130, 7, 1, 128), 30, None, {}, SOLVED),
    "groups of 16": ((1, 130, 16, 1, 128), 30, None, {}, SOLVED),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU)
def test_gpu_equals_float64(name):
    check_equals_float64(*GPU[name])


@pytest.mark.gpu
def test_gpu_failure_inputs():
    check_failures(failures(T=200))


@pytest.mark.gpu
def test_gpu_failure_inputs_solved():
    check_failures_solved(failures(T=200, num_iter=30))


@pytest.mark.gpu
def test_gpu_is_deterministic():
    """Bit for bit: nothing of an earlier call, of other rows, or of unwritten memory leaks in."""
    shape, num_iter, segments, options, _ = GPU["packed 128"]
    case, other = (draw(*shape, num_iter=num_iter, segments=segments, seed=s) for s in (0, 1))
    first = run(case, **options)
    assert not np.array_equal(first["o"], run(other, **options)["o"])

    def poison(x):
        return x.at[1].set(jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x

    jnp.full(2**31, jnp.nan, jnp.bfloat16).block_until_ready()  # memory that the next calls get
    poisoned = run(jax.tree.map(poison, case), **options)
    again = run(case, **options)
    for name, x in first.items():
        np.testing.assert_array_equal(again[name], x)
        np.testing.assert_array_equal(poisoned[name][0], x[0])


@pytest.mark.gpu
def test_gpu_long_sequence(capsys):
    """131072 tokens of slow decay, and of none: the states do not drift."""
    case = draw(1, 131072, 2, 1, 128, num_iter=30)
    case = replace(case, g=array(case, "g") * jnp.asarray([1e-3, 0.0]))

    def forward(case, impl):
        o, (h_kk, h_kv) = gka(
            *case.arrays, num_iter=case.num_iter, initial_state=case.states, impl=impl
        )
        return {"o": o, "h_kk": h_kk, "h_kv": h_kv}

    actual = jax.jit(partial(forward, impl="mosaic"))(case)
    with jax.default_matmul_precision("highest"):
        case = case._replace(
            arrays=tuple(x.astype(jnp.float32) for x in case.arrays),
            d_o=None,
            d_states=None,
        )
        expected = jax.jit(partial(forward, impl="chunked"))(case)
    errors = {name: rel(actual[name], expected[name]) for name in expected}
    with capsys.disabled():
        print("\n131072 tokens:", ", ".join(f"{n} {error:.1e}" for n, error in errors.items()))
    assert errors["h_kk"] < 1e-3 and errors["h_kv"] < 1e-3
    assert errors["o"] < SOLVED["o"]


@pytest.mark.gpu
def test_gpu_golden(capsys):
    table = {prefix: golden_errors(prefix, rows=2) for prefix in PREFIXES}
    with capsys.disabled():
        print("\nrelative errors, kernels (the original's in bfloat16)")
        for prefix, errors in table.items():
            cells = (f"{n} {ours:.4f} ({theirs:.4f})" for n, (ours, theirs) in errors.items())
            print(f"{prefix:12}", ", ".join(cells))
    for errors in table.values():
        check_golden(errors)
