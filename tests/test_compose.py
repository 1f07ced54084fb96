"""State composition: recorded states and logits, laws, what the parts' rows leave behind."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hmf_jax
from hmf_jax.composition import _merge, _prefill, compose
from hmf_jax.config import RopeConfig
from hmf_jax.mixers.attention import chronological
from hmf_jax.mixers.mamba2 import picaso_weights
from tests import goldens
from tests.util import mesh_of, place, random_model, rel, tiny_config

build = functools.cache(random_model)
rng = np.random.default_rng(0)
CONTEXT, QUERY, PREFIX = (rng.integers(0, 64, n) for n in (22, 5, 3))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n == "picaso_gdn" else n
        for n in goldens.cases("compose")
    ],
)
def test_recorded_by_the_original(name: str) -> None:
    """States after the question, and the logits after it, for all that the original can compose.

    Its "sw" keeps all keys and values, as "concat" does. In float64: GKA amplifies rounding where
    states begin empty with the question.
    """
    directory = goldens.golden(name)
    expected = goldens.expected(directory)
    runs = json.loads((directory / "case.json").read_text())["compose"]
    model = hmf_jax.from_pretrained(directory, dtype=jnp.float64, progress=False)
    (ids,) = expected["input_ids"]
    compared = 0
    for kind, run in runs.items():
        if isinstance(run, str):  # the error that it raises
            continue
        n = run["query_len"]
        state = compose(
            model,
            ids[:-n],
            run["num_chunks"],
            prefix=run["prefix"],
            kv="full" if kind.startswith("full") else "concat",
            ssm="fuse" if "fuse" in kind else "soup" if "soup" in kind else "zero",
            sequential="seqpos" in kind,
        )
        _, state = model(ids[None, -n:-1], state=state)
        logits, _ = model(ids[None, -1:], state=state)
        assert state is not None
        assert int(state.length[0]) == run["kv_len"], kind
        assert int(state.position[0]) == run["seqlen_offset"], kind
        np.testing.assert_allclose(logits[0], expected[f"{kind}.logits"], atol=3e-5)
        for theirs, ours in (("h_kk",) * 2, ("h_kv",) * 2, ("recurrent", "s"), ("ssm", "s")):
            if (x := expected.get(f"{kind}.0.{theirs}")) is not None:
                got = getattr(state.layers[0], ours)[0]
                assert rel(got, x) < 1e-5, (kind, theirs)
                compared += 1
        for field in ("conv_q", "conv_k", "conv_v"):
            if (x := expected.get(f"{kind}.0.{field}")) is not None:
                assert rel(getattr(state.layers[0], field)[0].T, x[:, 1:]) < 1e-5, (kind, field)
    assert compared >= 5


@pytest.fixture
def model(x64):
    """All six kinds, in float64 (rotations are float32)."""
    return build(tiny_config(("*", "SWA", "BMF", "GKA", "GDN", "M2")), jnp.float64)


def logits_after(model, state, tokens=QUERY) -> jax.Array:
    return model(jnp.array(tokens)[None], state=state)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["concat", "last", "full"])
def test_one_part_is_an_ordinary_prefill(model, kv: str) -> None:
    prefix = [] if kv == "full" else list(PREFIX)
    state = compose(model, CONTEXT, 1, prefix=prefix, kv=kv, prefill_chunk=16)
    whole = jnp.array([*prefix, *CONTEXT, *QUERY])[None]
    expected = model(whole)[0][:, -len(QUERY) :]
    assert rel(logits_after(model, state), expected) < 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_one_part_with_queries_that_grow_with_their_position() -> None:
    """Half of each head rotated, a gate behind attention; the question has another scale."""
    rope = RopeConfig(
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=8,
        partial_rotary_factor=0.5,
        llama_4_scaling_beta=0.5,
    )
    model = build(tiny_config(("*", "SWA", "BMF"), rope=rope, output_gate=True), jnp.float64)
    state = compose(model, CONTEXT, 1, prefix=PREFIX)
    expected = model(jnp.array([*PREFIX, *CONTEXT, *QUERY])[None])[0][:, -len(QUERY) :]
    assert rel(logits_after(model, state), expected) < 1e-6


@jax.jit
def prefill(model, tokens):
    return model(tokens, state=model.init_state(1, 32))[1]


def read_alone(model, chunks: int):
    """Prefix and part of each row, and the state [1, ...] after it."""
    size = math.ceil(len(CONTEXT) / chunks)
    parts = [CONTEXT[at : at + size] for at in range(0, len(CONTEXT), size)]
    rows = [[*PREFIX, *part] for part in parts]
    return [(row, prefill(model, jnp.array([row]))) for row in rows]


# parts shorter and longer than the windows, and a rest
@pytest.mark.parametrize("chunks", [8, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kv", ["concat", "last"])
def test_keys_and_values_follow_each_other(model, chunks: int, kv: str) -> None:
    """Caches and windows hold the newest tokens of the prefix and the parts, each read alone."""
    state = compose(model, CONTEXT, chunks, prefix=PREFIX, kv=kv)
    alone = read_alone(model, chunks)
    assert state.position.tolist() == [max(len(row) for row, _ in alone)]
    alone = alone if kv == "concat" else alone[-1:]
    new = [len(row) - (len(PREFIX) if i else 0) for i, (row, _) in enumerate(alone)]
    assert state.length.tolist() == [sum(new)]

    for field in ("k", "v"):
        rows = [shown(state, jnp.array([len(row)]), field) for row, state in alone]
        for name, got in shown(state, state.length, field).items():
            tails = [row[name][0, -n:] for row, n in zip(rows, new, strict=True)]
            expected = np.concatenate(tails)
            width = min(got.shape[1], len(expected))
            assert rel(got[0, -width:], expected[-width:]) < 1e-6, (field, name)


def shown(state, n, field: str) -> dict[str, jax.Array]:
    """What caches hold of a row of n [1] tokens: keys or values [1, W, K, D], the newest last."""
    full, window, bmojo = (getattr(layer, field) for layer in state.layers[:3])
    pending = getattr(state.layers[2], f"{field}_pending")
    W = pending.shape[1]
    fading = [chronological(x, n) for x in (bmojo[:, W:], pending)]
    return {
        "cache": full[:, : int(n[0])],
        "window": chronological(window, n),
        "recent": chronological(bmojo[:, :W], n),
        "fading": jnp.concatenate(fading, axis=1),
    }


def test_states_are_means_or_nothing(model) -> None:
    """Of what the parts leave when read alone, the last and shorter one not filled up."""
    alone = [state.layers for _, state in read_alone(model, 8)]
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *alone)
    soup, zero = (compose(model, CONTEXT, 8, prefix=PREFIX, ssm=x).layers for x in ("soup", "zero"))
    inner = lambda layers: (layers[2].inner, *layers[3:])  # noqa: E731
    for got, nothing, expected in zip(*map(inner, (soup, zero, mean)), strict=True):
        if hasattr(expected, "log_decay"):
            expected = dataclasses.replace(expected, log_decay=8 * expected.log_decay)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
        assert not any(x.any() for x in jax.tree.leaves(nothing))
    with pytest.raises(ValueError, match="cannot be fused"):
        compose(model, CONTEXT, 4, ssm="fuse")


@pytest.mark.slow
def test_fused_states() -> None:
    """GKA: the sum. Mamba2: the mean over all orders of the parts."""
    with jax.enable_x64(True):
        model = build(tiny_config(("GKA", "M2")), jnp.float64)
        alone = [state.layers for _, state in read_alone(model, 4)]
        gka, mamba = compose(model, CONTEXT, 4, prefix=PREFIX, ssm="fuse").layers
        for field in ("h_kk", "h_kv"):
            assert rel(getattr(gka, field), sum(getattr(a[0], field) for a in alone)) < 1e-6
        orders = []
        for order in itertools.permutations(a[1] for a in alone):
            s = jnp.zeros_like(mamba.s)
            for part in order:
                s = jnp.exp(part.log_decay)[..., None, None] * s + part.s
            orders.append(s)
        assert rel(mamba.s, sum(orders) / len(orders)) < 1e-6


@pytest.mark.parametrize("length", [20, 17])  # the last part as long as the others, and shorter
@pytest.mark.parametrize("sequential", [False, True])
def test_positions(sequential: bool, length: int) -> None:
    """Parts start where the prefix ends, sequential ones where the part before has ended: there are
    no fillers, which would move a shorter part, or what follows it, away."""
    model = build(tiny_config(("*",)), jnp.float32)
    state = compose(model, CONTEXT[:length], 2, prefix=PREFIX, sequential=sequential)
    size = math.ceil(length / 2)
    second = 3 + size if sequential else 3
    at = [*range(3 + size), *range(second, second + length - size)]
    # Keys of the first layer depend on nothing but a token and its position.
    tokens, at = (
        jnp.array([[*x, *[0] * (20 - length)]]) for x in ([*PREFIX, *CONTEXT[:length]], at)
    )
    _, expected = prefill_at(model, tokens, at)
    n = 3 + length
    assert rel(state.layers[0].k[:, :n], expected.layers[0].k[:, :n]) < 1e-6
    after = 3 + length if sequential else 3 + size
    assert (state.position.tolist(), state.length.tolist()) == ([after], [n])


@jax.jit
def prefill_at(model, tokens, positions):
    return model(tokens, positions=positions, state=model.init_state(1, 64))


def test_weights_of_one_and_of_equal_parts() -> None:
    weights = jax.jit(picaso_weights)
    np.testing.assert_allclose(weights(jnp.array([[-3.0]])), 1)
    np.testing.assert_allclose(weights(jnp.zeros((5, 2))), 1, rtol=1e-6)
    np.testing.assert_allclose(weights(jnp.full((4,), -1e4)), 0.25, rtol=1e-6)


@pytest.mark.slow
def test_generation_continues_a_composed_state() -> None:
    """Greedy tokens are those of a loop by hand; the state can be used again."""
    model = build(tiny_config(("GKA", "*", "SWA")), jnp.float32)
    state = compose(model, CONTEXT, 3, prefix=PREFIX, capacity=64)
    first, again = (
        model.generate([QUERY.tolist()], state=state, max_new_tokens=9, eos_ids=())[0].tokens
        for _ in range(2)
    )
    logits, after = model(jnp.array(QUERY)[None], state=state)
    expected = []
    for _ in range(9):
        expected.append(int(jnp.argmax(logits[0, -1])))
        logits, after = model(jnp.array([[expected[-1]]]), state=after)
    assert first == again == expected
    full = model.generate([QUERY.tolist()], state=state, max_new_tokens=99, eos_ids=())[0]
    assert full.finish_reason == "capacity"
    assert len(full.tokens) == 64 - int(state.length[0]) - len(QUERY)
    with pytest.raises(ValueError, match="leave out slots or state"):
        model.generate([QUERY.tolist()], state=state, slots=1)
    with pytest.raises(ValueError, match="1 rows of 64 tokens"):
        model.generate([QUERY.tolist()] * 2, state=state)
    with pytest.raises(ValueError, match="tokens already held"):
        model.generate([[1] * 60], state=state)
    with pytest.raises(ValueError, match="max_position_embeddings=512 allows"):
        model.generate([QUERY.tolist()], state=model.init_state(1, 513))


@pytest.mark.slow
def test_on_a_mesh() -> None:
    config = tiny_config(("GKA", "*", "SWA"))
    model, mesh = build(config, jnp.float32), mesh_of(dict(tp=2))
    one, two = (
        logits_after(m, compose(m, CONTEXT, 3, prefix=PREFIX, capacity=64))
        for m in (model, place(model, config, mesh))
    )
    assert rel(two, one) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(chunks=0), "chunks must be an integer >= 1, got 0"),
        (dict(chunks=2.0), "chunks must be an integer"),
        (dict(chunks="2"), "chunks must be an integer"),
        (dict(chunks=23), "between 1 and the 22"),
        (dict(chunks=2, kv="concatenate"), "choose one of concat, last, full"),
        (dict(chunks=2, ssm="mean"), "choose one of soup, fuse, zero"),
        (dict(chunks=2, kv="full", prefix=[1]), "start with the prefix"),
        (dict(chunks=2, prefix=[64]), "prefix holds token id 64, outside the vocabulary of 64"),
        (
            dict(chunks=2, prefix="You are"),
            "prefix is text; .* encode it to token ids.$",
        ),
        (dict(chunks=2, context=[]), "context is empty"),
        (dict(chunks=2, context=None), "context must be a flat list"),
        (dict(chunks=2, context=CONTEXT[None]), "context must be a flat list"),
        (dict(chunks=2, context=[0.5, 1.0]), "context holds float64, not integer token ids"),
        (dict(chunks=2, context=[[1, 2], [3]]), "context must be a flat list"),
        (dict(chunks=2, sequential="no"), "sequential='no' must be True or False"),
        (dict(chunks=2, prefill_chunk=0), "prefill_chunk must be an integer >= 1"),
        (dict(chunks=2, num_iter=-1), "num_iter must be an integer >= 0, got -1"),
        (dict(chunks=2, solver="cg"), "no layers with a solver"),
        (dict(chunks=2, capacity=22), "leaves no room"),
        (dict(chunks=2, capacity=64.0), "capacity must be an integer"),
        (dict(chunks=2, capacity=600), "goes beyond"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    model = build(tiny_config(("*",)), jnp.float32)
    with pytest.raises(ValueError, match=message) as caught:
        compose(model, **{"context": CONTEXT, **options})
    assert "\n" not in str(caught.value)


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match="model must be a HybridLM, not str"):
        compose("models/tiny", CONTEXT, 2)  # type: ignore[arg-type]


def test_contexts_of_similar_lengths_share_programs() -> None:
    """Of any length, prefix and rest, as long as the number of parts is the same."""
    model = build(tiny_config(("SWA", "*"), max_position_embeddings=4096), jnp.float32)
    programs: Any = (_prefill, _merge)
    start = [program._cache_size() for program in programs]
    for length, prefix in ((20, 3), (13, 0), (22, 2), (6, 1)):
        state = compose(model, CONTEXT[:length], 3, prefix=PREFIX[:prefix])
        assert state.length.tolist() == [length + prefix]
    assert [program._cache_size() - n for program, n in zip(programs, start, strict=True)] == [1, 1]


def test_a_context_longer_than_the_model_has_positions() -> None:
    config = tiny_config(("*", "GKA"), max_position_embeddings=16)
    model = build(config, jnp.float32)
    state = compose(model, CONTEXT, 4)
    assert state.length.tolist() == [22] and state.position.tolist() == [6]
    assert state.capacity == 22 + 10
    assert np.isfinite(logits_after(model, state)).all()
    others: list[dict[str, Any]] = [dict(chunks=1), dict(chunks=4, sequential=True)]
    for options in [*others, dict(chunks=4, kv="full")]:
        with pytest.raises(ValueError, match="use more chunks"):
            compose(model, CONTEXT, **options)
