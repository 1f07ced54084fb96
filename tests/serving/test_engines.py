"""How engines are made: what is left to the device and its memory, and what cannot be."""

import dataclasses

import pytest

from hmf_jax import HybridConfig
from hmf_jax.memory import EnginePlan
from hmf_jax.serving import engines
from hmf_jax.serving.config import EngineConfig

TINY = HybridConfig.preset("tiny")
# GKA-8B: 18 layers of attention, 18 of GKA.
PLAN = EnginePlan(
    budget=118 << 30, weights=16 << 30, workspace=1 << 30, slots=32, slot_bytes=75 << 20,
    capacity=16384, page_size=1024, page_bytes=72 << 20, pages=1120, snapshot_bytes=73 << 20,
    prefix_bytes=20 << 30,
)  # fmt: skip


def test_snapshots_lie_closer_the_smaller_they_are():
    usual = EngineConfig()
    assert engines.spacing(usual, PLAN) == 73 * 1024 // (8 * 72)
    bmojo_f = dataclasses.replace(PLAN, snapshot_bytes=505 << 20)
    assert engines.spacing(usual, bmojo_f) == 505 * 1024 // (8 * 72)
    small = dataclasses.replace(PLAN, snapshot_bytes=9 << 20)
    assert engines.spacing(usual, small) == 64
    assert engines.spacing(usual, dataclasses.replace(PLAN, page_bytes=0)) == 64
    assert engines.spacing(EngineConfig(snapshot_spacing=3), PLAN) == 3


def test_rows_decode_in_proportion_to_what_gpus_read(monkeypatch):
    assert [engines.interleave(chunk) for chunk in (512, 2048)] == [8, 8]
    monkeypatch.setattr(engines, "on_gpu", lambda: True)
    assert [engines.interleave(chunk) for chunk in (64, 512, 1024, 2048)] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tp=1000), "needs 1000 devices"),
        (dict(prefill_chunk=64, max_stall=0.1), "or max_stall, which chooses it"),
        (dict(prefill_chunk=64, snapshot_every=100), "a multiple of the chunk of 64"),
        (dict(snapshot_every=512, prefix_cache="off"), "snapshot_every is for a prefix cache"),
        (dict(snapshot_spacing=9, prefix_cache="off"), "snapshot_spacing is for a prefix cache"),
        (dict(host_bytes=9, prefix_cache="off"), "host_bytes is for a prefix cache"),
        (dict(snapshot_spacing=0), "snapshot_spacing"),
        (dict(max_model_len=10**9), "max_position_embeddings"),
    ],
)
def test_what_cannot_be_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        engines.checked(TINY, EngineConfig(**options))
