"""Projections with a trained product of two thin matrices beside them, and quantised ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hmf_jax.layers import exact, one_row_twice, untabulated
from hmf_jax.moe import Experts
from hmf_jax.pallas_kernels import grouped_matmul
from hmf_jax.sharding import named_sharding

Array = jax.Array
Quantize = Literal["int8", "nf4"]

# Rows of a column of the kernel that share a scale; None: all of them.
_TILES: dict[str, int | None] = {"int8": None, "nf4": 64}


class Initial(NamedTuple):
    """What an adapter begins with: A [in, r] and B [r, out], those of experts with [E] in front,
    and alpha."""

    A: Array
    B: Array
    alpha: float


class LoRALinear(nnx.Module):
    """y = x W + b + (alpha / r) (x A) B with W [in, out], A [in, r], B [r, out].

    A and B are float32; x A B is computed in the dtype of x. W is either `kernel`, or quantised as
    `qvalue` [in, out] (int8 or 4-bit indices) times `scale` [in / tile, out].
    """

    def __init__(
        self,
        linear: nnx.Linear,
        initial: Initial,
        quantize: Quantize | None = None,
        mesh: Mesh | None = None,
    ):
        rows, columns = self.dims = linear.kernel.get_metadata()["dims"]
        self.lora_A = _param(initial.A, (rows, None), mesh)
        self.lora_B = _param(initial.B, (None, columns), mesh)
        self.alpha, self.rank = float(initial.alpha), initial.A.shape[-1]
        self.bias, self.quantized = linear.bias, quantize
        if quantize is None:
            self.kernel = linear.kernel
        else:
            qvalue, scale = _quantize(linear.kernel[...], quantize)
            self.qvalue = _param(qvalue, self.dims, mesh)
            self.scale = _param(scale, (None, columns), mesh)

    def __call__(self, x: Array) -> Array:
        """x [B, T, in] -> y [B, T, out]."""
        return self.together(x, ())[0]

    @untabulated
    def together(self, x: Array, others: Sequence[Self]) -> list[Array]:
        """The products of this one and of others with the same x, those with all A as one.

        A product with a thin matrix takes as long as reading x does.
        """
        adapters = [self, *others]
        ends = np.cumsum([a.rank for a in adapters])[:-1]

        def run(x: Array) -> list[Array]:
            # Scaling A takes no time; scaling what is [B, T, out] would.
            A = [a.lora_A[...] * (a.alpha / a.rank) for a in adapters]
            thin = jnp.split(x @ jnp.concatenate(A, axis=1).astype(x.dtype), ends, axis=-1)
            return [
                a._frozen(x) + u @ a.lora_B[...].astype(x.dtype)
                for a, u in zip(adapters, thin, strict=True)
            ]

        return one_row_twice(run, x)

    def _frozen(self, x: Array) -> Array:
        """x W + b."""
        if (kind := self.quantized) is None:
            y = x @ self.kernel[...].astype(x.dtype)
        else:
            # The backward pass makes W again: it would otherwise be kept for every projection.
            def product(x: Array, qvalue: Array, scale: Array) -> Array:
                return x @ _dequantize(qvalue, scale, kind, x.dtype)

            y = jax.checkpoint(product)(x, self.qvalue[...], self.scale[...])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    @jax.jit
    def merged(self) -> Array:
        """W + (alpha / r) A B [in, out], computed in float32, in the dtype of W."""
        if self.quantized is None:
            W = self.kernel[...]
        else:
            scale = self.scale[...]
            W = _dequantize(self.qvalue[...], scale, self.quantized, scale.dtype)
        delta = self.lora_A[...] @ self.lora_B[...] * (self.alpha / self.rank)
        return (exact(W) + delta).astype(W.dtype)


class LoRAStack(nnx.Module):
    """The adapters of E matrices W [E, in, out], one each: A [E, in, r] and B [E, r, out], float32.

    Rows x [M, in] that are sorted by expert get (alpha / r) (x A) B, A and B of their expert,
    computed in the dtype of x.
    """

    def __init__(self, W: nnx.Param, initial: Initial, mesh: Mesh | None = None):
        experts, rows, columns = W.get_metadata()["dims"]
        self.lora_A = _param(initial.A, (experts, rows, None), mesh)
        self.lora_B = _param(initial.B, (experts, None, columns), mesh)
        self.alpha, self.rank = float(initial.alpha), initial.A.shape[-1]

    def __call__(self, x: Array, sizes: Array, impl: str) -> Array:
        """x [M, in], sizes [E] (how many rows each expert has) -> y [M, out]."""
        A, B = self.lora_A[...].astype(x.dtype), self.lora_B[...].astype(x.dtype)
        thin = grouped_matmul(x, A, sizes, impl=impl)
        return grouped_matmul(thin, B, sizes, impl=impl) * (self.alpha / self.rank)

    @jax.jit
    def merged(self, W: Array) -> Array:
        """W + (alpha / r) A B [E, in, out], computed in float32, in the dtype of W."""
        delta = self.lora_A[...] @ self.lora_B[...] * (self.alpha / self.rank)
        return (exact(W) + delta).astype(W.dtype)


class LoRAExperts(Experts):
    """Experts with adapters beside one of their two stacks, or both."""

    def __init__(self, experts: Experts, initial: Mapping[str, Initial], mesh: Mesh | None = None):
        """`initial`: "gate_up_proj", "down_proj" -> its adapters; without: it has none."""
        for name, W in stacks(experts):
            found = initial.get(name)
            setattr(self, name, W)
            setattr(self, f"{name}_lora", None if found is None else LoRAStack(W, found, mesh))

    def adapters(self) -> Iterator[tuple[str, LoRAStack]]:
        """Name of each stack that has adapters, and these."""
        for name, _ in stacks(self):
            if (found := getattr(self, f"{name}_lora")) is not None:
                yield name, found

    def product(self, name: str, x: Array, sizes: Array, impl: str) -> Array:
        y = super().product(name, x, sizes, impl)
        adapters = getattr(self, f"{name}_lora")
        return y if adapters is None else y + adapters(x, sizes, impl)


def stacks(experts: Experts) -> Iterator[tuple[str, nnx.Param]]:
    """Name and parameter of the two stacks of matrices, [E, in, out] each."""
    for name in ("gate_up_proj", "down_proj"):
        yield name, getattr(experts, name)


def check_quantize(quantize: str) -> None:
    if quantize not in _TILES:
        raise ValueError(f"quantize={quantize!r} is unknown; use one of {list(_TILES)} or None.")
    try:
        import qwix  # noqa: F401
    except ImportError as e:
        raise ImportError("quantised projections need qwix: pip install 'hmf-jax[train]'") from e


def _param(value: Array, dims: tuple[str | None, ...], mesh: Mesh | None) -> nnx.Param:
    sharding = named_sharding(mesh, dims, value.shape)
    return nnx.Param(value if sharding is None else jax.device_put(value, sharding), dims=dims)


@functools.partial(jax.jit, static_argnums=1)
def _quantize(W: Array, kind: str) -> tuple[Array, Array]:
    """W [in, out] as integers [in, out] and scales [in / tile, out].

    Column by column: so no device needs the columns of another.
    """
    import qwix

    tile = math.gcd(W.shape[0], _TILES[kind] or W.shape[0])
    array = jax.vmap(lambda w: qwix.quantize(w, kind, tiled_axes={0: tile}), 1, 1)(W)
    return array.qvalue, array.scale


def _dequantize(qvalue: Array, scale: Array, kind: str, dtype: Any) -> Array:
    import qwix

    array = qwix.QArray(qvalue, scale, qtype=kind)
    return jax.vmap(qwix.dequantize, 1, 1)(array).astype(dtype)
