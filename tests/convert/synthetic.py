"""Random checkpoints of any config, made from the mapping table."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hmf_jax import table
from hmf_jax.config import BMojoConfig, GDNConfig, GKAConfig, HybridConfig, Mamba2Config
from hmf_jax.convert.rows import by_tensor, tensor_shape
from hmf_jax.convert.safetensors_io import DTYPES, Pending, write

FLOAT32 = ("A_log", "dt_bias", "D")

# All kinds, every optional tensor, and odd convolution sizes.
FULL = HybridConfig.preset(
    "tiny",
    layer_kinds=("*", "SWA", "GKA", "GDN", "M2", "BMF"),
    gka=GKAConfig(kv_proj_rank=3, kv_learnable_residual=True, conv_size=3),
    gdn=GDNConfig(conv_bias=True, conv_size=5),
    mamba2=Mamba2Config(),
    bmojo=BMojoConfig(8, tie_attn_weights=False, ssm_mixer="M2"),
    attention_bias=True,
)


def tensors(config: HybridConfig) -> dict[str, np.ndarray]:
    """Checkpoint name -> random values; bfloat16, except float32 for A_log, dt_bias and D."""
    out = {}
    for name, blocks in by_tensor(table.entries(config)).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values = rng.standard_normal(tensor_shape(blocks)).astype(np.float32)
        float32 = name.rsplit(".", 1)[-1] in FLOAT32
        out[name] = values if float32 else values.astype(ml_dtypes.bfloat16)
    return out


def save(
    directory: Path,
    config: HybridConfig,
    values: Mapping[str, np.ndarray] | None = None,
    max_shard_size: int | str = "5GB",
) -> dict[str, np.ndarray]:
    """Writes config.json and the weights (default: random ones); returns the weights."""
    values = tensors(config) if values is None else dict(values)
    directory.mkdir(parents=True, exist_ok=True)
    names = {dtype: name for name, dtype in DTYPES.items()}
    pending = [Pending(n, names[v.dtype], v.shape, lambda v=v: v) for n, v in values.items()]
    write(directory, pending, max_shard_size)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    return values


def abstract(
    config: HybridConfig, dtype="bfloat16", mesh: jax.sharding.Mesh | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """What a model of this config would ask for; on a mesh, matrices are split over both axes."""
    out = {}
    for e in table.entries(config):
        shape = e.parameter_shape
        held = "float32" if e.path.rsplit(".", 1)[-1] in FLOAT32 else dtype
        sharding = None
        if mesh is not None:
            names = mesh.axis_names if len(shape) == 2 else (None,)
            fits = (
                a if a and n % mesh.shape[a] == 0 else None
                for a, n in zip(names, shape, strict=True)
            )
            sharding = NamedSharding(mesh, PartitionSpec(*fits))
        out[e.path] = jax.ShapeDtypeStruct(shape, held, sharding=sharding)
    return out
