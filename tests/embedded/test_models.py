"""The models that come with the package remember, and only through their states."""

import random

import jax.numpy as jnp
import pytest

from hmf_jax import embedded, from_pretrained
from hmf_jax.embedded import corpus
from hmf_jax.embedded.plan import HYBRIDS, WINDOW
from hmf_jax.embedded.recall import accuracy
from hmf_jax.embedded.results import slug


@pytest.mark.parametrize(
    "name", [n if n == "gka" else pytest.param(n, marks=pytest.mark.slow) for n in embedded.HYBRIDS]
)
def test_a_hybrid_remembers_what_its_windows_have_forgotten(name):
    model = from_pretrained(embedded.directory(name), dtype=jnp.float32, progress=False)
    patterns = {slug(n): pattern for n, pattern in HYBRIDS.items()}
    assert model.config.hybrid_override_pattern == patterns[name]
    assert model.config.swa is not None and model.config.swa.window_size == WINDOW
    asked = corpus.questions(random.Random("not seen in training"), 32, 128, 4, 42)
    assert accuracy(model, asked) > 0.75
    assert accuracy(model, asked, forgetful=True) < 0.1


def test_files_are_small_and_complete():
    for name in embedded.NAMES:
        files = {f.name: f.stat().st_size for f in embedded.directory(name).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
        assert sum(files.values()) < 5e6
    with pytest.raises(ValueError, match="no embedded model 'x'; there are gka"):
        embedded.directory("x")
