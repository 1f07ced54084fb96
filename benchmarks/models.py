"""Whole models with random weights: first token, decoding, training step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.counting import prompt_flops, step_bytes, weight_bytes
from benchmarks.rows import Row
from benchmarks.timing import SETS, device_time, milliseconds
from benchmarks.watching import peak_bytes, program_bytes, watch_dispatch
from hmf_jax.config import HybridConfig
from hmf_jax.engine import programs
from hmf_jax.layers import query_scale, rope_table
from hmf_jax.memory import abstract_state, device_bytes, plan_memory
from hmf_jax.mixers import Context, Mixer
from hmf_jax.model import HybridLM
from hmf_jax.moe import MoE
from hmf_jax.packed import PackedModel
from hmf_jax.presets import PRESETS as _PRESETS
from hmf_jax.sampling import SamplingParams
from hmf_jax.sharding import make_mesh, named_sharding
from hmf_jax.state import ModelState

Array = jax.Array
MODELS = ("model", "ttft", "decode_throughput", "train_step", "mixer", "mixer_decode", "mlp")
COMPILE = "compile"
ON_A_MESH = ("model", "ttft", "decode_throughput")
# As they are written here: the two that operators are measured on, too, with a capital B.
PRESETS = [{"8b": "8B", "32b": "32B"}.get(name, name) for name in _PRESETS]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, of which model.

    Attributes:
      preset: one of `PRESETS`; mixer: what replaces attention in the converted half.
      batch, length: rows, and tokens per row of a prompt, of a training row, or already in the
        state when decoding starts.
      layers: keep the first `layers` layers only; None keeps all.
      chunk: tokens per prefill call; None prefills in one.
      steps: room for new tokens behind the prompt, of which the first comes with it.
      num_iter: Chebyshev iterations of GKA layers; None where there are none, or the config's.
      impl: see `pallas_kernels.dispatch`; "auto" picks per operator.
      axes: of the mesh that the model lives on, {"tp": 2}; empty: one device.
    """

    preset: str
    mixer: str
    batch: int = 1
    length: int = 128
    dtype: str = "bfloat16"
    layers: int | None = None
    chunk: int | None = None
    steps: int = 64
    num_iter: int | None = None
    impl: str = "auto"
    axes: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def devices(self) -> int:
        return math.prod(self.axes.values())

    def mesh(self) -> Mesh | None:
        return make_mesh(**self.axes, devices=jax.devices()[: self.devices]) if self.axes else None

    def tokens(self, mesh: Mesh | None) -> list[Array]:
        """`SETS` sets of random tokens [batch, length], their rows split over the mesh."""
        shape, vocab = (self.batch, self.length), self.config.vocab_size
        split = named_sharding(mesh, ("batch", None), shape)
        keys = jax.random.split(jax.random.key(0), SETS)
        return [jax.device_put(jax.random.randint(key, shape, 0, vocab), split) for key in keys]

    @property
    def config(self) -> HybridConfig:
        config = HybridConfig.preset(self.preset.lower(), self.mixer)
        if self.layers is None:
            return config
        return dataclasses.replace(config, layer_kinds=config.layer_kinds[: self.layers])

    def row(
        self, op: str, pass_: str, ms: float, extra: dict[str, Any], env: dict[str, Any]
    ) -> Row:
        c = self.config
        dims = dict(
            batch=self.batch,
            length=self.length,
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
        )
        case = f"{self.preset} {self.mixer} {len(c.layer_kinds)} layers"
        if self.axes:
            case += ", mesh " + " ".join(f"{axis}={n}" for axis, n in self.axes.items())
            extra = extra | {"mesh": self.axes}
        return Row(
            op, self.impl, self.dtype, dims, self.num_iter, pass_, ms, None, case, extra, **env
        )


