"""Layers that the original does not have in a family, and the shapes by name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from hmf_jax.config import HybridConfig
from hmf_jax.loading import save_pretrained
from hmf_jax.memory import describe
from hmf_jax.mixers import BMojoConfig, SWAConfig
from hmf_jax.presets import PRESETS
from hmf_jax.table import num_active_parameters, num_parameters
from tests.families.bases import hybrid


@pytest.mark.parametrize(
    ("family", "layer_kinds", "foreign"),
    [
        ("llama", ("*", "GKA", "GDN", "M2", "BMF", "SWA"), ()),
        ("llama", ("GDN>GKA", "*DA"), ("GDN>GKA",)),
        ("qwen3_next", ("GDN>GKA", "*DA", "GKA*", "BMF*", "GDN", "GKA", "*"), ()),
        ("qwen3_next", ("M2", "SWA*", "*", "M2"), ("M2", "SWA*")),
        ("qwen3_5_moe", ("BMF", "GKA"), ("BMF",)),
        ("qwen3_moe", ("BMF", "M2", "SWA"), ()),
    ],
)
def test_layers_that_the_original_does_not_have(family, layer_kinds, foreign, tmp_path):
    swa, bmojo = SWAConfig(4), BMojoConfig(4, ssm_mixer="M2")
    config = hybrid(family, *layer_kinds, swa=swa, bmojo=bmojo)
    assert config.foreign_layers == foreign
    assert HybridConfig.from_dict(config.to_dict()).layer_kinds == layer_kinds
    assert ("only this package can load it" in describe(config)) == bool(foreign)
    if foreign:

        class Model:  # what is looked at first
            pass

        model: Any = Model()
        model.config = config
        with pytest.raises(
            ValueError, match=f"has no {foreign[0].replace('*', '.')}.* for_original"
        ):
            save_pretrained(model, tmp_path / "model")
        assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back(name):
    for mixer in (None, "*", ("GDN", "GKA")):
        config = HybridConfig.preset(name, mixer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert HybridConfig.from_dict(config.to_dict()) == config
    replaced = HybridConfig.preset(name, "GKA")
    assert replaced.layer_kinds.count("GKA") == len(replaced.layer_kinds) // 2
    base_kinds = HybridConfig.preset(name, "*").layer_kinds
    assert set(base_kinds) == ({"GDN", "*"} if replaced.linear else {"*"})


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("8b", 8.191, 8.191),
        ("llama-3.1-8b", 8.030, 8.030),
        ("llama-3.2-1b", 1.236, 1.236),
        ("qwen2.5-7b", 7.616, 7.616),
        ("qwen2.5-0.5b", 0.494, 0.494),
        ("qwen3-30b-a3b", 30.532, 3.353),
        ("qwen3-next-80b-a3b", 79.674, 3.875),
    ],
)
def test_presets_have_as_many_parameters_as_the_released_models(name, billions, active):
    config = HybridConfig.preset(name, "*")
    assert num_parameters(config) / 1e9 == pytest.approx(billions, abs=5e-4)
    assert num_active_parameters(config) / 1e9 == pytest.approx(active, abs=5e-4)
    assert ("of them used by a token" in describe(config)) == (active < billions)
