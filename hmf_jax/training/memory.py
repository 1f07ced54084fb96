"""The memory of a training step before it is compiled, and the remat that fills the device.

What a layer keeps for its backward pass is read off the trace of one block of each kind, under
each choice of `hmf_jax.training.remat`: with a policy of names it is exact. Without ("none") XLA
decides: results of elementwise operations are made again where that takes fewer bytes, unless a
product or a kernel reads them (`_after_fusion`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hmf_jax.block import Block, run_block
from hmf_jax.layers import exact_dtype
from hmf_jax.memory import device_bytes, size_text
from hmf_jax.mixers import Context
from hmf_jax.model import HybridLM
from hmf_jax.parameters import abstract_params
from hmf_jax.sharding import row_parts
from hmf_jax.training.devices import device_limit
from hmf_jax.training.remat import LADDER, REMAT, Remat, remat_text


@dataclasses.dataclass(frozen=True)
class Layer:
    """Bytes of one layer on one device.

    Attributes:
      kept: remat choice -> what lies in memory from its forward to its backward pass.
      gradients: of its trained parameters, float32.
    """

    kept: dict[str, int]
    gradients: int

    def workspace(self, choice: str) -> int:
        """What its backward pass takes beside that, about: what is computed again, and gradients
        of it. Compiled for an H200, 8B layers of 8192 tokens took 5/4 of all that there is to keep.
        """
        whole = self.kept["none"]
        return max(whole * 5 // 4 - self.kept[choice], whole // 2)


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """The memory of a training step, bytes of one device; from `plan_memory`.

    Attributes:
      parts: what is there all the time: frozen and trained weights, their copies in the dtype of
        the model, the optimizer's state, gradients outside of layers and of earlier micro-batches.
      layers: one per layer; equal layers are the same object.
      loss: logits and hidden states while the loss is computed.
    """

    parts: dict[str, int]
    layers: tuple[Layer, ...]
    loss: int

    def peak(self, choices: Sequence[str]) -> dict[str, int]:
        """What the memory is for when it is fullest, with one remat choice per layer."""
        kept = [layer.kept[c] for layer, c in zip(self.layers, choices, strict=True)]
        names = "kept by layers", "gradients of layers", "workspace"
        moments = [(sum(kept), 0, self.loss)]
        below, done = sum(kept), 0
        for layer, choice, own in zip(
            reversed(self.layers), reversed(choices), reversed(kept), strict=True
        ):
            done += layer.gradients
            moments.append((below, done, layer.workspace(choice)))
            below -= own
        return self.parts | dict(zip(names, max(moments, key=sum), strict=True))

    def total(self, choices: Sequence[str]) -> int:
        """Bytes at that moment."""
        return sum(self.peak(choices).values())

    def choose(self, limit: int) -> tuple[str, ...]:
        """One choice per layer, so that a step takes at most `limit` bytes and little is computed
        again: two choices that follow each other in `LADDER`, the dearer one in as many of the last
        layers (whose memory is free again first) as fit. "block" everywhere where that does not.
        """
        n = len(self.layers)
        for dear, cheap in zip(LADDER, LADDER[1:], strict=False):
            for last in range(n, 0, -1):
                choices = (cheap,) * (n - last) + (dear,) * last
                if self.total(choices) <= limit:
                    return choices
        return (LADDER[-1],) * n


def plan_memory(
    state: Any,
    rows: int,
    length: int,
    *,
    packed: bool = True,
    accumulate: int = 1,
    num_iter: int | None = None,
    impl: str = "auto",
    chunk_size: int = 512,
) -> StepMemory:
    """The memory of a step of `make_train_step` with the default loss; nothing is computed.

        memory = plan_memory(state, rows=1, length=8192)
        step = make_train_step(optimizer, remat=memory.choose(device_limit()))

    Args:
      state: a `TrainState`, or its abstract twin (`TrainState.abstract`).
      rows, length: B and T of a batch, on all devices together.
      packed: whether batches have segment_ids.
      accumulate, num_iter, impl, chunk_size: of `make_train_step`.
    """
    model: HybridLM = jax.eval_shape(lambda s: s.model(), state)
    mesh, micro = model.mesh, rows // accumulate
    tokens = jax.ShapeDtypeStruct((micro, length), jnp.int32)
    ids = tokens if packed else None

    def embed(model: HybridLM, tokens: Any, ids: Any) -> tuple[jax.Array, Context]:
        return model.embed(tokens, segment_ids=ids, num_iter=num_iter, impl=impl)

    x, ctx = jax.eval_shape(embed, model, tokens, ids)
    on_device = functools.partial(_on_device, x=x, mesh=mesh)
    params = abstract_params(model, mesh)
    gradients = {
        name: device_bytes(params[name]) // params[name].dtype.itemsize
        * np.dtype(exact_dtype(params[name].dtype)).itemsize
        for name in state.params
    }  # fmt: skip
    found: dict[Any, Layer] = {}
    layers: list[Layer] = []
    for i, block in enumerate(model.layers):
        names = [name for name in params if name.startswith(f"layers.{i}.")]
        trained = tuple(name in state.params for name in names)
        key = jax.tree.structure(block), tuple(x.shape for x in jax.tree.leaves(block)), trained
        if key not in found:
            kept = {c: _kept(block, trained, x, ctx, c, on_device) for c in REMAT}
            found[key] = Layer(kept, sum(gradients.get(name, 0) for name in names))
        layers.append(found[key])
    copied = [params[n] for n, p in state.params.items() if p.dtype != params[n].dtype]
    inside = sum(layer.gradients for layer in layers)
    total = sum(gradients.values())
    parts = {
        "frozen weights": device_bytes(state.frozen),
        "trained weights": device_bytes(state.params),
        "their copies": device_bytes(copied),
        "optimizer": device_bytes(state.opt_state),
        "other gradients": total - inside + (total if accumulate > 1 else 0),
    }
    piece = micro * min(chunk_size, length) * model.config.vocab_size
    shares = 1 if mesh is None else mesh.size // mesh.shape["sp"]
    loss = piece * (8 + x.dtype.itemsize) // shares + 4 * on_device(x)
    return StepMemory(parts, tuple(layers), loss)


def auto_remat(state: Any, rows: int, length: int, **options: Any) -> tuple[str, ...]:
    """The remat choice of each layer that fills the devices of this process; "block" everywhere
    where they do not say how much memory they have. Arguments: of `plan_memory`."""
    limit = device_limit()
    if limit is None:
        return (LADDER[-1],) * len(jax.eval_shape(lambda s: s.model(), state).layers)
    return plan_memory(state, rows, length, **options).choose(limit)


def fit(
    memory: StepMemory,
    limit: int,
    compile: Callable[[tuple[str, ...]], jax.stages.Compiled],
    *,
    before: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[tuple[str, ...], jax.stages.Compiled]:
    """The choices of `StepMemory.choose` whose program fits, and the program.

    Where the compiler needs more than was planned, the difference is taken off the limit, and the
    next cheaper choices are compiled.

    Args:
      memory: of the step.
      limit: bytes of one device that it may take.
      compile: makes the program with these choices.
      before: choices of an earlier start of the run: they stay, if they fit.
      say: is told when the program does not fit.
    """
    choices = memory.choose(limit)
    if before is not None and len(before) == len(choices) and memory.total(before) <= limit:
        choices = tuple(before)
    while True:
        compiled = compile(choices)
        needed = program_bytes(compiled)
        cheaper = memory.choose(limit - (needed - memory.total(choices)))
        if needed <= limit or memory.total(cheaper) >= memory.total(choices):
            return choices, compiled
        say(
            f"remat    {remat_text(choices)} would take {size_text(needed)} of "
            f"{size_text(limit)}: {remat_text(cheaper)} instead"
        )
        choices = cheaper


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of one device that a compiled program takes: arguments, results, workspace."""
    m: Any = compiled.memory_analysis()
    whole = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    return whole - m.alias_size_in_bytes


