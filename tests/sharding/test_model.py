"""A model on eight devices is the model on one device, and communicates only where it must."""

from __future__ import annotations

import collections
import re

import jax
import jax.numpy as jnp
import pytest

from hmf_jax.config import BMojoConfig, GKAConfig
from hmf_jax.model import HybridLM
from hmf_jax.sharding import for_model, make_mesh
from tests.util import rel, tiny_config

SIX = ("*", "GKA", "SWA", "GDN", "BMF", "M2")
HEADS = dict(num_attention_heads=8, num_key_value_heads=4, intermediate_size=64)
MESHES = {
    "tp1": dict(tp=1),
    "tp2": dict(tp=2),
    "tp4": dict(tp=4),
    "tp8 (kv heads replicated)": dict(tp=8),
    "fsdp2 x tp4": dict(fsdp=2, tp=4),
    "dp2 x fsdp2 x tp2": dict(dp=2, fsdp=2, tp=2),
}


def mesh_of(sizes: dict[str, int]):
    n = sizes.get("dp", 1) * sizes.get("fsdp", 1) * sizes.get("tp", 1)
    return make_mesh(**sizes, devices=jax.devices()[:n])


def place(model: HybridLM, config, mesh) -> HybridLM:
    """The parameters of a model on a mesh."""
    target = HybridLM.init(config, dtype=model.dtype, mesh=mesh)
    moved = jax.device_put(jax.tree.leaves(model), jax.tree.leaves(target.shardings()))
    return jax.tree.unflatten(jax.tree.structure(target), moved)


@pytest.fixture(scope="module")
def single():
    config = tiny_config(SIX, **HEADS)
    model = HybridLM.init(config, dtype=jnp.float32, seed=1)
    tokens = jax.random.randint(jax.random.key(0), (4, 12), 0, 64)
    return config, model, tokens, decode(model, tokens)


def decode(model, tokens):
    """Logits of a padded prefill, a continued prefill and four single tokens."""
    call = jax.jit(lambda m, t, s, ids: m(t, state=s, segment_ids=ids))
    mask = jnp.ones((4, 5), jnp.int32).at[0, :2].set(0)
    first, state = call(model, tokens[:, :5], model.init_state(4, 16), mask)
    out = [first[1:]]
    logits, state = call(model, tokens[:, 5:8], state, jnp.ones((4, 3), jnp.int32))
    out.append(logits)
    for i in range(8, 12):
        logits, state = call(model, tokens[:, i : i + 1], state, jnp.ones((4, 1), jnp.int32))
        out.append(logits)
    whole, _ = jax.jit(lambda m, t: m(t))(model, tokens)
    return [*out, whole]


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_single_device_logits(single, name):
    config, model, tokens, expected = single
    for a, b in zip(decode(place(model, config, mesh_of(MESHES[name])), tokens), expected):
        assert rel(a, b) < 1e-5


def collectives(kinds, mesh, T=1, **changes) -> tuple[collections.Counter, str]:
    """Collective operations in the compiled program of one call with a state."""
    config = tiny_config(kinds, **{**HEADS, **changes})
    model = HybridLM.init(config, dtype=jnp.float32, mesh=mesh)
    state = model.init_state(4, 32)
    if T == 1:
        _, state = jax.eval_shape(lambda: model(jnp.zeros((4, 2), jnp.int32), state=state))
        state = jax.tree.map(
            lambda a, b: jax.device_put(jnp.zeros(a.shape, a.dtype), b.sharding),
            state,
            dataclass_like(state, model.init_state(4, 32)),
        )
    step = jax.jit(lambda m, t, s: m(t, state=s))
    text = step.lower(model, jnp.zeros((4, T), jnp.int32), state).compile().as_text()
    found = re.findall(
        r"= \S+ (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        text,
    )
    return collections.Counter(found), text


def dataclass_like(state, other):
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(other))


REDUCES = {"*": 1, "SWA": 1, "GKA": 1, "GDN": 1, "M2": 1, "BMF": 2}


@pytest.mark.parametrize("tp", [4, 8])
@pytest.mark.parametrize("kind", SIX)
@pytest.mark.parametrize("T", [1, 6])
def test_collectives_of_a_layer(kind, tp, T):
    """One all-reduce per output projection and per MLP, one for the split embedding; no more."""
    found, text = collectives((kind, kind), make_mesh(tp=tp, devices=jax.devices()[:tp]), T)
    expected = 1 + 2 * (REDUCES[kind] + 1)
    assert found == {"all-reduce": expected}, f"{found}\n{text}"


@pytest.mark.parametrize("inner", ["GDN", "M2"])
def test_collectives_of_other_inner_mixers(inner):
    bmojo = BMojoConfig(4, False, inner)
    found, text = collectives(("BMF",), make_mesh(tp=8), bmojo=bmojo)
    assert found == {"all-reduce": 4}, f"{found}\n{text}"


def test_only_the_low_rank_input_is_gathered():
    """The low-rank key/value projection reads all heads: the original gathers them, too."""
    gka = GKAConfig(kv_proj_rank=4, kv_learnable_residual=True)
    found, text = collectives(("GKA",), make_mesh(tp=4, devices=jax.devices()[:4]), gka=gka)
    assert found["all-reduce"] + found["all-gather"] <= 3 + 4, f"{found}\n{text}"


def test_states_and_weights_are_split():
    model = HybridLM.init(tiny_config(SIX, **HEADS), mesh=make_mesh(fsdp=2, tp=4))
    state = model.init_state(4, 16)
    assert state.layers[1].h_kk.sharding.shard_shape(state.layers[1].h_kk.shape) == (2, 2, 16, 16)
    assert state.layers[0].k.sharding.shard_shape(state.layers[0].k.shape) == (2, 16, 1, 16)
    kernel = model.layers[1].mixer.q_proj.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 32)
    ring = HybridLM.init(tiny_config(SIX, **HEADS), mesh=make_mesh(tp=8)).init_state(4, 16)
    assert ring.layers[4].k.sharding.shard_shape((4, 8, 4, 16)) == (4, 8, 1, 16)


def test_bad_meshes():
    config = tiny_config(("*",), **HEADS)
    with pytest.raises(ValueError, match="needs 3 devices"):
        make_mesh(tp=3)
    with pytest.raises(ValueError, match="tp=3 does not divide num_attention_heads=8"):
        for_model(make_mesh(tp=3, devices=jax.devices()[:3]), config)
    odd = tiny_config(("*",), **{**HEADS, "num_attention_heads": 6, "num_key_value_heads": 3})
    with pytest.raises(ValueError, match="num_key_value_heads=3"):
        for_model(make_mesh(tp=2, devices=jax.devices()[:2]), odd)
    with pytest.raises(ValueError, match="axes"):
        for_model(jax.make_mesh((8,), ("model",)), config)
