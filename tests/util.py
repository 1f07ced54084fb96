"""Helpers shared by the tests."""

from __future__ import annotations

import numpy as np


def rel(actual, expected) -> float:
    """Relative error ||a - b|| / ||b|| over the whole tensor, in float64."""
    a = np.asarray(actual, np.float64)
    b = np.asarray(expected, np.float64)
    assert a.shape == b.shape, f"shape {a.shape}, expected {b.shape}"
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))


def tiny_config(kinds: tuple[str, ...], **changes):
    """A config small enough to compile in a second; windows are shorter than the test sequences."""
    from hmf_jax.config import BMojoConfig, GKAConfig, HybridConfig, SWAConfig

    fields = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        layer_kinds=kinds,
        initializer_range=0.2,
        gka=GKAConfig(chunk_size=8),
        swa=SWAConfig(5),
        bmojo=BMojoConfig(window_size=4, tie_attn_weights=True, ssm_mixer="GKA"),
    )
    return HybridConfig(**{**fields, **changes})


def random_model(config, dtype, seed: int = 0):
    """A model whose every parameter matters (a fresh one hardly uses its convolutions, gates)."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hmf_jax.model import HybridLM

    rng = np.random.default_rng(seed)
    model = nnx.eval_shape(lambda: HybridLM(config, dtype=dtype))

    def value(path, p: nnx.Variable) -> nnx.Variable:
        name, x = str(path), rng.standard_normal(p.shape)
        if "A_log" in name:
            x = 0.3 + 0.8 * x
        elif "dt_bias" in name:
            x = 0.8 * x - 3.0
        elif "_rep" in name:
            x = np.kron(np.eye(p.shape[1]), np.ones((p.shape[0] // p.shape[1], 1))) + 0.2 * x
        elif "conv1d" in name or "bias" in name:
            x = 0.4 * x
        elif len(p.shape) == 1:
            x = np.maximum(1 + 0.25 * x, 0.2)
        elif "embed" not in name:
            x = x / p.shape[-2] ** 0.5
        return p.replace(jnp.asarray(x, p.dtype))

    is_param = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return jax.tree_util.tree_map_with_path(value, model, is_leaf=is_param)


def mesh_of(sizes: dict[str, int]):
    """A mesh over the first of the fake devices."""
    import math

    import jax

    from hmf_jax.sharding import make_mesh

    return make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])


def place(model, config, mesh):
    """The parameters of a model on a mesh."""
    import jax

    from hmf_jax.model import HybridLM

    target = jax.eval_shape(lambda: HybridLM(config, dtype=model.dtype, mesh=mesh))
    moved = jax.device_put(jax.tree.leaves(model), jax.tree.leaves(target.shardings()))
    return jax.tree.unflatten(jax.tree.structure(target), moved)