def _on_device(a: Any, x: Any, mesh: Any) -> int:
    """Bytes on one device of an array made of a batch x [B, T, d]: rows and tokens are split, and
    over tensor parallel devices what is as wide as heads or an MLP, not as x."""
    size = a.size * a.dtype.itemsize
    if mesh is None or a.size < x.size // x.shape[2]:
        return size
    size //= row_parts(mesh) * mesh.shape["sp"]
    return size if a.shape == x.shape else size // (mesh.shape["tp"] * mesh.shape["rep"])


def _kept(
    block: Block, trained: Sequence[bool], x: Any, ctx: Context, choice: str, on_device: Any
) -> int:
    """Bytes that the block keeps for its backward pass beside its parameters, x [B, T, d] among
    them (unless the host has it)."""
    leaves, tree = jax.tree.flatten(block)

    def backward(own: list[Any], others: list[Any], x: Any, ctx: Context) -> Any:
        def run(own: list[Any], x: Any) -> Any:
            a, b = iter(own), iter(others)
            whole = jax.tree.unflatten(tree, [next(a) if t else next(b) for t in trained])
            return run_block(whole if choice == "none" else Remat(whole, choice), x, ctx, None)[0]

        return jax.vjp(run, own, x)[1]

    pairs = list(zip(leaves, trained, strict=True))
    own, others = [a for a, t in pairs if t], [a for a, t in pairs if not t]
    closed = jax.make_jaxpr(backward)(own, others, x, ctx)
    values = _Values(closed.jaxpr, len(jax.tree.leaves((own, others))))
    kept = _after_fusion(values) if choice == "none" else values.results
    here = [values.avals[n] for n in kept if "<host>" not in values.avals[n].str_short()]
    return sum(map(on_device, here))