def filling(settings: Settings, memory: float | None) -> Settings:
    """As many rows as fit into `memory` GB (of each device) beside the weights, see `plan_memory`.

    Raises:
      ValueError: none fits; or nobody says how much memory there is.
    """
    stats = jax.devices()[0].memory_stats() or {}
    limit = 0.95 * stats.get("bytes_limit", 0) if memory is None else 1e9 * memory
    if not limit:
        raise ValueError("this device does not say how much memory it has; pass --memory GB")
    s = settings
    context, chunk = s.length + s.steps, s.chunk or 2048
    dtype = jnp.dtype(s.dtype)
    plan = plan_memory(
        s.config, context, limit, fraction=1, prefill_chunk=chunk, dtype=dtype, mesh=s.mesh()
    )
    return dataclasses.replace(s, batch=plan.sequences)


class Bench:
    """A model with random weights on the devices of its mesh, and the measurements on it.

    With `abstract` the weights are shapes only (on one device): for `compile`.
    """

    def __init__(self, settings: Settings, env: dict[str, Any], *, abstract: bool = False):
        self.s, self.env = settings, env
        self.ran: dict[str, str] = {}
        jax.clear_caches()  # choices are seen when blocks are traced
        dtype = jnp.dtype(settings.dtype)

        def init() -> HybridLM:
            return HybridLM.init(settings.config, dtype=dtype, mesh=settings.mesh())

        self.model = jax.eval_shape(init) if abstract else init()
        if not abstract:
            jax.block_until_ready(self.model)
        self.loaded_peak = peak_bytes()

    def compile(self, op: str) -> None:
        """Compile what `measure` times, "ttft" or "decode_throughput", and run nothing."""
        if op == "ttft":
            self._prefill_program(self.s.length + self.s.steps)
        else:
            self._compiled_decode()

    def measure(self, op: str) -> Row:
        """One of `MODELS`:

        * model: logits of all `length` tokens, without a state.
        * ttft: empty rows, prefill of `length` tokens, the greedy first token, waited for, by the
          programs of `generate`. tflop_per_s: the rate of `prompt_flops`.
        * decode_throughput: greedy tokens after `length` others, `steps` - 1 per dispatch, by the
          program of `generate`; ms is per token of every row. The state starts from values that no
          prompt left there (see `random_state`), which takes no time to speak of. step_bytes: what
          has to be read and written for one token of every row, gb_per_s: the rate at which that
          happened, of experts those that random tokens go to.
        * train_step: mean cross-entropy of the next token, its gradient, a plain SGD update.
        * mixer: one layer of the kind `mixer` alone (projections and operator, no MLP), without a
          state; mixer_decode: the same on one token per row, `length` tokens in the state.
        * mlp: the MLP of the last layer alone, or its mixture of experts, on `length` tokens.

        Extra numbers, all of one device: tokens per second (of all devices together, over their
        number); bytes of the weights, of the state, of everything the timed program needs
        (arguments, results and temporaries as the compiler planned them), and the largest number
        in use so far in this process where the device counts it (that of loading the weights, in
        peak_bytes_loading, is part of it). On GPUs also what the profiler saw, see
        `benchmarks.timing.DeviceTime`: per prompt, or per token of every row.
        """
        with watch_dispatch() as ran:
            pass_, ms, program, extra = getattr(self, f"_{op}")()
        self.ran |= ran
        extra.setdefault("weight_bytes", device_bytes(self.model))
        extra["program_bytes"] = program_bytes(program)
        if (peak := peak_bytes()) is not None:
            extra |= {"peak_bytes": peak, "peak_bytes_loading": self.loaded_peak}
        extra["ran"] = dict(sorted(self.ran.items()))
        return self.s.row(op, pass_, ms, extra, self.env)

    def _model(self):
        sets = self.s.tokens(self.model.mesh)
        program = jax.jit(self._forward).lower(self.model, sets[0]).compile()
        return "fwd", milliseconds(lambda t: program(self.model, t), sets), program, {}

    def _forward(self, model: HybridLM, tokens: Array) -> Array:
        return model(tokens, num_iter=self.s.num_iter, impl=self.s.impl)[0]

    def _settings(self) -> programs.Settings:
        """What `generate` makes of greedy requests that nothing ends."""
        rows, own = self.s.batch, self.s.config.gka
        own = None if own is None else own.num_iter
        greedy = [SamplingParams()] * rows
        return programs.stack_settings(own, greedy, [[]] * rows, [self.s.num_iter] * rows)

    def _abstract_rows(self, capacity: int) -> tuple[programs.Rows, Any]:
        """Rows that hold nothing and their logits, without arrays."""
        state = abstract_state(self.model, self.s.batch, capacity)
        split = state.length.sharding
        shape = self.s.batch, self.s.config.vocab_size

        def of(shape: tuple[int, ...], dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=split)

        number = of(shape[:1], jnp.int32)
        rows = programs.Rows(state, of(shape, jnp.bool_), number, number, number, number)
        return rows, of(shape, self.s.dtype)

    def _prefill_program(self, capacity: int):
        """(compiled programs, (model, tokens) -> first token and rows): those of `generate`."""
        s, packed = self.s, PackedModel.of(self.model)
        layout = programs.Layout.of(packed, s.batch, capacity)
        settings, impl = self._settings(), s.impl
        step = s.chunk or s.length
        sizes = [min(step, s.length - at) for at in range(0, s.length, step)]
        compiled: dict[Any, Any] = {}
        for i, size in enumerate(sizes):  # before anything that takes memory
            if (size, i == 0) not in compiled:
                part = np.zeros((s.batch, size), np.int32)
                rows, logits = self._abstract_rows(capacity)
                lengths = np.full(s.batch, size, np.int32)
                args = packed, rows, logits, part, lengths, settings.num_iter
                lowered = programs.prefill.on(layout).lower(*args, fresh=i == 0, impl=impl)
                compiled[size, i == 0] = lowered.compile()
        starts, left = np.ones(s.batch, bool), np.full(s.batch, s.steps, np.int32)

        def prefill(packed: PackedModel, tokens: np.ndarray) -> tuple[Array, programs.Rows]:
            rows, logits = programs.empty.on(layout)(packed, s.batch, capacity)
            at = 0
            for i, size in enumerate(sizes):
                part, at = tokens[:, at : at + size], at + size
                lengths = np.full(s.batch, size, np.int32)
                rows, logits = compiled[size, i == 0](
                    packed, rows, logits, part, lengths, settings.num_iter
                )
            rows, token, *_ = programs.first.on(layout)(rows, logits, starts, left, settings)
            return token, rows

        return compiled, prefill

    def _rate(self, tokens: int, ms: float) -> float:
        """Tokens per second and device."""
        return 1e3 * tokens / ms / self.s.devices

    def _ttft(self):
        compiled, prefill = self._prefill_program(self.s.length + self.s.steps)
        sets = [np.asarray(tokens) for tokens in self.s.tokens(None)]
        packed = PackedModel.of(self.model)
        ms = milliseconds(lambda tokens: prefill(packed, tokens)[0], sets, queue=False)
        largest = max(compiled.values(), key=program_bytes)
        state = abstract_state(self.model, self.s.batch, self.s.length + self.s.steps)
        extra: dict[str, Any] = {"state_bytes": device_bytes(state)}
        extra["tokens_per_s"] = self._rate(self.s.batch * self.s.length, ms)
        flops = self.s.batch * prompt_flops(self.model, self.s.length)
        extra["tflop_per_s"] = flops / ms / 1e9 / self.s.devices
        if profile := device_time(lambda: prefill(packed, sets[0])[0]):
            extra |= profile.per(1)
        return "fwd", ms, largest, extra

    def _compiled_decode(self):
        """(the program of `generate`, its arguments behind the rows, its layout, abstract rows)."""
        s, packed = self.s, PackedModel.of(self.model)
        layout = programs.Layout.of(packed, s.batch, s.length + s.steps)
        rows, _ = self._abstract_rows(s.length + s.steps)
        nobody, settings = np.zeros(s.batch, bool), self._settings()
        args = nobody, np.int32(s.steps - 1), settings
        program = programs.decode.on(layout).lower(packed, rows, *args, impl=s.impl).compile()
        return program, args, layout, rows

    def _decode_program(self):
        """(compiled program, its rows): that of `generate`, with `length` tokens in each row.

        A row ends when its buffer is full; the token that `first` chose is one of `steps`, so that
        a call makes `steps` - 1.
        """
        s, packed = self.s, PackedModel.of(self.model)
        size = s.batch, s.length + s.steps
        program, args, layout, rows = self._compiled_decode()
        state = random_state(self.model, *size)  # after the program, which needs memory, too

        def zeros(x: jax.ShapeDtypeStruct) -> Array:
            return jnp.zeros(x.shape, x.dtype, device=x.sharding)

        rest = {n: zeros(getattr(rows, n)) for n in ("seen", "token", "reason", "left", "made")}
        rest["token"] = jax.device_put(np.asarray(s.tokens(None)[0][:, 0]), rows.token.sharding)

        @functools.partial(jax.jit, donate_argnums=0, out_shardings=layout and layout.rows)
        def again(rows: programs.Rows) -> programs.Rows:
            """Every timed call starts at `length`: the buffers hold room for one call."""
            held = jnp.full(s.batch, s.length, jnp.int32)
            state = dataclasses.replace(rows.state, length=held, position=held)
            left = jnp.full(s.batch, s.steps, jnp.int32)
            return dataclasses.replace(rows, state=state, reason=jnp.zeros_like(held), left=left)

        def decode(rows: programs.Rows) -> tuple[programs.Rows, Array]:
            rows, tokens, *_ = program(packed, again(rows), *args)
            return rows, tokens

        return program, decode, programs.Rows(state, **rest)

    def _decode_throughput(self):
        program, decode, rows = self._decode_program()
        moved = step_bytes(rows.state, self.s.length) + weight_bytes(self.model, self.s.batch)
        state_bytes, steps = device_bytes(rows.state), self.s.steps - 1

        def call(_: None) -> Array:
            nonlocal rows
            rows, tokens = decode(rows)
            return tokens

        ms = milliseconds(call, [None]) / steps
        extra: dict[str, Any] = {"tokens_per_s": self._rate(self.s.batch, ms)}
        extra |= {"state_bytes": state_bytes, "step_bytes": moved, "gb_per_s": moved / ms / 1e6}
        if profile := device_time(lambda: call(None)):
            extra |= profile.per(steps)
        return "decode", ms, program, extra

    def _train_step(self):
        def step(model: HybridLM, tokens: Array) -> tuple[Array, HybridLM]:
            loss, grads = jax.value_and_grad(loss_fn)(model, tokens)
            return loss, jax.tree.map(lambda p, g: p - jnp.asarray(1e-6, p.dtype) * g, model, grads)

        def loss_fn(model: HybridLM, tokens: Array) -> Array:
            return next_token_loss(self._forward(model, tokens), tokens)

        sets = self.s.tokens(None)
        program = jax.jit(step, donate_argnums=0).lower(self.model, sets[0]).compile()

        def call(tokens: Array) -> Array:
            loss, self.model = program(self.model, tokens)
            return loss

        ms = milliseconds(call, sets)
        tokens = self.s.batch * self.s.length
        return "fwd_bwd", ms, program, {"tokens_per_s": 1e3 * tokens / ms}

    def _first_mixer(self) -> Mixer:
        kinds = self.s.config.layer_kinds
        if self.s.mixer not in kinds:
            raise ValueError(f"no {self.s.mixer} among the first {len(kinds)} layers")
        return self.model.layers[kinds.index(self.s.mixer)].mixer

    def _context(self, offset: Array, tokens: int, fresh: bool) -> Context:
        positions = offset[:, None] + jnp.arange(tokens)
        rope = rope_table(positions, self.s.config)
        num_iter = None if self.s.num_iter is None else jnp.int32(self.s.num_iter)
        ctx = Context(rope, None, None, offset, num_iter, None, fresh, self.s.impl, None)
        return dataclasses.replace(ctx, query_scale=query_scale(positions, self.s.config))

    def _hidden(self, tokens: int) -> list[Array]:
        shape = (self.s.batch, tokens, self.s.config.hidden_size)
        keys = jax.random.split(jax.random.key(1), SETS)
        return [jax.random.normal(key, shape, self.s.dtype) for key in keys]

    def _mixer(self):
        def run(mixer: Mixer, x: Array) -> Array:
            empty = jnp.zeros(self.s.batch, jnp.int32)
            return mixer(x, self._context(empty, self.s.length, True))[0]

        return self._part(self._first_mixer(), run)

    def _mlp(self):
        def run(mlp: Any, x: Array) -> Array:
            empty = jnp.zeros(self.s.batch, jnp.int32)
            return mlp(x, self._context(empty, self.s.length, True))[0] if sparse else mlp(x)

        mlp = self.model.layers[-1].mlp
        sparse = isinstance(mlp, MoE)
        return self._part(mlp, run)

    def _part(self, part: Any, run: Callable[[Any, Array], Array]):
        """A forward pass of a part of a layer."""
        sets = self._hidden(self.s.length)
        program = jax.jit(run).lower(part, sets[0]).compile()
        ms = milliseconds(lambda x: program(part, x), sets)
        extra: dict[str, Any] = {"weight_bytes": device_bytes(part)}
        if profile := device_time(lambda: program(part, sets[0])):
            extra |= profile.per(1)
        return "fwd", ms, program, extra

    def _mixer_decode(self):
        def run(mixer: Mixer, x: Array, state: Any) -> tuple[Array, Any]:
            offset = jnp.full(self.s.batch, self.s.length, jnp.int32)

            def one(state: Any, x: Array) -> tuple[Any, Array]:
                y, state = mixer(x[:, None], self._context(offset, 1, False), state)
                return state, y

            state, y = jax.lax.scan(one, state, jnp.moveaxis(x, 1, 0))
            return y, state

        mixer, sets = self._first_mixer(), self._hidden(self.s.steps)
        capacity, dtype = self.s.length + self.s.steps, jnp.dtype(self.s.dtype)
        state = mixer.init_state(self.s.batch, capacity, dtype, None)
        program = jax.jit(run, donate_argnums=2).lower(mixer, sets[0], state).compile()

        def call(x: Array) -> Array:
            nonlocal state
            y, state = program(mixer, x, state)
            return y

        ms = milliseconds(call, sets) / self.s.steps
        extra: dict[str, Any] = {"weight_bytes": device_bytes(mixer)}
        if profile := device_time(lambda: call(sets[0])):
            extra |= profile.per(self.s.steps)
        return "decode", ms, program, extra


