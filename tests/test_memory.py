"""Plans of memory are what the arrays take, for every kind of layer, also in fused models."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from hmf_jax.config import HybridConfig
from hmf_jax.memory import (
    StateMemory,
    describe,
    device_bytes,
    memory_table,
    plan_engine,
    plan_memory,
    size_text,
    state_memory,
)
from hmf_jax.model import HybridLM
from tests.util import tiny_config

KIB = 1024
FUSED = ("*DA", "GKA*", "SWA*", "BMF*", "M2*", "*", "GDN>GKA")


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_states_of_fused_layers_are_those_of_their_students(dtype):
    """What grows with the context is keys and values of full attention: of "*" and of "*DA"."""
    config = tiny_config(FUSED)
    for context, memory in state_memory(config, (48, 96), dtype=dtype).items():
        model = jax.eval_shape(lambda: HybridLM(config, dtype=dtype or jnp.bfloat16))
        state = jax.eval_shape(lambda m, n=context: m.init_state(1, n), model)
        growing = device_bytes([state.layers[0], state.layers[5]])
        width = jnp.dtype(dtype or jnp.bfloat16).itemsize
        assert memory.attention == growing == 2 * 2 * context * 2 * 16 * width
        assert memory.total == device_bytes(state.layers)
        assert memory.fixed == device_bytes(state.layers) - growing


def test_what_does_not_grow():
    short, long = state_memory(tiny_config(("GKA*", "SWA", "BMF", "M2", "GDN")), (8, 4096)).values()
    assert short == long and short.attention == 0 and short.fixed > 0


def test_table():
    """Eight attention layers against two of them and six Mamba-2 layers."""
    config = tiny_config(("*DA",) * 2 + ("M2*",) * 6)
    per_token = 2 * 2 * 2 * 16 * 2  # of two layers: K and V, 2 heads of 16, bfloat16
    fixed = state_memory(config, (KIB,))[KIB].fixed
    header, line, odd = memory_table(config, (KIB, 1500)).splitlines()
    assert header.split()[0] == "context"
    saved = 1 - (per_token * KIB + fixed) / (4 * per_token * KIB)
    sizes = [per_token * KIB, fixed, per_token * KIB + fixed, 4 * per_token * KIB]
    assert line.split() == ["1K", *" ".join(map(size_text, sizes)).split(), f"{saved:.0%}"]
    assert odd.split()[0] == "1500"


def test_plan_by_hand():
    """Weights, a prefill chunk, and per sequence its state and logits in two precisions."""
    config = tiny_config(("*DA", "GKA*"))
    weights = device_bytes(jax.eval_shape(lambda: HybridLM(config)))
    state = state_memory(config, (100,))[100].total
    plan = plan_memory(config, 100, 40e6)
    assert plan.weights == weights and plan.sequence == state + 64 * (2 + 4 + 4)
    assert plan.workspace == 64 * 2048 * 32 * 2
    assert plan.sequences == int((0.9 * 40e6 - weights - plan.workspace) / plan.sequence)
    more = plan_memory(config, 100, 40e6, fraction=1.0, prefill_chunk=64)
    assert more.workspace == plan.workspace // 32 and more.sequences > plan.sequences
    wide = plan_memory(config, 100, 40e6, dtype=jnp.float32)
    assert wide.workspace == 2 * plan.workspace
    fits = plan.weights + plan.workspace + plan.sequence
    assert plan_memory(config, 100, fits, fraction=1.0).sequences == 1
    with pytest.raises(ValueError, match="one sequence of 100 tokens needs .*; 100% of the memory"):
        plan_memory(config, 100, fits - 1, fraction=1.0)


def test_description():
    config = dataclasses.replace(tiny_config(("*DA", "GKA*", "GDN>GKA")), intermediate_size=64)
    text = describe(config)
    assert text.splitlines()[0] == "3 layers: *DA-GKA*-GDN>GKA"
    assert "1 x *DA  full attention\n" in text
    assert "1 x GKA*  Gated KalmaNet, 30 Chebyshev iterations, learning from full attention" in text
    assert "learning from Gated DeltaNet" in text
    assert "hidden size 32, 4 heads (2 for keys and values) of 16, MLP 64, vocabulary 64" in text


def test_sizes_as_text():
    sizes = {
        0: "0 B",
        1023: "1023 B",
        KIB: "1.0 KiB",
        KIB**2 - KIB: "1023.0 KiB",
        KIB**2: "1.0 MiB",
        3 * KIB**3 // 2: "1.50 GiB",
        2048 * KIB**3: "2048.00 GiB",
    }
    assert {size: size_text(size) for size in sizes} == sizes
    assert StateMemory(3, 4).total == 7


def test_released_models():
    """18 of 36 layers keep 4 KiB per token; the others two float32 matrices and convolutions."""
    gka = state_memory(HybridConfig.preset("8b"), (131072,))[131072]
    assert gka.attention == 18 * 4096 * 131072
    matrices, taps = 2 * 32 * 128 * 128 * 4, 3 * (32 + 8 + 8) * 128 * 2
    assert gka.fixed == 18 * (matrices + taps)


def engine_plan(kinds=("*DA", "GKA*"), **options):
    return plan_engine(tiny_config(kinds), **{"memory": 40e6, "page_size": 32, **options})


def test_engine_plan_by_hand():
    """Weights, a chunk, slots; what is left is divided as a prefix of 4096 tokens divides it."""
    config = tiny_config(("*DA", "GKA*"))
    plan = engine_plan(prefill_chunk=64)
    assert plan.weights == device_bytes(jax.eval_shape(lambda: HybridLM(config)))
    page = 2 * 32 * 2 * 16 * 2  # keys and values of 32 tokens, 2 heads of 16, bfloat16
    assert plan.page_bytes == page and plan.capacity == config.max_position_embeddings
    fixed = state_memory(config, (32,))[32].fixed
    assert plan.snapshot_bytes == fixed + 64 * 3 and plan.slot_bytes == fixed + 64 * 19
    rows = -(-plan.capacity // 32)
    assert plan.workspace == 64 * 64 * 32 * 2 + 3 * page * rows
    assert (plan.budget, plan.slots) == (36_000_000, 64)
    assert plan.budget - page - 1 <= plan.total <= plan.budget
    of_prefixes, of_pages = plan.prefix_bytes, plan.pages * page
    whole = 4096 // 32 * page + plan.snapshot_bytes
    assert of_prefixes / (of_prefixes + of_pages) == pytest.approx(
        plan.snapshot_bytes / whole, rel=0.01
    )
    assert plan.table().splitlines()[-1].split()[-2:] == size_text(plan.total).split()


def test_engine_plan_on_request():
    small = engine_plan(slots=2, capacity=100, fill=False)
    assert (small.slots, small.capacity, small.pages) == (2, 100, 2 * 2 * (4 + 1))
    assert small.prefix_bytes <= 16 * small.snapshot_bytes
    off = engine_plan(prefixes=False)
    assert off.prefix_bytes == 4 * off.snapshot_bytes and off.pages > engine_plan().pages
    recurrent = engine_plan(("GKA*", "M2*"), slots=2, capacity=100)
    assert recurrent.page_bytes == 0 and recurrent.pages >= 2 * 4
    least = off.weights + off.workspace + 3 * off.slot_bytes + 8 * off.page_bytes
    tight = engine_plan(memory=least, fraction=1.0)
    assert tight.slots < 64 and tight.capacity < off.capacity and tight.total <= least


def test_engine_plan_that_does_not_fit():
    fits = engine_plan(slots=4, capacity=128, fraction=1.0, fill=False)
    least = fits.total - (fits.pages - 4) * fits.page_bytes - fits.prefix_bytes
    least += 4 * fits.snapshot_bytes
    assert engine_plan(slots=4, capacity=128, fraction=1.0, memory=least + fits.page_bytes)
    with pytest.raises(ValueError, match="4 slots and a row of 128 tokens need .*fewer slots"):
        engine_plan(slots=4, capacity=128, fraction=1.0, memory=least - 1)
    with pytest.raises(ValueError, match="capacity"):
        engine_plan(capacity=10**7)
