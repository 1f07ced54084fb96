"""Layers that the original does not have in a family, and the shapes by name."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hmf_jax import families
from hmf_jax.cli import app
from hmf_jax.config import HybridConfig
from hmf_jax.loading import save_pretrained
from hmf_jax.memory import describe, plan_memory
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


def test_the_guide_has_every_family():
    """Model types, shapes and the size of its row."""
    table = ast.parse(Path(families.__file__).read_text())
    (rows,) = [
        node.value.elts
        for node in table.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "_TABLE"
        and isinstance(node.value, ast.Tuple)
    ]
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    for row, family in zip(rows, families.FAMILIES.values(), strict=True):
        (line,) = [x for x in page.splitlines() if f"| `{family.stock[0]}`" in x]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[-1] == str((row.end_lineno or 0) - row.lineno + 1), family.name
        presets = {n for n, p in PRESETS.items() if p.fields.get("family", "qwen3") == family.name}
        assert set(re.findall(r"`([^`]+)`", cells[3])) == presets
    assert all(f"`{name}`" in page for name in families.model_types())


def test_memory_of_experts_and_of_a_tied_head():
    config = hybrid("qwen3_moe", "*", "GKA", "*")
    assert config.moe is not None
    plan = plan_memory(config, 100, 40e6)
    assert plan.weights >= 2 * num_parameters(config)  # A_log and dt_bias are float32
    experts = 3 * config.moe.intermediate_size + 2 * config.hidden_size
    dense = plan_memory(dataclasses.replace(config, moe=None), 100, 40e6)
    assert plan.workspace - dense.workspace == 2048 * config.moe.experts_per_token * experts * 2
    assert plan.sequence == dense.sequence
    tied = plan_memory(dataclasses.replace(config, tie_word_embeddings=True), 100, 40e6)
    assert plan.weights - tied.weights == 2 * config.vocab_size * config.hidden_size
    text = describe(config)
    assert "8 experts of 24 (3 per token; MLP 48 in 1 of the layers)" in text
    assert f"{num_active_parameters(config):,} of them used by a token" in text
    assert "and one of 20 for all" in describe(hybrid("qwen3_next"))
    assert "2 heads of queries and keys, 4 of values, of 16" in describe(hybrid("qwen3_next"))


def test_convert_asks_before_it_reads_a_model(tmp_path):
    config = hybrid("qwen3_next", "M2")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    command = ["convert", str(tmp_path), str(tmp_path / "hf"), "--to", "hf"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1 and "has no M2 layers in the family qwen3_next" in refused.output
    assert "--not-for-original" in refused.output and "weights" not in refused.output
    told = CliRunner().invoke(app, [*command, "--not-for-original"])
    assert "has no M2" not in told.output  # but that the weights are not there