def random_state(
    model: HybridLM, batch: int, capacity: int, pages: tuple[int, int] | None = None
) -> ModelState:
    """A state as large as one with prompts in it, with values of their scale but without a meaning.

    Keys, values and states are between -1 and 1, H of GKA is the identity.
    """

    @functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
    def make(shape: tuple[int, ...], dtype: Any, split: Any, eye: bool) -> Array:
        x = values(shape, dtype, eye)
        return x if split is None else jax.lax.with_sharding_constraint(x, split)

    def values(shape: tuple[int, ...], dtype: Any, eye: bool) -> Array:
        if eye:
            return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)
        # Fused into one loop that writes: a random generator's bits would need room for themselves.
        parts = [jax.lax.broadcasted_iota(jnp.uint32, shape, i) for i in range(len(shape))]
        mixed = functools.reduce(lambda x, y: (x * 31 + y) * jnp.uint32(2654435761), parts)
        return ((mixed >> 24).astype(jnp.float32) / 128 - 1).astype(dtype)

    def fill(path: Any, x: jax.ShapeDtypeStruct) -> Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.zeros(x.shape, x.dtype, device=x.sharding)
        return make(x.shape, x.dtype, x.sharding, jax.tree_util.keystr(path).endswith("h_kk"))

    abstract = model.abstract_state(batch, capacity, pages=pages)
    return jax.tree_util.tree_map_with_path(fill, abstract)


def next_token_loss(logits: Array, tokens: Array) -> Array:
    """Mean cross-entropy of tokens[:, 1:] under logits[:, :-1], float32 scalar."""
    log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))
