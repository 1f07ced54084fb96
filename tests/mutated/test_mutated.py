"""Damaged model directories: an error that says what is wrong, or the model that was saved."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

import hmf_jax
from hmf_jax import from_pretrained, save_orbax, save_pretrained
from tests.mutated import texts  # noqa: F401  (its kinds add themselves)
from tests.mutated.judge import wrong
from tests.mutated.kinds import KINDS, Kind

DIRECTORIES = int(os.environ.get("MUTATED_DIRECTORIES", "600"))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and locks of Linux")


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """The embedded model in every form that is read."""
    place = tmp_path_factory.mktemp("originals")
    embedded = Path(hmf_jax.__file__).parent / "embedded" / "gka"
    model = from_pretrained(embedded, dtype=None, progress=False)
    save_pretrained(model, place / "shards", max_shard_size="300KB", progress=False)
    for name in ("orbax", "unsummed"):
        save_orbax(model, place / name)
    (place / "unsummed" / "checksums.sha256").unlink()
    return {"file": embedded, **{n: place / n for n in ("shards", "orbax", "unsummed")}}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_one_of_each_kind(kind: Kind, originals, tmp_path):
    assert wrong(kind, 0, originals, tmp_path / "place") is None


@pytest.mark.slow
def test_many(originals, tmp_path):
    """Every kind at many places; prints how many of each group were tried and were right."""
    tried, right, faults = Counter(), Counter(), []
    for i in range(DIRECTORIES):
        kind, seed = KINDS[i % len(KINDS)], 1 + i // len(KINDS)
        fault = wrong(kind, seed, originals, tmp_path / "place")
        tried[kind.group] += 1
        right[kind.group] += fault is None
        if fault is not None:
            faults.append(f"{kind.name} {seed}: {fault}")
    for group, count in tried.items():
        print(f"{group:24} {count:5} tried {right[group]:5} right")
    assert not faults, "\n".join(faults)
