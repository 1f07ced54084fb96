"""The recorded cases that come with the repository."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from safetensors import safe_open

from tests import goldens

CASES = json.loads((goldens.SMALL / "cases.json").read_text())


def test_the_small_set_is_small_and_has_every_layer_kind():
    assert sum(file.stat().st_size for file in goldens.SMALL.iterdir()) < 1.3e6
    kinds = {kind for case in CASES.values() for kind in case["pattern"].split("-")}
    assert kinds >= {"*", "SWA", "GKA", "GDN", "M2", "BMF"}


def test_the_small_set_is_a_part_of_the_full_one():
    if goldens.PACKED == goldens.SMALL:
        pytest.skip(goldens.MISSING)
    tensors = Counter()
    with safe_open(goldens.SMALL / "expected_0.safetensors", framework="numpy") as file:
        for key in file.keys():
            name, _, tensor = key.partition("/")
            full = goldens.expected(goldens.golden(name))[tensor]
            np.testing.assert_array_equal(file.get_tensor(key), full, err_msg=key)
            tensors[name] += 1
    full_set = json.loads((goldens.PACKED / "cases.json").read_text())
    assert CASES == {name: full_set[name] for name in tensors}
