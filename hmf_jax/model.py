"""The decoder: embeddings, blocks of one mixer and one MLP each, final norm, logits.

A model is a plain pytree (flax NNX, no state inside): use `jax.jit`, `jax.grad` and `jax.tree` on
it directly. What it remembers between calls is a `ModelState`, passed in and returned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hmf_jax.block import Block, LayerOutput, run_block
from hmf_jax.config import HybridConfig
from hmf_jax.layers import (
    Embed,
    backbone_norm,
    linear,
    one_row_twice,
    query_scale,
    rope_table,
    untabulated,
    without_dtype,
)
from hmf_jax.mixers import KINDS, Context
from hmf_jax.mixers.base import abstract_zeros, zeros
from hmf_jax.moe import Routing
from hmf_jax.moved import TORCH_METHODS
from hmf_jax.options import MOST_POSITIONS, check_int
from hmf_jax.packed import Origin
from hmf_jax.packed import PackedModel as PackedModel  # it has a name here, too
from hmf_jax.padding import (
    arrange,
    check_room,
    check_solver,
    check_state,
    check_tokens,
    default_positions,
    next_position,
    restore,
    valid_first,
)
from hmf_jax.parameters import abstract_params, cast, float_dtype, shardings, split
from hmf_jax.sharding import constrain, for_model
from hmf_jax.state import ModelState, advance

Array = jax.Array


class HybridLM(nnx.Module):
    """A decoder-only language model whose layers mix tokens in any mix of kinds.

    A fused model (see `HybridConfig.fused`) computes what it will when unfused, and keeps its
    teacher for `hmf_jax.priming`.

    Args:
      config: architecture.
      dtype: dtype of parameters and activations (recurrent states, gates and decays are float32).
      mesh: device mesh (see `hmf_jax.make_mesh`), or None. The random parameters of a layer are
        made on one device and then split; no more than one layer is ever whole.
      rngs: their seeds; the same ones on every mesh.

    Attributes:
      config, mesh: as given, the mesh with the axes that a model runs on.
      origin: see `source`; also whether `astype` made it, which is then saved in its new dtype.
    """

    def __init__(
        self,
        config: HybridConfig,
        *,
        dtype=jnp.bfloat16,
        mesh: Mesh | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        if not isinstance(config, HybridConfig):
            raise TypeError(
                "config must be a HybridConfig, such as HybridConfig.preset('tiny'), "
                f"not {type(config).__name__}."
            )
        rngs, dtype = nnx.Rngs(0) if rngs is None else rngs, float_dtype(dtype)
        d, V = config.hidden_size, config.vocab_size
        self.config, self.mesh = config, for_model(mesh, config)
        embed = Embed(
            V,
            d,
            param_dtype=dtype,
            embedding_init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
            embedding_metadata={"dims": ("vocab", "embed")},
        )
        self.embed_tokens = split(without_dtype(embed), self.mesh)
        layers = (
            Block(symbol, config, sparse=config.is_sparse(i), dtype=dtype, rngs=rngs)
            for i, symbol in enumerate(config.layer_kinds)
        )
        self.layers: Sequence[Block] = nnx.List([split(layer, self.mesh) for layer in layers])
        self.norm = split(backbone_norm(d, config, dtype), self.mesh)
        head = ("embed", "vocab"), config, dtype, rngs
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else split(linear(d, V, *head), self.mesh)
        self.origin = nnx.data(Origin())

    @classmethod
    def init(
        cls, config: HybridConfig, *, dtype=jnp.bfloat16, mesh: Mesh | None = None, seed: int = 0
    ) -> HybridLM:
        """A model with random parameters."""
        check_int("seed", seed, 0, 2**32 - 1)
        return cls(config, dtype=dtype, mesh=mesh, rngs=nnx.Rngs(seed))

    @classmethod
    def from_pretrained(cls, repo_or_dir: str | Path, **options: Any) -> HybridLM:
        """`hmf_jax.from_pretrained`: the model of a directory or Hugging Face repository."""
        import hmf_jax  # loading is built on models, not the other way around

        return hmf_jax.from_pretrained(repo_or_dir, **options)

    def save_pretrained(self, directory: str | Path, **options: Any) -> None:
        """`hmf_jax.save_pretrained` of this model."""
        import hmf_jax

        hmf_jax.save_pretrained(self, directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """`hmf_jax.push_to_hub` of this model: uploads it and returns its address."""
        import hmf_jax

        return hmf_jax.push_to_hub(self, repo_id, **options)

    @property
    def source(self) -> str | None:
        """The directory it was loaded from, which has the tokenizer, or None.

        A model that `jax.jit` returns has none: its program may be that of another directory.
        """
        return self.origin.source

    @source.setter
    def source(self, directory: str | Path | None) -> None:
        known = None if directory is None else str(directory)
        self.origin = dataclasses.replace(self.origin, source=known, lost=False)

    @property
    def dtype(self) -> np.dtype:
        """What it computes in: the dtype of the embeddings, whatever the other parameters have."""
        return np.dtype(self.embed_tokens.embedding.dtype)

    def astype(self, dtype: Any) -> Self:
        """A new model with its parameters in this dtype; it computes, and is saved, in it.

        A_log, dt_bias and D stay float32, and so do the matrices of adapters.

        Args:
          dtype: bfloat16, float16, float32 or, with jax_enable_x64, float64; as `jnp.bfloat16`,
            "bfloat16" or `np.dtype`.

        Raises:
          ValueError: any other dtype.
        """
        dtype = float_dtype(dtype)
        plain = nnx.eval_shape(lambda: HybridLM(self.config, dtype=dtype, mesh=self.mesh))
        model = cast(self, {path: a.dtype for path, a in abstract_params(plain, None).items()})
        model.origin = dataclasses.replace(self.origin, recast=True)
        return model

    def num_parameters(self, *, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters are, those of adapters included.

        Args:
          exclude_embeddings: without the embeddings and, where it is a matrix of its own, the head.
        """
        without = (self.embed_tokens, self.lm_head) if exclude_embeddings else ()
        whole, outside = (sum(x.size for x in jax.tree.leaves(t)) for t in (self, without))
        return whole - outside

    def train(self, **attributes: Any) -> Self:
        """The model itself: nothing in it (such as dropout) differs between training and use."""
        super().train(**attributes)
        return self

    def eval(self, **attributes: Any) -> Self:
        """The model itself, see `train`."""
        super().eval(**attributes)
        return self

    def __repr__(self) -> str:
        """Layers, sizes and memory in a few lines; `nnx.display` shows every parameter."""
        import hmf_jax

        return hmf_jax.memory.describe_model(self)

    __str__ = __repr__

    def __getattr__(self, name: str) -> NoReturn:
        """For what is not there; says what to write in place of a method of PyTorch's."""
        instead = TORCH_METHODS.get(name)
        hint = "" if instead is None else f": {instead}"
        raise AttributeError(f"HybridLM has no attribute {name!r}{hint}", name=name, obj=self)

    def shardings(self) -> Any:
        """A pytree like the model with the sharding of each parameter (None without a mesh)."""
        return None if self.mesh is None else shardings(self, self.mesh)

    def init_state(
        self, batch: int, capacity: int, *, pages: tuple[int, int] | None = None
    ) -> ModelState:
        """An empty state for `batch` rows of at most `capacity` tokens each.

        It can be the carry of `jax.lax.scan`, `fori_loop` and `while_loop`. A first prefill is
        quickest where the state is made, outside of jit or in the same program: see
        `ModelState.fresh`.

        Memory: full attention layers take capacity entries per row, all other kinds a size that
        does not depend on it. With `pages` (P, page) those layers have pools of P pages of `page`
        tokens, see `ModelState.pages`; a mesh that splits the rows must split the pages, too.
        """
        if self.mesh is not None and self.mesh.shape["sp"] > 1:
            raise ValueError(
                "the mesh splits sequences (sp), which is for training; states live on meshes of "
                "dp, fsdp and tp."
            )
        for name, value in (("batch", batch), ("capacity", capacity)):
            check_int(name, value, 1, MOST_POSITIONS)

        layers = tuple(
            block.init_state(batch, capacity, names and pages, names, self.dtype, self.mesh)
            for block, names in zip(self.layers, self.appends, strict=True)
        )
        length, position = (zeros((batch,), (None,), jnp.int32, self.mesh) for _ in range(2))
        return ModelState(layers, length, position, capacity, fresh=True)

    @property
    def appends(self) -> tuple[tuple[str, ...], ...]:
        """For each layer, the arrays of its state with an entry per token, see `Kind.appends`."""
        return tuple(KINDS[symbol].appends for symbol in self.config.student_kinds)

    def abstract_state(self, batch: int, capacity: int, *, pages: Any = None) -> ModelState:
        """`init_state` as `jax.ShapeDtypeStruct`s with shardings (without a mesh: None)."""
        with abstract_zeros():
            return self.init_state(batch, capacity, pages=pages)

    def __call__(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
        state: ModelState | None = None,
        num_iter: Array | int | None = None,
        last_only: bool = False,
        impl: str = "auto",
        solver: str = "chebyshev",
    ) -> tuple[Array, ModelState | None]:
        """Logits of the next token after each token.

        Args:
          tokens: [B, T] integers. With a state they continue its rows; T may be anything.
          positions: [B, T] rotary positions; default: the index of each token in its document.
            With a state the default goes on after its rows' last position, given or not.
          segment_ids: [B, T]; 0 marks padding (anywhere; it leaves no trace), other numbers mark
            packed documents, which do not see each other. With a state every non-zero number means
            "valid": packing is for whole sequences.
          lengths: [B]; the first lengths[b] tokens of row b are valid, the others padding. Instead
            of segment_ids, and cheaper: no token has to be moved.
          state: from `init_state` or an earlier call; a row must not outgrow its capacity: tokens
            beyond it are lost to full attention layers. Outside of jit that is an error.
          num_iter: solver iterations of GKA layers, a number or one per row [B]; 0 = plain gated
            linear attention. Default: the config's. Changing it does not recompile.
          last_only: logits for the last valid token of each row only.
          impl: operator implementation, see `hmf_jax.pallas_kernels.dispatch`.
          solver: of GKA layers: "chebyshev", or "cg", conjugate gradients, which need fewer
            iterations (docs/num_iter.md) and which no GPU kernel has.

        Returns:
          logits [B, T, V] in the model's dtype ([B, 1, V] with last_only), unspecified at padding;
          the new state, or None without one.

        Raises:
          ValueError: shapes or dtypes that do not fit each other; a state of another model, dtype
            or batch, or without room for these tokens.
        """
        x, ctx = self.embed(
            tokens, positions=positions, segment_ids=segment_ids, lengths=lengths, state=state,
            num_iter=num_iter, impl=impl, solver=solver,
        )  # fmt: skip
        layers = []
        for layer in self.blocks(x, ctx, state):
            x = layer.x
            layers.append(layer.state)
        new = advance(state, layers, ctx, tokens.shape[1])
        if not last_only:
            return self.logits(restore(x, ctx.place)), new
        last = tokens.shape[1] - 1 if ctx.lengths is None else jnp.maximum(ctx.lengths - 1, 0)
        rows = jnp.broadcast_to(last, tokens.shape[:1])[:, None, None]
        return self.logits(jnp.take_along_axis(x, rows, axis=1)), new

    def hidden(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
        num_iter: Array | int | None = None,
        impl: str = "auto",
        solver: str = "chebyshev",
    ) -> Array:
        """What the logits are made of: [B, T, d] after the final norm (arguments of `__call__`).

        `hidden(tokens) @ head_kernel()` are the logits; a training loss makes them in pieces.
        """
        x, ctx = self.embed(
            tokens, positions=positions, segment_ids=segment_ids, lengths=lengths,
            num_iter=num_iter, impl=impl, solver=solver,
        )  # fmt: skip
        for layer in self.blocks(x, ctx):
            x = layer.x
        return self.norm(restore(x, ctx.place))

    def head_kernel(self) -> Array:
        """The output head [d, V]; with tied embeddings their transpose."""
        tied = self.embed_tokens.embedding[...]
        return tied.T if self.lm_head is None else self.lm_head.kernel[...]

    def generate(self, prompts: Any, **kwargs: Any) -> Any:
        """`hmf_jax.generate` with this model: token lists in, one `Output` per prompt out."""
        import hmf_jax  # the engine is built on models, not the other way around

        return hmf_jax.generate(self, prompts, **kwargs)

    def trace(
        self,
        tokens: Array,
        *,
        state: ModelState | None = None,
        num_iter: Array | int | None = None,
        impl: str = "auto",
        solver: str = "chebyshev",
    ) -> tuple[Array, ModelState | None, list[tuple[Array, Array]]]:
        """`__call__`, and of each layer the output of its mixer and its own, [B, T, d]."""
        x, ctx = self.embed(tokens, state=state, num_iter=num_iter, impl=impl, solver=solver)
        layers, seen = [], []
        for layer in self.blocks(x, ctx, state):
            x = layer.x
            layers.append(layer.state)
            seen.append((layer.mixed, x))
        return self.logits(x), advance(state, layers, ctx, tokens.shape[1]), seen

    @untabulated
    def embed(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
        state: ModelState | None = None,
        num_iter: Array | int | None = None,
        impl: str = "auto",
        solver: str = "chebyshev",
    ) -> tuple[Array, Context]:
        """Where a forward pass begins, for loops over layers of one's own (see `blocks`).

        Arguments as in `__call__`.

        Returns:
          x [B, T, d], the embeddings with the valid tokens of each row first, and what the layers
          are told about them; `restore(x, ctx.place)` of `hmf_jax.padding` undoes the order.
        """
        check_tokens(tokens, positions, segment_ids, lengths, self.mesh)
        self.config.check_num_iter(num_iter)
        check_solver(solver, self.config)
        float_dtype(self.dtype)  # parameters may have been cast to anything
        B, T = tokens.shape
        if state is not None:
            check_state(self, state, B)
        place, lengths = None, None if lengths is None else jnp.asarray(lengths, jnp.int32)
        if segment_ids is not None:
            valid = segment_ids != 0
            lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
            if T > 1:
                place = valid_first(valid)
                tokens, segment_ids = arrange(tokens, place), arrange(segment_ids, place)
                positions = None if positions is None else arrange(positions, place)
        if state is not None:
            check_room(self, state, T if lengths is None else lengths)
        after = None if state is None else next_position(state, positions, lengths, T)
        if positions is None:
            positions = default_positions(B, T, segment_ids, state)
        ctx = Context(
            rope=rope_table(positions, self.config),
            segment_ids=segment_ids if state is None else None,  # with a state: padding only
            lengths=lengths,
            offset=jnp.zeros(B, jnp.int32) if state is None else state.length,
            num_iter=None if num_iter is None else jnp.asarray(num_iter, jnp.int32),
            place=place,
            fresh=state is not None and state.fresh,
            position=after,
            query_scale=query_scale(positions, self.config),
            pages=None if state is None else state.pages,
            impl=impl, mesh=self.mesh, solver=solver,
        )  # fmt: skip
        # The table is split along d over sp x fsdp; the compiler moves one axis at a time well.
        x = one_row_twice(self.embed_tokens, tokens)
        x = constrain(x, self.mesh, "batch", None, "tokens")
        return constrain(x, self.mesh, "batch", "tokens", None), ctx

    @untabulated
    def blocks(
        self,
        x: Array,
        ctx: Context,
        state: ModelState | None = None,
        *,
        experts: Mapping[int, Array] | None = None,
    ) -> Iterator[LayerOutput]:
        """Runs layer after layer on what `embed` returned; what was yielded is not kept here.

        `experts`: sparse layer -> [B, T, k] integers, the experts that its tokens (in the order of
        `embed`) go to in place of its router's choice, with the weights that it gives them.
        """
        forced = dict(experts or {})
        sparse = filter(self.config.is_sparse, range(len(self.layers)))
        if others := forced.keys() - set(sparse):
            raise ValueError(f"experts of layers {sorted(others)}, which have none")
        states = [None] * len(self.layers) if state is None else state.layers
        for i, (block, before) in enumerate(zip(self.layers, states, strict=True)):
            x, mixed, after, routing = run_block(block, x, ctx, before, forced.get(i))
            yield LayerOutput(mixed, x, after, None if routing is None else Routing(**routing))
            del mixed, after, routing

    def logits(self, x: Array) -> Array:
        """Logits [B, T, V] of the output x [B, T, d] of the last layer."""
        x = self.norm(x)
        if self.lm_head is None:
            logits = x @ self.embed_tokens.embedding[...].astype(x.dtype).T
        else:
            logits = self.lm_head(x)
        return constrain(logits, self.mesh, "batch", "tokens", "vocab")