# What XLA computes inside of the kernel that reads it. The names are those of JAX's primitives.
_ELEMENTWISE = frozenset(
    "abs add add_any and broadcast_in_dim clamp concatenate convert_element_type copy cos div "
    "dynamic_slice eq erf exp exp2 expand_dims expm1 ge gt integer_pow iota is_finite le log "
    "log1p logistic lt max min mul name ne neg not or pad pow reduce_precision reshape rev rsqrt "
    "select_n sign sin slice split sqrt square squeeze stop_gradient sub tanh transpose xor".split()
)


class _Values:
    """The values of a trace as numbers, nested functions written out.

    Attributes:
      avals: shape and dtype of each value.
      made_of: value -> the values that an elementwise operation makes it of.
      read: those that something else than elementwise operations and sums reads.
      given: parameters, and what the context holds; not x.
      results: what the trace returns, without the given, each once.
    """

    def __init__(self, jaxpr: Any, parameters: int):
        self.avals: list[Any] = []
        self.made_of: dict[int, list[int]] = {}
        self.read: set[int] = set()
        inputs = [self._new(v) for v in (*jaxpr.invars, *jaxpr.constvars)]
        x = inputs[parameters]
        self.given = set(inputs) - {x}
        env = dict(zip((*jaxpr.invars, *jaxpr.constvars), inputs, strict=True))
        results = dict.fromkeys(self._walk(jaxpr, env))
        self.results = [n for n in results if n is not None and n not in self.given]

    def _new(self, v: Any) -> int:
        self.avals.append(v.aval)
        return len(self.avals) - 1

    def _walk(self, jaxpr: Any, env: dict[Any, int | None]) -> list[int | None]:
        def number(v: Any) -> int | None:
            return None if hasattr(v, "val") else env[v]  # None: a literal

        for eqn in jaxpr.eqns:
            name, ins = eqn.primitive.name, [number(v) for v in eqn.invars]
            inner = eqn.params.get("jaxpr") if name == "jit" else None
            if inner is not None:
                inside = inner.jaxpr
                names = (*inside.invars, *inside.constvars)
                fixed = [None] * len(inside.constvars)
                outs = self._walk(inside, dict(zip(names, (*ins, *fixed), strict=True)))
                env |= dict(zip(eqn.outvars, outs, strict=True))
                continue
            some = [n for n in ins if n is not None]
            for v in eqn.outvars:
                env[v] = new = self._new(v)
                if name in _ELEMENTWISE:
                    self.made_of[new] = some
            if name not in _ELEMENTWISE and not name.startswith("reduce_"):
                self.read |= set(some)
        return [number(v) for v in jaxpr.outvars]


def _after_fusion(values: _Values) -> Iterator[int]:
    """What stays of the results when XLA has fused elementwise operations into their readers."""
    there = set(values.given)

    def sources(n: int) -> set[int]:
        if n in there:
            return set()
        if n not in values.made_of:
            return {n}
        return set().union(*map(sources, values.made_of[n]))

    def size(n: int) -> int:
        return math.prod(values.avals[n].shape) * values.avals[n].dtype.itemsize

    for n in sorted(values.results):
        needed = {n} if n in values.read else sources(n)
        if sum(map(size, needed)) >= size(n):
            needed = {n} - there
        there |= needed
        yield from needed
