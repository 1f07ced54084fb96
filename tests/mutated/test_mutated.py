"""Damaged model directories: an error that says what is wrong, or the model that was saved."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import pytest

import hmf_jax
from hmf_jax import from_pretrained, save_orbax, save_pretrained
from tests.families.tiny import FAMILIES, tiny_family
from tests.mutated import families, texts  # noqa: F401  (their kinds add themselves)
from tests.mutated.judge import TEXT, wrong
from tests.mutated.kinds import KINDS, REFUSED, Kind
from tests.util import random_model

DIRECTORIES = int(os.environ.get("MUTATED_DIRECTORIES", "770"))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and files of Linux")


class Originals(dict[str, Path]):
    """The embedded model in every form that is read, and tiny ones of other base families; each
    made when it is first needed."""

    def __init__(self, place: Path):
        self.place = place
        self["file"] = Path(hmf_jax.__file__).parent / "embedded" / "gka"

    def __missing__(self, form: str) -> Path:
        if form in FAMILIES:
            model = random_model(tiny_family(form, ("*", "GKA", "*")), jnp.bfloat16)
            self[form] = self.place / form
            save_pretrained(model, self[form], progress=False)
            return self[form]
        model, directory = from_pretrained(self["file"], dtype=None, progress=False), self.place
        self[form] = directory = directory / form
        if form == "shards":
            save_pretrained(model, directory, max_shard_size="300KB", progress=False)
            return directory
        save_orbax(model, directory)
        if form == "unsummed":
            (directory / "checksums.sha256").unlink()
        return directory


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Originals:
    return Originals(tmp_path_factory.mktemp("originals"))


def is_quick(kind: Kind) -> bool:
    """Whether nothing is loaded, but for two kinds."""
    if kind.name in ("bit_of_the_header", "no_index"):
        return True
    return kind.right == REFUSED and kind.form in ("file", "shards") and kind.group not in TEXT


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, id=k.name, marks=() if is_quick(k) else pytest.mark.slow) for k in KINDS],
)
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
