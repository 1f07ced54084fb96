"""A model on eight devices is the model on one device, and communicates only where it must."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.config import BMojoConfig, GKAConfig
from hmf_jax.model import HybridLM
from hmf_jax.options import LinearHeads, MoEConfig
from hmf_jax.sharding import for_model, make_mesh, row_parts
from tests.util import mesh_of, place, random_model, rel, tiny_config

SIX = ("*", "GKA", "SWA", "GDN", "BMF", "M2")
HEADS = dict(num_attention_heads=8, num_key_value_heads=2, intermediate_size=64)
MESHES = {
    "tp1": dict(tp=1),
    "tp2": dict(tp=2),
    "tp4": dict(tp=4),
    "tp8": dict(tp=8),
    "fsdp2 x tp4": dict(fsdp=2, tp=4),
    "dp2 x fsdp2 x tp2": dict(dp=2, fsdp=2, tp=2),
}


@pytest.fixture(scope="module")
def single():
    with jax.enable_x64(True):  # so that a wrong sum cannot pass for rounding
        config = tiny_config(SIX, **HEADS)
        model = random_model(config, jnp.float64, seed=1)
        tokens = jax.random.randint(jax.random.key(0), (4, 10), 0, 64)
        yield config, model, tokens, functools.cache(lambda cuts: decode(model, tokens, cuts))


def decode(model, tokens, cuts):
    """Logits of a padded prefill of four tokens and of calls that continue it, up to each cut."""
    call = jax.jit(lambda m, t, s, ids: m(t, state=s, segment_ids=ids))
    mask = jnp.ones((4, 4), jnp.int32).at[0, :2].set(0)
    first, state = call(model, tokens[:, :4], model.init_state(4, 16), mask)
    out = [first[0, 2:], first[1:]]
    for a, b in zip((4, *cuts), cuts, strict=False):
        logits, state = call(model, tokens[:, a:b], state, jnp.ones((4, b - a), jnp.int32))
        out.append(logits)
    return out


@pytest.mark.parametrize(
    ("name", "cuts"),
    [("fsdp2 x tp4", (5, 6))]  # single tokens; the others also continue with several
    + [pytest.param(name, (8, 9, 10), marks=pytest.mark.slow) for name in MESHES],
)
def test_every_mesh_gives_the_single_device_logits(single, name, cuts):
    config, model, tokens, expected = single
    got = decode(place(model, config, mesh_of(MESHES[name])), tokens, cuts)
    for a, b in zip(got, expected(cuts), strict=True):
        assert rel(a, b) < 1e-9


def collectives(kinds, mesh, T=1, **changes) -> tuple[collections.Counter, str]:
    """Collective operations in the compiled program of one call with a state, and its text.

    The compiler may merge independent ones (when B'MOJO-F decodes, the fading token it makes is not
    read yet): a merged one returns a tuple and counts as many as that holds.
    """
    config = tiny_config(kinds, **{**HEADS, **changes})
    model = place(random_model(config, jnp.float32), config, mesh)
    step = jax.jit(lambda m, t, s: m(t, state=dataclasses.replace(s, fresh=T > 1)))
    args = model, jnp.zeros((4, T), jnp.int32), model.init_state(4, 32)
    text = step.lower(*args).compile().as_text()
    assert text is not None
    return count_collectives(text), text


def count_collectives(text) -> collections.Counter:
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = collections.Counter()
    for result, name in re.findall(rf" = (\(.*?\)|\S+) ({names})(?:-start)?\(", text):
        found[name] += len(re.findall(r"\w+\[", result))
    return found


REDUCES = {"*": 1, "SWA": 1, "GKA": 1, "GDN": 1, "M2": 1, "BMF": 2}


@pytest.mark.parametrize(
    ("tp", "kv_heads", "T"), [(8, 2, 1), pytest.param(4, 4, 6, marks=pytest.mark.slow)]
)
def test_collectives_of_a_model(tp, kv_heads, T):
    """One all-reduce per output projection and per MLP, one for the split embedding; no more."""
    mesh = make_mesh(tp=tp, devices=jax.devices()[:tp])
    found, text = collectives(SIX, mesh, T, num_key_value_heads=kv_heads)
    expected = 1 + sum(REDUCES[kind] + 1 for kind in SIX)
    assert found == {"all-reduce": expected}, f"{found}\n{text}"


@pytest.mark.parametrize("inner", [pytest.param("GDN", marks=pytest.mark.slow), "M2"])
def test_collectives_of_other_inner_mixers(inner):
    bmojo = BMojoConfig(4, False, inner)
    found, text = collectives(("BMF",), make_mesh(tp=8), bmojo=bmojo)
    assert found == {"all-reduce": 4}, f"{found}\n{text}"


def test_only_the_low_rank_input_is_gathered():
    """The low-rank key/value projection reads all heads: the original gathers them, too."""
    gka = GKAConfig(kv_proj_rank=4, kv_learnable_residual=True)
    found, text = collectives(("GKA",), make_mesh(tp=4, devices=jax.devices()[:4]), gka=gka)
    assert found["all-reduce"] + found["all-gather"] <= 3 + 4, f"{found}\n{text}"


MOE = MoEConfig(8, 3, 12, shared_intermediate_size=16)


def test_experts_take_one_all_reduce():
    """Tensor parallel devices have other experts and all tokens; nothing is sent between them. The
    output gates of attention are where its heads are."""
    config = tiny_config(("*",), **HEADS, moe=MOE, output_gate=True)
    model = random_model(config, jnp.float32)
    tokens = jax.random.randint(jax.random.key(0), (4, 3), 0, 64)
    call = jax.jit(lambda m, t: m(t)[0])
    split = place(model, config, make_mesh(tp=8))
    experts: Any = split.layers[0].mlp
    assert experts.experts.down_proj[...].sharding.shard_shape((8, 12, 32)) == (1, 12, 32)
    compiled = call.lower(split, tokens).compile()
    assert rel(compiled(split, tokens), call(model, tokens)) < 1e-5
    assert count_collectives(compiled.as_text()) == {"all-reduce": 3}  # embedding, mixer, MLP


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2 x tp4", "dp2 x fsdp2 x tp2"])
def test_experts_on_every_mesh(name):
    """Four rows, padded, and one row, which the data axes do not split."""
    with jax.enable_x64(True):
        config = tiny_config(("*", "GKA"), **HEADS, moe=MOE)
        model = random_model(config, jnp.float64, seed=1)
        split = place(model, config, mesh_of(MESHES[name]))
        tokens = jax.random.randint(jax.random.key(0), (4, 6), 0, 64)
        call = jax.jit(lambda m, t, n: m(t, lengths=n)[0])
        for rows, lengths in ((tokens, [6, 2, 0, 5]), (tokens[:1], [6])):
            got, expected = (call(m, rows, jnp.asarray(lengths)) for m in (split, model))
            for a, b, n in zip(got, expected, lengths, strict=True):
                assert rel(a[:n], b[:n]) < 1e-9


def test_states_and_weights_are_split():
    config = tiny_config(("GKA", "*", "BMF"), **HEADS)
    model = place(random_model(config, jnp.bfloat16), config, make_mesh(fsdp=2, tp=4))

    def shard(x):
        return x.sharding.shard_shape(x.shape)

    state = model.init_state(4, 16)
    assert shard(state.layers[0].h_kk) == (2, 2, 16, 16)
    assert shard(state.layers[0].conv_q) == (2, 3, 32)
    assert shard(state.layers[1].k) == (2, 16, 1, 16)  # 2 kv heads on 4 devices: 2 copies of each
    assert shard(state.layers[2].k) == (2, 8, 1, 16)
    mixer: Any = model.layers[0].mixer
    assert shard(mixer.q_proj.kernel[...]) == (16, 32)
    assert shard(mixer.k_proj.kernel[...]) == (16, 16)
    assert shard(model.layers[0].mlp.down_proj.kernel[...]) == (16, 16)
    assert shard(model.embed_tokens.embedding[...]) == (16, 16)


def test_bad_meshes():
    config = tiny_config(("*",), **HEADS)
    with pytest.raises(ValueError, match="needs 3 devices"):
        make_mesh(tp=3)
    with pytest.raises(ValueError, match="tp=3 does not divide num_attention_heads=8"):
        for_model(make_mesh(tp=3, devices=jax.devices()[:3]), config)
    sixth = dict(num_attention_heads=12, num_key_value_heads=4, intermediate_size=72, vocab_size=66)
    six = tiny_config(("*",), **{**HEADS, **sixth})
    with pytest.raises(ValueError, match="tp=6 neither divides num_key_value_heads=4"):
        for_model(make_mesh(tp=6, devices=jax.devices()[:6]), six)
    two = make_mesh(tp=2, devices=jax.devices()[:2])
    for name, odd in (("intermediate_size", 65), ("vocab_size", 63)):
        with pytest.raises(ValueError, match=f"tp=2 does not divide {name}={odd}"):
            for_model(two, dataclasses.replace(config, **{name: odd}))
    sparse = dataclasses.replace(config, intermediate_size=65, moe=MOE)  # no layer has that width
    assert for_model(two, sparse) is not None
    for what, change in (
        ("intermediate_size=65", dict(moe=dataclasses.replace(MOE, every=2))),
        ("num_experts=7", dict(moe=dataclasses.replace(MOE, num_experts=7))),
        (
            "shared_expert_intermediate_size=15",
            dict(moe=dataclasses.replace(MOE, shared_intermediate_size=15)),
        ),
        ("linear_num_key_heads=1", dict(linear=LinearHeads(1, 2, 16))),
    ):
        with pytest.raises(ValueError, match=f"tp=2 does not divide {what}"):
            for_model(two, dataclasses.replace(sparse, **change))
    both = dataclasses.replace(config, num_key_value_heads=4)
    with pytest.raises(ValueError, match="sp=2 x tp=4 does not divide num_key_value_heads=4"):
        for_model(make_mesh(sp=2, tp=4), both)
    assert for_model(make_mesh(sp=2, tp=2, fsdp=2), both) is not None
    odd = tiny_config(("*",), **{**HEADS, "num_attention_heads": 6, "num_key_value_heads": 3})
    with pytest.raises(ValueError, match="num_key_value_heads=3"):
        for_model(make_mesh(tp=2, devices=jax.devices()[:2]), odd)
    with pytest.raises(ValueError, match="axes"):
        for_model(jax.make_mesh((8,), ("model",)), config)


def test_axes_of_a_model():
    """Any order of axes is taken; "tp" beyond the key/value heads becomes "rep"."""
    config = tiny_config(("*",), **HEADS)
    for tp, split in ((1, (1, 1)), (2, (2, 1)), (4, (2, 2)), (8, (2, 4))):
        mesh = for_model(make_mesh(fsdp=8 // tp, tp=tp), config)
        assert mesh is not None
        assert dict(mesh.shape) == dict(dp=1, fsdp=8 // tp, sp=1, tp=split[0], rep=split[1])
        assert mesh.devices.ravel().tolist() == jax.devices()
    devices = np.asarray(jax.devices())
    turned = for_model(jax.sharding.Mesh(devices.reshape(2, 4), ("tp", "fsdp")), config)
    assert turned is not None and dict(turned.shape) | {"fsdp": 4, "tp": 2} == dict(turned.shape)
    assert turned.devices.ravel().tolist() == devices.reshape(2, 4).T.ravel().tolist()
    with pytest.raises(ValueError, match="dp must be an integer >= 1, got 0"):
        make_mesh(dp=0)
    bad: list[dict[str, Any]] = [dict(dp=3), dict(tp=16), dict(dp=2, fsdp=2)]
    for sizes in bad:
        with pytest.raises(ValueError, match="needs .* devices, but there are 8"):
            make_mesh(**sizes)
    assert make_mesh(dp=2, tp=4).axis_names == ("dp", "fsdp", "sp", "tp")
    assert row_parts(make_mesh(dp=2, fsdp=2, tp=2)) == 4


@pytest.mark.slow  # tests/engine generates on a mesh in the default suite
@pytest.mark.parametrize(("kinds", "tp"), [(("*", "GKA"), 2), (SIX, 2), (SIX, 4)])
def test_generation_agrees_token_by_token(kinds, tp):
    """Greedy, float32, prompts of different lengths, chunked prefill: several devices as one."""
    config = tiny_config(kinds, **HEADS)
    model = random_model(config, jnp.float32, seed=2)
    prompts = [list(range(3, 14)), [7, 1, 60, 5]]

    def tokens(model: HybridLM) -> list[list[int]]:
        found = model.generate(prompts, max_new_tokens=8, prefill_chunk=8, eos_ids=())
        return [list(g.tokens) for g in found]

    expected = tokens(model)
    assert len(set(expected[0] + expected[1])) > 4  # not one token over and over
    assert tokens(place(model, config, mesh_of(dict(tp=tp)))) == expected


def test_the_same_random_model_on_every_mesh():
    config = tiny_config(("M2", "*"), **HEADS)
    mesh = make_mesh(fsdp=2, tp=4)
    one, split = (HybridLM.init(config, dtype=jnp.float32, mesh=m, seed=3) for m in (None, mesh))
    leaves = map(jax.tree.leaves, (one, split, split.shardings()))
    for a, b, sharding in zip(*leaves, strict=True):
        assert b.sharding == sharding
        np.testing.assert_array_equal(a, b)


def test_states_made_in_a_program_are_split_too():
    config = tiny_config(("*", "BMF"), **HEADS)
    model = place(random_model(config, jnp.float32), config, make_mesh(fsdp=2, tp=4))
    made = jax.jit(lambda: model.init_state(2, 8).layers)()
    for a, b in zip(*map(jax.tree.leaves, (model.init_state(2, 8).layers, made)), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim) and not b.is_fully_replicated


@pytest.mark.parametrize("kinds", [("GKA", "SWA"), pytest.param(SIX, marks=pytest.mark.slow)])
def test_split_sequences(kinds):
    """Logits of packed, padded rows whose tokens are split over sp; no hidden state is whole."""
    with jax.enable_x64(True):
        config = tiny_config(kinds, **{**HEADS, "num_key_value_heads": 4})
        model = random_model(config, jnp.float64, seed=1)
        split = place(model, config, make_mesh(fsdp=2, sp=4))
        tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, 64)
        ids = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], 6, axis=1))
        call = jax.jit(lambda m, t, ids=None: m(t, segment_ids=ids)[0])
        np.testing.assert_allclose(call(split, tokens, ids), call(model, tokens, ids), atol=1e-9)
        text = call.lower(split, tokens).compile().as_text()
        assert text is not None
        assert " all-to-all" in text and not re.search(r"f64\[\d,24,32\]\S* all-gather", text)
    with pytest.raises(ValueError, match="does not divide 10 tokens; pad"):
        split(tokens[:, :10])
    with pytest.raises(ValueError, match="sp.*for training"):
        split.init_state(2, 24)
    with pytest.raises(ValueError, match="sp=8 x tp=1 does not divide num_key_value_heads=4"):
        for_model(make_mesh(sp=8), config)
    with pytest.raises(ValueError, match="fsdp=2 x sp=4 does not divide hidden_size=36"):
        for_model(make_mesh(fsdp=2, sp=4), dataclasses.replace(config, hidden_size=36))
