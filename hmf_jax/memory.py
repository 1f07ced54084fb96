"""How much memory parameters and states of a model take, from its config alone."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hmf_jax.config import HybridConfig
from hmf_jax.mixers import BASE, KINDS, split_symbol
from hmf_jax.model import HybridLM
from hmf_jax.options import MOST_POSITIONS, check_int, check_number
from hmf_jax.parameters import abstract_params
from hmf_jax.sharding import row_parts
from hmf_jax.state import ModelState
from hmf_jax.table import num_active_parameters, num_parameters

CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)


@dataclasses.dataclass(frozen=True)
class StateMemory:
    """Bytes of the state of one sequence.

    Attributes:
      attention: keys and values of full attention layers; proportional to the context.
      fixed: everything else (recurrent states, convolution histories, windows); independent of it.
    """

    attention: int
    fixed: int

    @property
    def total(self) -> int:
        return self.attention + self.fixed


def state_memory(config: HybridConfig, contexts: tuple[int, ...] = CONTEXTS, *, dtype: Any = None):
    """`StateMemory` of one sequence for each context length, as {context: StateMemory}.

    Measured on the abstract arrays that `HybridLM.init_state` makes; nothing is allocated.

    Args:
      config: architecture.
      contexts: capacities in tokens.
      dtype: dtype of the model, default bfloat16 (recurrent states are float32 in any case).

    Raises:
      ValueError: a context is no number of tokens.
    """
    for context in contexts:
        check_int("context", context, 1, MOST_POSITIONS)
    counts = Counter(config.layer_kinds)  # layers of one symbol have states of one size
    one_of_each = dataclasses.replace(config, layer_kinds=tuple(counts))
    model = nnx.eval_shape(lambda: HybridLM(one_of_each, dtype=dtype or jnp.bfloat16))
    out: dict[int, StateMemory] = {}
    for context in contexts:
        state = jax.eval_shape(lambda n=context: model.init_state(1, n))
        growing = fixed = 0
        for symbol, layer in zip(counts, state.layers, strict=True):
            size = counts[symbol] * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layer))
            if KINDS[split_symbol(symbol)[0]].grows:
                growing += size
            else:
                fixed += size
        out[context] = StateMemory(growing, fixed)
    return out


def abstract_state(model: HybridLM, batch: int, capacity: int) -> ModelState:
    """`HybridLM.abstract_state`: shapes, dtypes and shardings of a state, without its memory."""
    return model.abstract_state(batch, capacity)


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of these arrays (or `jax.ShapeDtypeStruct`s)."""

    def one(x: Any) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What the memory of a device is for while sequences decode together; bytes of one device.

    Attributes:
      weights: the parameters.
      sequence: state of one sequence at its longest, and its logits.
      workspace: activations of one prefill chunk.
      sequences: how many sequences fit beside weights and workspace; on a mesh, on all devices
        together.
    """

    weights: int
    sequence: int
    workspace: int
    sequences: int


def plan_memory(
    config: HybridConfig,
    context: int,
    memory: float,
    *,
    fraction: float = 0.9,
    prefill_chunk: int = 2048,
    dtype: Any = None,
    mesh: Mesh | None = None,
) -> MemoryPlan:
    """How many sequences of `context` tokens a device, or a mesh of them, can hold.

    The workspace is reckoned as 64 arrays [prefill_chunk, hidden_size], an upper bound of what
    prefills of the 8B shapes were seen to take, and what the experts of one layer take in, have
    inside and give out. On a mesh, that and the logits count as whole on
    every device (sampling gathers logits). The rest is exact.

    Args:
      config: architecture.
      context: most tokens of a sequence, prompt and answer together.
      memory: bytes of one device; fraction: the part of them to use, at most 1.
      prefill_chunk: tokens per prefill call.
      dtype: dtype of the model, default bfloat16.
      mesh: the devices, see `hmf_jax.make_mesh`; None: one.

    Raises:
      ValueError: not even one sequence fits; says what is needed. An argument out of range.
    """
    check_int("context", context, 1, MOST_POSITIONS)
    check_number("memory", memory, 0, 1e18, above=True)
    check_number("fraction", fraction, 0, 1, above=True)
    check_int("prefill_chunk", prefill_chunk, 1, MOST_POSITIONS)
    dtype = jnp.dtype(dtype or jnp.bfloat16)
    model = nnx.eval_shape(lambda: HybridLM(config, dtype=dtype, mesh=mesh))
    parts = 1 if model.mesh is None else row_parts(model.mesh)
    state = device_bytes(abstract_state(model, parts, context).layers)  # a sequence per device
    sequence = state + config.vocab_size * (dtype.itemsize + 8)  # logits and float32 copies of them
    weights = device_bytes(abstract_params(model, model.mesh))
    workspace = _workspace(config, prefill_chunk, dtype)
    sequences = parts * int((fraction * memory - weights - workspace) // sequence)
    if sequences < 1:
        raise ValueError(
            f"one sequence of {context} tokens needs {size_text(weights + workspace + sequence)} "
            f"(weights {size_text(weights)}, a prefill chunk of {prefill_chunk} tokens "
            f"{size_text(workspace)}, its state {size_text(sequence)}); {fraction:.0%} of the "
            f"memory are {size_text(fraction * memory)}: use larger or more devices, a shorter "
            "context or smaller prefill chunks"
        )
    return MemoryPlan(weights, sequence, workspace, sequences)


@dataclasses.dataclass(frozen=True)
class EnginePlan:
    """What the memory of a device is for while an `Engine` runs; bytes of one device.

    Attributes:
      budget: bytes that may be used.
      weights: the parameters.
      workspace: activations of one chunk of a prompt, and a row's keys and values of one layer.
      slots: requests that run at a time.
      slot_bytes: what one of them takes outside of pages: recurrent states, windows, its books.
      capacity: most tokens of a row.
      page_size: tokens of a page.
      page_bytes: keys and values of one page, in all full attention layers.
      pages: how many there are, for rows and prefixes together.
      snapshot_bytes: a copy of what a row has outside of pages.
      prefix_bytes: for such copies.
      parts: how many parts the mesh splits slots and pages into; slots and pages count all.
    """

    budget: int
    weights: int
    workspace: int
    slots: int
    slot_bytes: int
    capacity: int
    page_size: int
    page_bytes: int
    pages: int
    snapshot_bytes: int
    prefix_bytes: int
    parts: int = 1

    @property
    def total(self) -> int:
        """All of it together: what the device will have in use at its peak."""
        return self.weights + self.workspace + self.allocated + self.prefix_bytes

    @property
    def allocated(self) -> int:
        """What is allocated when the engine is made: slots and pages."""
        pages, slots = self.pages * self.page_bytes, self.slots * self.slot_bytes
        return (pages + slots) // self.parts

    def table(self) -> str:
        """A text table, one line for each use."""
        parts = self.parts
        uses = {
            "weights": self.weights,
            f"workspace of a chunk, rows of {self.capacity} tokens": self.workspace,
            f"{self.slots} slots of {size_text(self.slot_bytes)}": (
                self.slots * self.slot_bytes // parts
            ),
            f"{self.pages} pages of {self.page_size} tokens, {size_text(self.page_bytes)}": (
                self.pages * self.page_bytes // parts
            ),
            f"snapshots of {size_text(self.snapshot_bytes)}": self.prefix_bytes,
        }
        uses[f"together, of {size_text(self.budget)}"] = self.total
        width = max(map(len, uses))
        return "\n".join(f"{name:{width}}  {size_text(n):>12}" for name, n in uses.items())


_SHARED = 4096  # tokens of a prefix, to divide memory between its pages and its snapshot


def plan_engine(
    config: HybridConfig,
    *,
    memory: float,
    page_size: int,
    slots: int | None = None,
    capacity: int | None = None,
    most_slots: int = 64,
    fill: bool = True,
    prefixes: bool = True,
    fraction: float = 0.9,
    prefill_chunk: int = 2048,
    dtype: Any = None,
    mesh: Mesh | None = None,
) -> EnginePlan:
    """Divides the memory of a device among the slots, pages and snapshots of an `Engine`.

    The workspace is that of `plan_memory`, and three times the keys and values of one layer and
    row, which a chunk gathers. The rest is exact, but for a few small arrays.

    Args:
      config: architecture.
      memory: bytes of one device; fraction: the part of them to use, at most 1.
      page_size: tokens of a page.
      slots: requests that run at a time; None: the largest power of two, at most `most_slots`, that
        leaves half of the memory beside the weights to pages and snapshots.
      capacity: most tokens of a row; None: max_position_embeddings, or the tokens of all pages if
        these are fewer.
      fill: use all of the memory. Otherwise no more than twice what the rows take at their longest.
      prefixes: whether snapshots of prefixes are kept.
      prefill_chunk: tokens per chunk of a prompt.
      dtype: dtype of the model, default bfloat16.
      mesh: the devices, see `hmf_jax.make_mesh`; None: one.

    Raises:
      ValueError: not even one row of `capacity` tokens fits beside the others; says what is needed.
        An argument out of range.
    """
    check_number("memory", memory, 0, 1e18, above=True)
    check_number("fraction", fraction, 0, 1, above=True)
    check_int("page_size", page_size, 1, MOST_POSITIONS)
    check_int("prefill_chunk", prefill_chunk, 1, MOST_POSITIONS)
    longest, asked = config.max_position_embeddings, capacity is not None
    capacity = check_int("capacity", capacity, 1, longest) if asked else longest
    sizes = _engine_sizes(config, page_size, prefill_chunk, capacity, dtype, mesh)
    budget, parts = int(fraction * memory), sizes.parts
    room = budget - sizes.weights - sizes.workspace
    if slots is None:
        slots = most_slots
        while slots > parts and slots * sizes.slot > parts * room // 2:
            slots //= 2
    check_int("slots", slots, 1, MOST_POSITIONS)
    if slots % parts:
        raise ValueError(f"slots={slots} must be a multiple of {parts}, the parts of the mesh.")
    room -= slots // parts * sizes.slot
    per_row = -(-capacity // page_size)
    at_most = MOST_POSITIONS if fill else 2 * -(-slots * (per_row + 1) // parts)
    few = 4 * sizes.snapshot  # equal prompts that wait for each other use some, too
    prefix_bytes = few
    if prefixes:
        together = sizes.snapshot + _SHARED * sizes.page // page_size
        share = min(sizes.snapshot / together, 0.5)
        one_row = per_row * sizes.page if asked else 0  # has to fit in any case
        prefix_bytes = max(few, int(min(share * room, room - one_row)))
        if not fill:
            prefix_bytes = min(prefix_bytes, 4 * max(slots, 4) * sizes.snapshot)
    if sizes.page:
        pages = parts * max(0, min((room - prefix_bytes) // sizes.page, at_most))
    else:  # no layer has any: they are but numbers
        pages = 4 * slots * (per_row + 1)
    if not asked:
        capacity = max(1, min(longest, pages // parts * page_size))
    plan = EnginePlan(
        budget, sizes.weights, sizes.workspace, slots, sizes.slot, capacity, page_size, sizes.page,
        pages, sizes.snapshot, prefix_bytes, parts,
    )  # fmt: skip
    _check_fits(plan, few, prefill_chunk, fraction)
    return plan


def _check_fits(plan: EnginePlan, snapshots: int, chunk: int, fraction: float) -> None:
    """Raises ValueError if there are not even the pages of one row."""
    per_row = -(-plan.capacity // plan.page_size)
    if plan.pages // plan.parts >= per_row and plan.total <= plan.budget:
        return
    least = plan.weights + plan.workspace + plan.slots // plan.parts * plan.slot_bytes
    least += per_row * plan.page_bytes + snapshots
    raise ValueError(
        f"{plan.slots} slots and a row of {plan.capacity} tokens need {size_text(least)} (weights "
        f"{size_text(plan.weights)}, a chunk of {chunk} tokens {size_text(plan.workspace)}, a slot "
        f"{size_text(plan.slot_bytes)}, a page of {plan.page_size} tokens "
        f"{size_text(plan.page_bytes)}); {fraction:.0%} of the memory are "
        f"{size_text(plan.budget)}: use larger or more devices, fewer slots or shorter rows"
    )


class _EngineSizes(NamedTuple):
    """Bytes of one device, of one slot, page or snapshot of it."""

    weights: int
    workspace: int
    slot: int
    page: int
    snapshot: int
    parts: int


def _engine_sizes(
    config: HybridConfig, page_size: int, chunk: int, capacity: int, dtype: Any, mesh: Mesh | None
) -> _EngineSizes:
    dtype = jnp.dtype(dtype or jnp.bfloat16)
    model = nnx.eval_shape(lambda: HybridLM(config, dtype=dtype, mesh=mesh))
    parts = 1 if model.mesh is None else row_parts(model.mesh)
    layers = abstract_state(model, parts, page_size).layers
    grows = [KINDS[symbol].grows for symbol in config.student_kinds]
    pages = [device_bytes(layer) for layer, yes in zip(layers, grows, strict=True) if yes]
    fixed = device_bytes([layer for layer, yes in zip(layers, grows, strict=True) if not yes])
    V = config.vocab_size
    snapshot = fixed + V * (dtype.itemsize + 1)  # with logits, and which tokens have been seen
    # Logits and float32 copies of them, tokens seen, how often each was generated, biases.
    slot = fixed + V * (dtype.itemsize + 8 + 1 + 4 + 4)
    workspace = _workspace(config, chunk, dtype)
    if pages:
        workspace += 3 * max(pages) * -(-capacity // page_size)
    weights = device_bytes(abstract_params(model, model.mesh))
    return _EngineSizes(weights, workspace, slot, sum(pages), snapshot, parts)


def _workspace(config: HybridConfig, chunk: int, dtype: Any) -> int:
    """An upper bound of the bytes that reading a chunk of a prompt takes beside what it keeps."""
    size = 64 * chunk * config.hidden_size * dtype.itemsize
    if (moe := config.moe) is not None:
        width = 2 * config.hidden_size + 3 * moe.intermediate_size
        size += chunk * moe.experts_per_token * width * dtype.itemsize
    return size


def memory_table(config: HybridConfig, contexts: tuple[int, ...] = CONTEXTS) -> str:
    """A text table: state of one bfloat16 sequence per context length, against pure attention."""
    hybrid = state_memory(config, contexts)
    pure = dataclasses.replace(config, layer_kinds=(BASE,) * config.num_hidden_layers)
    transformer = state_memory(pure, contexts)
    lines = ["context   attention KV   fixed state        total   all attention   saved"]
    for n in contexts:
        h, t = hybrid[n], transformer[n].total
        cells = (f"{size_text(b):>12}" for b in (h.attention, h.fixed, h.total))
        a, f, total = cells
        label = f"{n // 1024}K" if n % 1024 == 0 else str(n)
        lines.append(f"{label:>7}   {a}  {f} {total}    {size_text(t):>12}  {1 - h.total / t:6.0%}")
    return "\n".join(lines)


def describe(config: HybridConfig) -> str:
    """Layers, shapes and parameters of a model as text."""
    c, parameters = config, num_parameters(config)
    kinds = sorted(set(c.layer_kinds), key=c.layer_kinds.index)
    lines = [f"{c.num_hidden_layers} layers: {c.hybrid_override_pattern}"]
    for symbol in kinds:
        kind, teacher = split_symbol(symbol)
        details = KINDS[kind].details(c.sections)
        name = f"{KINDS[kind].label}, {details}" if details else KINDS[kind].label
        if teacher is not None:
            name += f", learning from {KINDS[teacher].label}"
        lines.append(f"  {c.layer_kinds.count(symbol):3d} x {symbol:3s}  {name}")
    lines += [
        f"family {c.family}, hidden size {c.hidden_size}, {c.num_attention_heads} heads "
        f"({c.num_key_value_heads} for keys and values) of {c.head_dim}, "
        f"{_describe_mlp(c)}, vocabulary {c.vocab_size}, "
        f"at most {c.max_position_embeddings} positions"
    ]
    if (heads := c.linear) is not None:
        lines.append(
            f"linear layers: {heads.num_key_heads} heads of queries and keys, "
            f"{heads.num_value_heads} of values, of {heads.head_dim}"
        )
    if foreign := c.foreign_layers:
        lines.append(f"only this package can load it: {', '.join(foreign)} are not in its family")
    active = "" if c.moe is None else f"{num_active_parameters(c):,} of them used by a token, "
    lines.append(f"{parameters:,} parameters, {active}{size_text(2 * parameters)} in bfloat16")
    return "\n".join(lines)


def _describe_mlp(c: HybridConfig) -> str:
    """What the layers have beside their mixers."""
    dense = [layer for layer in range(c.num_hidden_layers) if not c.is_sparse(layer)]
    mlp, moe = f"MLP {c.intermediate_size}", c.moe
    if moe is None or len(dense) == c.num_hidden_layers:
        return mlp
    text = (
        f"{moe.num_experts} experts of {moe.intermediate_size} ({moe.experts_per_token} per token"
    )
    if moe.shared_intermediate_size is not None:
        text += f", and one of {moe.shared_intermediate_size} for all"
    return f"{text}{f'; {mlp} in {len(dense)} of the layers' if dense else ''})"


def describe_model(model: HybridLM) -> str:
    """What a model prints as: `describe`, with what its arrays really are and take."""
    leaves = jax.tree.leaves(model)
    if not leaves or not all(hasattr(x, "dtype") for x in leaves):  # a tree of shardings
        kinds = sorted({type(x).__name__ for x in leaves})
        return f"HybridLM({len(leaves)} leaves, no arrays: {', '.join(kinds)})"
    size = size_text(sum(x.size * x.dtype.itemsize for x in leaves))
    place = f", loaded from {model.source}" if model.source else ""
    mesh = {} if model.mesh is None else {k: n for k, n in model.mesh.shape.items() if n > 1}
    split = f" on a mesh of {' x '.join(f'{k}={n}' for k, n in mesh.items())}" if mesh else ""
    lines = [
        f"HybridLM in {model.dtype}{split}{place}",
        *describe(model.config).splitlines()[:-1],
        f"{model.num_parameters():,} parameters, {size}",
    ]
    if mesh.get("sp", 1) == 1:  # states live on other meshes only
        context = min(32768, model.config.max_position_embeddings)
        state = model.abstract_state(1, context).nbytes()
        lines.append(f"state of one sequence of {context} tokens: {size_text(state)}")
    return "\n".join(lines)


def size_text(size: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
