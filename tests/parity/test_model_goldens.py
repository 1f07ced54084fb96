"""Every model case recorded from the original: float32 to 1e-4, bfloat16 no worse than its own.

The quick run takes a few cases that together have every layer kind; the others are slow (each
compiles its own programs). Of the small set in tests/data, all are quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.loading import from_pretrained
from hmf_jax.verify import Report, run_case, verify_dir
from tests.goldens import PACKED, SMALL, cases, expected, golden

QUICK = ("attn_hd64_bias", "swa", "gka", "gdn_opts", "m2_rope", "bmf_m2_untied")
FAMILIES_QUICK = ("q35_text",)
LOGITS = {"logits", "logits (prefill)", "logits_tail", "decode"}


def marked(names, quick) -> list:
    if PACKED == SMALL:
        return names
    slow = pytest.mark.slow
    return [
        n if n in quick or not isinstance(n, str) else pytest.param(n, marks=slow) for n in names
    ]


def load(directory: Path, dtype):
    return from_pretrained(directory, dtype=dtype, progress=False)


def recorded_of(directory: Path) -> set[str]:
    """Names of recorded tensors, less those that all cases have."""
    more = ("layers.", "state.", "aux", "original_scale.")
    return {name for name in expected(directory) if name.startswith(more)}


def failures(report: Report) -> str:
    return "\n".join(str(c) for c in report.checks if not c.ok)


@pytest.mark.parametrize("case", marked(cases("model"), QUICK))
def test_float32(case: str):
    directory = golden(case)
    report = verify_dir(directory, load)
    assert report.ok, failures(report)
    compared = {c.name for c in report.checks}
    assert compared == recorded_of(directory) | LOGITS


@pytest.mark.parametrize("case", marked(cases("model", families=True), FAMILIES_QUICK))
def test_other_base_families_in_float32(case: str):
    directory = golden(case)
    report = verify_dir(directory, load)
    assert report.ok, failures(report)
    assert {c.name for c in report.checks} == recorded_of(directory) | LOGITS
    reported = {c.name for c in report.checks if c.tolerance is None}
    assert reported <= {"original_scale.logits"}


@pytest.mark.parametrize("case", marked(cases("model"), ("attn_hd64_bias",)))
def test_bfloat16(case: str):
    report = verify_dir(golden(case), load, dtype="bfloat16")
    assert report.ok, failures(report)
    judged = {c.name for c in report.checks if c.tolerance is not None}
    assert judged == {"logits", "logits (prefill)"}


def test_a_wrong_model_fails():
    directory = golden("swa")
    case = json.loads((directory / "case.json").read_text())
    recorded = expected(directory)
    model: Any = load(directory, jnp.float32)
    model.layers[1].mixer.o_proj.kernel[...] *= 1.001
    checks = {c.name: c for c in run_case(model, case, recorded)}
    assert checks["layers.0.layer_out"].ok and checks["state.0.key_last4"].ok
    assert not checks["layers.1.mixer_out"].ok and not checks["logits"].ok
    assert not checks["decode"].ok
    assert np.isclose(checks["layers.1.mixer_out"].error, 1e-3, rtol=0.02)
