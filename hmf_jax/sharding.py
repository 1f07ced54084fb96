"""Device meshes, and the one table that says which dimension of a tensor lives on which mesh axis.

A user's mesh has the axes "dp" (data parallel), "fsdp" (data parallel, parameters split too), "sp"
(sequence parallel: tokens of a row, parameters split too) and "tp" (tensor parallel: heads, MLP
columns, vocabulary). A model runs on a mesh with one more axis, "rep": where there are more tensor
parallel devices than key/value heads, "tp" is split into tp x rep, and key/value heads
(projections, convolution channels, caches) are replicated over "rep".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hmf_jax.options import Backbone, check_int
from hmf_jax.pallas_kernels.sharded import AXES, batch_axes, batch_parts

BATCH_AXES = AXES.batch

# Dimension name -> mesh axes. Dimensions without a name stay whole.
TABLE: dict[str, tuple[str, ...]] = {
    "batch": AXES.batch,
    "tokens": AXES.tokens,
    "embed": AXES.embed,
    "heads": AXES.heads,
    "kv_heads": AXES.kv_heads,
    "mlp": AXES.heads,
    "experts": AXES.heads,
    "vocab": AXES.vocab,
}


def make_mesh(
    *, dp: int = 1, fsdp: int = 1, sp: int = 1, tp: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Build a device mesh with the axes ("dp", "fsdp", "sp", "tp").

    Args:
      dp: data parallel groups; each holds a copy of what the other axes leave.
      fsdp: data parallel devices that also split the parameters.
      sp: sequence parallel devices, for training on rows too long for one: they split the tokens of
        each row, and the parameters; sp x tp must divide the key/value heads.
      tp: tensor parallel devices; must divide the attention heads of the model.
      devices: the devices to use, default all; their number must be dp * fsdp * sp * tp.

    Raises:
      ValueError: the product does not match the number of devices, or a size is less than 1.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"dp": dp, "fsdp": fsdp, "sp": sp, "tp": tp}
    shape = tuple(check_int(name, size, 1) for name, size in sizes.items())
    if math.prod(shape) != len(devices):
        needed = math.prod(shape)
        fewer = f"; pass devices=jax.devices()[:{needed}] to use fewer"
        raise ValueError(
            f"dp={dp} x fsdp={fsdp} x sp={sp} x tp={tp} needs {needed} devices, but there are "
            f"{len(devices)}{fewer if needed < len(devices) else ''}."
        )
    return Mesh(np.asarray(devices).reshape(shape), ("dp", "fsdp", "sp", "tp"))


def for_model(mesh: Mesh | None, config: Backbone) -> Mesh | None:
    """The mesh a model of this config runs on: axes ("dp", "fsdp", "sp", "tp", "rep").

    Args:
      mesh: any mesh whose axes are among these (absent ones count as 1), or None.
      config: gives the numbers of heads and experts that "tp" must divide.

    Raises:
      ValueError: foreign axis names, or a tensor parallel size that does not divide the model.
    """
    if mesh is None:
        return None
    names = ("dp", "fsdp", "sp", "tp", "rep")
    foreign = set(mesh.axis_names) - set(names)
    if foreign:
        raise ValueError(
            f"Mesh axes {sorted(foreign)} are unknown; use make_mesh(dp=, fsdp=, sp=, tp=)."
        )
    order = [a for a in names if a in mesh.axis_names]
    devices = np.transpose(mesh.devices, [mesh.axis_names.index(a) for a in order])
    size = {a: mesh.shape.get(a, 1) for a in names}
    tp = size["tp"] * size["rep"]
    kv_heads, moe, linear = config.num_key_value_heads, config.moe, config.linear
    counts = {"num_attention_heads": config.num_attention_heads}
    if moe is None or moe.every > 1 or moe.dense_layers:
        counts["intermediate_size"] = config.intermediate_size
    counts["vocab_size"] = config.vocab_size
    if moe is not None:
        counts["num_experts"] = moe.num_experts
        counts["shared_expert_intermediate_size"] = moe.shared_intermediate_size or 0
    if linear is not None:
        counts["linear_num_value_heads"] = linear.num_value_heads
    for what, n in counts.items():
        if n % tp:
            raise ValueError(f"tp={tp} does not divide {what}={n}; choose a tp that does.")
    if kv_heads % tp and tp % kv_heads:
        raise ValueError(
            f"tp={tp} neither divides num_key_value_heads={kv_heads} nor is a multiple of it; "
            f"choose a tp that is."
        )
    kv = min(tp, kv_heads)
    # Fewer heads than devices are whole on "rep", queries and keys of linear layers, too.
    if linear is not None and linear.num_key_heads % kv:
        n = linear.num_key_heads
        raise ValueError(
            f"tp={tp} does not divide linear_num_key_heads={n}; choose a tp that does."
        )
    sp, parts = size["sp"], size["fsdp"] * size["sp"]
    if config.hidden_size % parts:
        raise ValueError(
            f"fsdp={size['fsdp']} x sp={sp} does not divide hidden_size={config.hidden_size}."
        )
    for what, n in {
        "num_key_value_heads": kv_heads,
        "linear_num_key_heads": linear.num_key_heads if linear is not None else 0,
    }.items():
        if sp > 1 and n % (sp * tp):
            raise ValueError(
                f"sp={sp} x tp={tp} does not divide {what}={n}: operators exchange tokens for "
                f"heads. Use fsdp for more devices."
            )
    return Mesh(devices.reshape(size["dp"], size["fsdp"], sp, kv, tp // kv), names)


def row_parts(mesh: Mesh) -> int:
    """How many parts the mesh splits the rows of a batch into: dp x fsdp."""
    return batch_parts(mesh)


def spec(mesh: Mesh, dims: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """PartitionSpec of an array whose axes carry these dimension names (see `TABLE`).

    A batch that the data axes do not divide stays whole on every device.
    """
    axes: list[tuple[str, ...] | None] = []
    for dim, n in zip(dims, shape, strict=True):
        names = batch_axes(mesh, n) if dim == "batch" else TABLE.get(dim or "")
        axes.append(names or None)
    return PartitionSpec(*axes)


def named_sharding(
    mesh: Mesh | None, dims: Sequence[str | None], shape: Sequence[int]
) -> NamedSharding | None:
    """`spec` on a mesh; None without one."""
    return None if mesh is None else NamedSharding(mesh, spec(mesh, dims, shape))


def constrain(x: jax.Array, mesh: Mesh | None, *dims: str | None) -> jax.Array:
    """Tell the compiler how an activation is split (no-op without a mesh)."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(mesh, dims, x.shape)))
