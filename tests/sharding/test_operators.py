"""Every operator on eight devices: the single-device result, and no communication but the sums of
gradients that devices share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log_sigmoid, sigmoid, softplus
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hmf_jax.pallas_kernels import (
    attention,
    causal_conv1d,
    decode_attention,
    gated_delta_rule,
    gated_delta_rule_step,
    gka,
    gka_step,
    sharded,
    ssd,
    ssd_step,
    two_window_attention,
    two_window_decode,
)
from hmf_jax.pallas_kernels.shapes import SHAPES
from hmf_jax.sharding import spec
from tests.util import rel

# b batch, t tokens, h heads, k key/value heads, d and e head_dim, s cache, w taps, z = w - 1.
TINY = SHAPES["tiny"]
SIZES = dict(b=4, t=6, h=TINY.heads, k=TINY.kv_heads, d=8, e=8, s=16, w=4, z=3)
DP, REP = "dp2 fsdp2 tp2", "tp2 rep4"
MESHES = {DP: (2, 2, 2, 1), REP: (1, 1, 2, 4)}
COLLECTIVE = re.compile(
    r" = (\(.*?\)|\S+) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\(.*?(?:replica_groups=(.*?), \w+=|$)"
)


class Case(NamedTuple):
    """The letters of every array, a call of those arrays, and the letters of its results."""

    arrays: dict[str, str]
    call: Callable[..., Any]
    out: Any


def _gka(op, q, k, v, alpha, g, beta, h_kk, h_kv, **kw):
    state = h_kk @ jnp.swapaxes(h_kk, -1, -2), h_kv
    name = "state" if op is gka_step else "initial_state"
    kw[name] = state
    return op(q, k, v, sigmoid(alpha), log_sigmoid(g), sigmoid(beta), num_iter=2, **kw)


def _gdn(op, q, k, v, g, beta, s, **kw):
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    kw["state" if op is gated_delta_rule_step else "initial_state"] = s
    return op(q, k, v, log_sigmoid(g), sigmoid(beta), **kw)


def _ssd(op, x, B, C, dt, A, D, s, **kw):
    kw["state" if op is ssd_step else "initial_state"] = s
    return op(x, B, C, softplus(dt), -softplus(A), D, **kw)


def _two_window_decode(q, q_fading, k, v, mesh):
    full = jnp.full(q.shape[0], k.shape[1] // 2)
    return two_window_decode(q, k, v, full, full // 2, q_fading=q_fading, mesh=mesh)


def _decode_attention(q, k, v, mesh):
    return decode_attention(q, k, v, jnp.arange(q.shape[0]) + 3, mesh=mesh)


LENGTHS = np.asarray([6, 0, 1, 4], np.int32)
QKV = {"q": "bthd", "k": "btkd", "v": "btkd"}
GKA = QKV | dict.fromkeys(("alpha", "g", "beta"), "bth") | {"h_kk": "bhde", "h_kv": "bhde"}
GDN = QKV | dict.fromkeys(("g", "beta"), "bth") | {"s": "bhde"}
SSD = {"x": "btkd", "B": "btke", "C": "bthe", "dt": "bth", "A": "h", "D": "h", "s": "bhde"}
FADING = {"q_fading": "bthd", "k_fading": "btkd", "v_fading": "btkd"}
CACHE = {"k": "bskd", "v": "bskd"}


def _token(arrays: dict[str, str]) -> dict[str, str]:
    return {name: letters.replace("t", "") for name, letters in arrays.items()}


def _conv(channels: Literal["h", "k"], **kw: Any) -> Case:
    arrays = {"x": "bt", "weight": "w", "bias": "", "initial_state": "bz"}
    arrays = {name: letters + channels for name, letters in arrays.items()}
    call = partial(causal_conv1d, channels=channels, **kw)
    return Case(arrays, call, ("bt" + channels, "bz" + channels))


CASES = {
    "gka": Case(GKA, partial(_gka, gka, chunk_size=4), ("bthd", ("bhde", "bhde"))),
    "gka_step": Case(_token(GKA), partial(_gka, gka_step), ("bhd", ("bhde", "bhde"))),
    "gated_delta_rule": Case(GDN, partial(_gdn, gated_delta_rule, chunk_size=4), ("bthd", "bhde")),
    "gated_delta_rule_step": Case(
        _token(GDN), partial(_gdn, gated_delta_rule_step), ("bhd", "bhde")
    ),
    "gated_delta_rule lengths": Case(
        GDN, partial(_gdn, gated_delta_rule, chunk_size=4, lengths=LENGTHS), ("bthd", "bhde")
    ),
    "ssd": Case(SSD, partial(_ssd, ssd, chunk_size=4), ("bthd", "bhde")),
    "ssd_step": Case(_token(SSD), partial(_ssd, ssd_step), ("bhd", "bhde")),
    "causal_conv1d heads": _conv("h"),
    "causal_conv1d kv heads": _conv("k"),
    "causal_conv1d lengths": _conv("h", lengths=LENGTHS),
    "attention": Case(QKV, attention, "bthd"),
    "attention window": Case(QKV, partial(attention, window=2), "bthd"),
    "two_window_attention": Case(QKV | FADING, partial(two_window_attention, window=2), "bthd"),
    "decode_attention": Case({"q": "bhd"} | CACHE, _decode_attention, "bhd"),
    "two_window_decode": Case({"q": "bhd", "q_fading": "bhd"} | CACHE, _two_window_decode, "bhd"),
}
# What is new in these is a mask, before the operator or in it; the convolution's is in it.
SLOW = {"attention window", "gated_delta_rule lengths", "gated_delta_rule_step", "ssd_step"}
FORWARD_ONLY = {"gka_step", "gated_delta_rule_step", "ssd_step", "two_window_decode"}


def marked(names: Iterable[str]) -> list[Any]:
    return [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in names]


def _mesh(name: str) -> Mesh:
    return Mesh(np.asarray(jax.devices()).reshape(MESHES[name]), ("dp", "fsdp", "tp", "rep"))


def _random(letters: str, seed: int) -> jax.Array:
    shape = [SIZES[letter] for letter in letters]
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _place(x: jax.Array, letters: str, mesh: Mesh) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh, sharded.spec(mesh, letters, SIZES["b"])))


def _inputs(case: Case) -> dict[str, jax.Array]:
    return {name: _random(letters, i) for i, (name, letters) in enumerate(case.arrays.items())}


def _collectives(compiled: Any) -> dict[str, int]:
    """Arrays per kind of collective among several devices; a merged one holds several arrays."""
    found: dict[str, int] = {}
    for line in compiled.as_text().splitlines():
        for result, kind, groups in COLLECTIVE.findall(line):
            if _group_size(groups) > 1:
                found[kind] = found.get(kind, 0) + len(re.findall(r"\w+\[", result))
    return found


def _group_size(groups: str) -> int:
    """Devices that talk to each other; 2 stands for "several" where no groups are written.

    A sum over a mesh axis of size 1 stays in the program as one of each device with itself.
    """
    if axes := re.match(r"mesh\[(.*?)\] ?\{(.*?)\}", groups):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"\w+", axes[2]))
    if iota := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(iota[1])
    if listed := re.match(r"\{\{([\d,]+)\}", groups):
        return listed[1].count(",") + 1
    return 2


@pytest.mark.parametrize("mesh_name", [DP, pytest.param(REP, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", marked(CASES))
def test_forward_needs_no_communication(name: str, mesh_name: str) -> None:
    case, mesh = CASES[name], _mesh(mesh_name)
    x = _inputs(case)
    placed = {n: _place(a, case.arrays[n], mesh) for n, a in x.items()}
    compiled = jax.jit(lambda x: case.call(**x, mesh=mesh)).lower(placed).compile()
    assert _collectives(compiled) == {}
    got, want = compiled(placed), jax.jit(lambda x: case.call(**x, mesh=None))(x)

    def same(a: jax.Array, b: jax.Array, letters: str) -> None:
        assert rel(a, b) < 1e-5
        split = NamedSharding(mesh, sharded.spec(mesh, letters, SIZES["b"]))
        assert a.sharding.is_equivalent_to(split, a.ndim), f"{a.sharding} is not {split}"

    jax.tree.map(same, got, want, case.out)


@pytest.mark.parametrize("mesh_name", [pytest.param(DP, marks=pytest.mark.slow), REP])
@pytest.mark.parametrize("name", marked(name for name in CASES if name not in FORWARD_ONLY))
def test_backward_sums_only_what_is_shared(name: str, mesh_name: str) -> None:
    """One all-reduce for each input of which several devices hold a copy, nothing else."""
    case, mesh = CASES[name], _mesh(mesh_name)
    x = _inputs(case)
    cotangent = jax.tree.map(lambda letters: _random(letters, 99), case.out)
    placed = {n: _place(a, case.arrays[n], mesh) for n, a in x.items()}
    placed_cotangent = jax.tree.map(lambda a, dims: _place(a, dims, mesh), cotangent, case.out)

    def gradients(x, cotangent, mesh):
        return jax.vjp(lambda x: case.call(**x, mesh=mesh), x)[1](cotangent)[0]

    compiled = jax.jit(partial(gradients, mesh=mesh)).lower(placed, placed_cotangent).compile()
    shared = [a for a in placed.values() if len(set(map(str, _indices(a)))) < mesh.size]
    assert _collectives(compiled) == ({"all-reduce": len(shared)} if shared else {})
    want = jax.jit(partial(gradients, mesh=None))(x, cotangent)
    got = compiled(placed, placed_cotangent)
    for n in x:
        assert rel(got[n], want[n]) < 1e-4, n


def _indices(x: jax.Array) -> list[Any]:
    return [shard.index for shard in x.addressable_shards]


@pytest.mark.parametrize("op", [gated_delta_rule, ssd])
def test_keys_of_all_heads_are_split_like_queries(op: Any) -> None:
    """Where "rep" splits query heads further, keys that were expanded to all heads go along."""
    mesh, all_heads = _mesh(REP), {"k": "h"}
    arrays = GDN if op is gated_delta_rule else SSD
    table = str.maketrans(all_heads)
    case = Case({n: d.translate(table) for n, d in arrays.items()}, None, None)  # type: ignore
    x = _inputs(case)
    run = partial(_gdn if op is gated_delta_rule else _ssd, op, chunk_size=4)
    split, whole = (jax.jit(partial(run, mesh=m))(**x) for m in (mesh, None))
    for got, want in zip(split, whole, strict=True):
        assert rel(got, want) < 1e-5


@pytest.mark.parametrize(("rows", "split"), [(1, False), (3, False), (4, True), (6, False)])
def test_a_batch_that_does_not_divide_stays_whole(rows: int, split: bool) -> None:
    """More rows than devices do not make a batch that they divide."""
    mesh = _mesh(DP)
    expected = ("dp", "fsdp") if split else ()
    assert sharded.batch_parts(mesh) == 4 and sharded.batch_axes(mesh, rows) == expected
    assert sharded.spec(mesh, "bth", rows) == PartitionSpec(expected or None, None, ("tp", "rep"))
    assert spec(mesh, ("batch", None, "heads"), (rows, 6, 8)) == sharded.spec(mesh, "bth", rows)


def test_six_rows_on_four_devices() -> None:
    mesh = _mesh(DP)
    q, k, v = (jnp.tile(_random(d, i), (2, 1, 1, 1))[:6] for i, d in enumerate(QKV.values()))
    run = partial(attention, q, k, v)
    assert rel(jax.jit(partial(run, mesh=mesh))(), jax.jit(run)()) < 1e-5


def test_mesh_axes_are_named_in_one_place() -> None:
    folder = Path(sharded.__file__).parent
    named = re.compile(r"""["'](dp|fsdp|sp|tp|rep)["']""")
    files = [file for file in folder.rglob("*.py") if named.search(file.read_text())]
    assert files == [folder / "sharded.py"]


def test_communication_is_seen() -> None:
    mesh = _mesh("tp2 rep4")
    x = _place(_random("bthd", 0), "bthd", mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    total = jax.jit(jnp.sum).lower(x).compile()
    copied = jax.jit(lambda x: x, out_shardings=whole).lower(x).compile()
    assert _collectives(total) == {"all-reduce": 1}
    assert _collectives(copied).keys() == {"all-gather"}
    assert _group_size("{{0,1,2,3},{4,5,6,7}}") == 4 and _group_size("[8,1]<=[8]") == 1
