"""Models of every base family on eight devices: what one device computes, and no more traffic."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.options import LinearHeads
from hmf_jax.sharding import for_model, make_mesh
from tests.families.tiny import FAMILIES, OPTIONS, SIX, tiny_family
from tests.sharding.test_model import REDUCES, collectives, decode
from tests.util import mesh_of, place, random_model, rel

# Heads that two devices can share, in the families whose tiny model has too few.
EVEN: dict[str, dict[str, Any]] = {"qwen2": dict(num_attention_heads=14, num_key_value_heads=2)}
MESHES = [dict(tp=2), dict(dp=2, fsdp=2, tp=2), dict(fsdp=8)]


def even(family: str, kinds: tuple[str, ...] = SIX, **changes):
    return tiny_family(family, kinds, **{**EVEN.get(family, {}), **changes})


@pytest.mark.slow  # test_model.py has experts and output gates in the default suite
@pytest.mark.parametrize(
    ("family", "kinds", "meshes"),
    [(name, SIX, MESHES) for name in FAMILIES]
    # More devices than key heads of linear layers.
    + [("qwen3_next", ("GKA", "GDN"), [dict(tp=4)])],
)
def test_every_mesh_gives_the_single_device_logits(family, kinds, meshes):
    with jax.enable_x64(True):
        config = even(family, kinds)
        model = random_model(config, jnp.float64, seed=1)
        tokens = jax.random.randint(jax.random.key(0), (4, 10), 0, 64)
        cuts = (8, 9, 10) if kinds == SIX else (5, 6)
        wanted = decode(model, tokens, cuts)
        for mesh in meshes:
            got = decode(place(model, config, mesh_of(mesh)), tokens, cuts)
            for a, b in zip(got, wanted, strict=True):
                assert rel(a, b) < 1e-9, mesh


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("T", [1, 6])
def test_collectives(family, T):
    """Experts, gates and heads of their own add none: one all-reduce per mixer (two in B'MOJO-F),
    one per MLP, one for the split embedding."""
    mesh = make_mesh(tp=2, devices=jax.devices()[:2])
    found, text = collectives(SIX, mesh, T, **{**OPTIONS[family], **EVEN.get(family, {})})
    expected = 1 + sum(REDUCES[kind] + 1 for kind in SIX)
    assert found == {"all-reduce": expected}, f"{found}\n{text}"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_split_sequences(family):
    """Packed, padded rows whose tokens are split over sp."""
    with jax.enable_x64(True):
        config = even(family, num_key_value_heads=2)
        model = random_model(config, jnp.float64, seed=1)
        split = place(model, config, make_mesh(dp=2, fsdp=2, sp=2))
        tokens = jax.random.randint(jax.random.key(0), (4, 24), 0, 64)
        ids = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]] * 2, 6, axis=1))
        call = jax.jit(lambda m, t, ids: m(t, segment_ids=ids)[0])
        np.testing.assert_allclose(call(split, tokens, ids), call(model, tokens, ids), atol=1e-9)


@pytest.mark.parametrize(
    ("linear", "tp", "message"),
    [
        (LinearHeads(2, 6, 8), 4, "tp=4 does not divide linear_num_value_heads=6"),
        (LinearHeads(3, 6, 8), 2, "tp=2 does not divide linear_num_key_heads=3"),
    ],
)
def test_heads_of_linear_layers_that_do_not_divide(linear, tp, message):
    config = tiny_family("qwen3_next", ("GDN",), linear=linear, num_key_value_heads=2)
    with pytest.raises(ValueError, match=message):
        for_model(make_mesh(tp=tp, devices=jax.devices()[:tp]), config)
