"""The states of GKA at every chunk, on Hopper: see mosaic.py."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hmf_jax.pallas_kernels.mosaic import (
    Warpgroup,
    along_rows,
    kernel,
    matrix,
    tile,
    transposed,
    vector,
)

C = 64
bf16, f32 = jnp.bfloat16, jnp.float32
Ref = Any

# Rows of `gates` [B, H, n, rows, C]. *_KK belong to H, the others to U (they differ without decay
# of H). TAIL is the weight of a token in the state at the end of its chunk.
CUM_KK, START_KK, TAIL_KK, CUM, START, TAIL, BETA2, ALPHA, DOC, ROWS = range(10)
# Rows of what `solve_backward` returns, and of the gates of the reverse scans.
D_ALPHA, MU, QDQ, DH, GRAM, STEP_ROWS = range(6)
W_IN, W_KEEP, Z_IN, Z_KEEP, Z_GRAM, Z_STATE = range(6)
# Rows of what `gram_backward` returns.
D_G, D_BETA = range(2)
# The two terms of k . dL/dk: from reads inside the chunk, and later ones.
INSIDE, LATER = range(2)


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """A recurrence S <- keep S + sum over pairs of a^T diag(weight) b [+ coef P].

    Attributes:
      operands: arrays [B, T, heads, D] it reads, by number.
      pairs: (a, b, weight): two places in `operands` and a row of the gates.
      keep: row of the gates; its last entry is the decay over a whole chunk.
      coef: row of the gates whose entries are all coef, P the given states; None = no such term.
    """

    operands: tuple[int, ...]
    pairs: tuple[tuple[int, int, int], ...]
    keep: int
    coef: int | None = None


FORWARD = (
    Recurrence(operands=(0,), pairs=((0, 0, TAIL_KK),), keep=START_KK),
    Recurrence(operands=(0, 1), pairs=((0, 1, TAIL),), keep=START),
)
# Operands q~, do, x, y, k: see `_backward`.
REVERSE = (
    Recurrence(
        operands=(2, 3, 4),
        pairs=((1, 0, Z_IN), (0, 1, Z_IN), (2, 2, Z_GRAM)),
        keep=Z_KEEP,
        coef=Z_STATE,
    ),
    Recurrence(operands=(0, 1), pairs=((0, 1, W_IN),), keep=W_KEEP),
)


def scan(
    recurrences: tuple[Recurrence, ...],
    operands: tuple[jax.Array, ...],
    gates: jax.Array,
    initial: jax.Array,
    prefix: jax.Array | None = None,
    *,
    split: bool = False,
    reverse: bool = False,
    stages: int = 4,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Run recurrences over chunks.

    Args:
      operands: bfloat16 [B, T, heads, D]; head h of H reads head h // (H / heads).
      gates: float32 [B, H, n, rows, C].
      initial: float32 [len(recurrences), B, H, D, D].
      prefix: bfloat16 [recurrences, B, H, n, D, D], a state P for every chunk.
      split: multiply a * weight as the sum of two bfloat16 numbers, exact to 2^-16.
      reverse: walk from the last chunk to the first.
      stages: chunks whose loads are in flight, >= 2. On an H200 2 and 3 were 19 and 2% slower.

    Returns:
      states before each chunk was added, bfloat16 [R, B, H, n, D, D] of R recurrences; the last
      ones, float32 [R, B, H, D, D]; with `prefix`, <P, keep state> before the chunk was added, as
      sums over rows, float32 [R, B, H, n, D].
    """
    S, B, H, D, _ = initial.shape
    n, rows = gates.shape[2:4]
    paired = prefix is not None
    loads = [1 + len(s.operands) + paired for s in recurrences]
    room = max(len(s.operands) for s in recurrences)
    scratch = {
        "x_s": tile((stages, room, C, D)),
        "gates_s": plgpu.SMEM((stages, rows, C), f32),
        "left_s": tile((max(len(s.pairs) for s in recurrences) * (2 if split else 1), C, 64)),
        "out_s": tile((2, 64, D)),
        "state_s": tile((64, D), f32),
        "bars": [plgpu.Barrier(num_arrivals=m, num_barriers=stages) for m in loads],
        "bar": plgpu.Barrier(),
    }
    if paired:
        scratch |= {"prefix_s": tile((stages, 64, D)), "row_s": plgpu.SMEM((2, 64), f32)}
    products = (jax.ShapeDtypeStruct((S, B, H, n, D), f32),) if paired else ()
    return kernel(
        _scan_body,
        out=(
            jax.ShapeDtypeStruct((S, B, H, n, D, D), bf16),
            jax.ShapeDtypeStruct(initial.shape, f32),
            *products,
        ),
        grid={"half": D // 64, "recurrence": S, "h": H, "b": B},
        scratch=scratch,
        interpret=interpret,
        recurrences=recurrences,
        inputs=len(operands),
        split=split,
        reverse=reverse,
        stages=stages,
    )(*operands, gates, initial, *((prefix,) if paired else ()))


def _scan_body(
    *refs: Ref,
    recurrences: tuple[Recurrence, ...],
    inputs: int,
    split: bool,
    reverse: bool,
    stages: int,
    wg: Warpgroup,
    x_s: Ref,
    gates_s: Ref,
    left_s: Ref,
    out_s: Ref,
    state_s: Ref,
    bars: list[Ref],
    bar: Ref,
    prefix_s: Ref = None,
    row_s: Ref = None,
) -> None:
    operands, (gates_g, initial_g, *rest) = refs[:inputs], refs[inputs:]
    paired = prefix_s is not None
    prefix_g: Ref
    products_g: Ref
    prefix_g, out_g, last_g, products_g = rest if paired else (None, *rest, None)
    half, b, h = lax.axis_index("half"), lax.axis_index("b"), lax.axis_index("h")
    H, n = gates_g.shape[1:3]
    mine = pl.ds(half * 64, 64)  # this CTA's rows of the state
    parts = 2 if split else 1

    def run(number: int, recurrence: Recurrence, bars: Ref) -> None:
        def chunk(i):
            return n - 1 - i if reverse else i

        def load(i):
            c, slot = chunk(i), lax.rem(i, stages)
            bar = bars.at[slot]
            for place, operand in enumerate(recurrence.operands):
                x_g = operands[operand]
                head = h // (H // x_g.shape[2])
                x_g = x_g.at[b, pl.ds(c * C, C), head]
                plgpu.copy_gmem_to_smem(x_g, x_s.at[slot, place], bar)
            plgpu.copy_gmem_to_smem(gates_g.at[b, h, c], gates_s.at[slot], bar)
            if paired:
                plgpu.copy_gmem_to_smem(prefix_g.at[number, b, h, c, mine], prefix_s.at[slot], bar)

        for i in range(min(stages - 1, n)):
            load(jnp.int32(i))
        plgpu.copy_gmem_to_smem(initial_g.at[number, b, h, mine], state_s, bar)
        plgpu.barrier_wait(bar)

        def step(i, state):
            slot, out = lax.rem(i, stages), lax.rem(i, 2)
            # out_s[out] was copied two steps ago.
            plgpu.wait_smem_to_gmem(2 if paired else 1, wait_read_only=True)
            out_s[out] = state.astype(bf16)
            plgpu.barrier_wait(bars.at[slot])
            for place, (a, _, weight) in enumerate(recurrence.pairs):
                left = matrix(x_s.at[slot, a, :, mine])
                left *= along_rows(vector(gates_s.at[slot, weight]), 64)
                for part in range(parts):
                    rounded = left.astype(bf16)
                    left_s[parts * place + part] = rounded
                    left -= rounded.astype(f32)
            state = state * gates_s[slot, recurrence.keep, C - 1]
            if paired:
                given = matrix(prefix_s.at[slot])
                row_s[out] = jnp.sum(state * given, axis=1)
                if recurrence.coef is not None:
                    state += gates_s[slot, recurrence.coef, 0] * given
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s.at[out], out_g.at[number, b, h, chunk(i), mine])
            if paired:
                plgpu.copy_smem_to_gmem(row_s.at[out], products_g.at[number, b, h, chunk(i), mine])

            @pl.when(i + stages - 1 < n)
            def load_next():  # into the slot of the chunk before this one, whose products are done
                load(i + stages - 1)

            def add(acc):
                for i in range(parts * len(recurrence.pairs)):
                    right = x_s.at[slot, recurrence.pairs[i // parts][1]]
                    plgpu.wgmma(acc, transposed(left_s.at[i]), right)

            return wg.accumulate(state, add)

        state = lax.fori_loop(0, n, step, plgpu.load(state_s, layout=plgpu.Layout.WGMMA))
        state_s[...] = state
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(state_s, last_g.at[number, b, h, mine])
        plgpu.wait_smem_to_gmem(0)

    for number, recurrence in enumerate(recurrences):
        pl.when(lax.axis_index("recurrence") == number)(
            partial(run, number, recurrence, bars[number])
        )
