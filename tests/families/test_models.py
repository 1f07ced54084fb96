"""Windows of base models, models that are read as others, and models that cannot be."""

from __future__ import annotations

import dataclasses
import warnings

import pytest

from hmf_jax.config import HybridConfig
from hmf_jax.families import REFUSED
from hmf_jax.mixers import SWAConfig
from hmf_jax.options import RopeConfig
from tests.families.bases import BASES, SHAPE, base, hybrid


def test_windows_of_base_models():
    assert base("qwen3_moe", sliding_window=9).layer_kinds == ("*",) * 4
    moe = base("qwen3_moe", sliding_window=9, use_sliding_window=True, max_window_layers=3)
    assert moe.layer_kinds == ("SWA",) * 4 and moe.swa == SWAConfig(9)
    ministral = base("ministral3", sliding_window=9)
    assert ministral.layer_kinds == ("SWA",) * 4 and ministral.swa == SWAConfig(9)
    assert "use_sliding_window" not in ministral.to_dict() and ministral.is_stock
    wider = dataclasses.replace(ministral, swa=SWAConfig(11)).to_dict()
    assert wider["sliding_window"] == 11 and HybridConfig.from_dict(wider).swa == SWAConfig(11)
    qwen2 = base("qwen2", sliding_window=9, use_sliding_window=True, max_window_layers=3)
    assert qwen2.layer_kinds == ("*", "*", "*", "SWA")


def test_the_window_of_a_ministral_hybrid():
    """sliding_window is a window of all attention there, or a copy of swa_config's."""
    data = hybrid("ministral3", "*", "GKA", "*").to_dict()
    with pytest.warns(UserWarning, match="are read as SWA"):
        config = HybridConfig.from_dict({**data, "sliding_window": 9})
    assert config.layer_kinds == ("SWA", "GKA", "SWA") and config.swa == SWAConfig(9)
    assert config.to_dict()["sliding_window"] is None
    own = {**data, "sliding_window": 9, "swa_config": {"window_size": 9}}
    assert HybridConfig.from_dict(own).layer_kinds == ("*", "GKA", "*")
    fused = {**data, "sliding_window": 9, "hybrid_override_pattern": "*-GKA*-*DA"}
    with pytest.raises(ValueError, match=r"attention of '\*DA', 'GKA\*' has a window"):
        HybridConfig.from_dict(fused)


def test_mistral_is_read_as_llama():
    data = {**SHAPE, "model_type": "mistral", "sliding_window": None}
    config = HybridConfig.from_dict(data)
    assert config.family == "llama" and config.is_stock
    assert config.to_dict()["model_type"] == "mistral"
    primed = dataclasses.replace(config, layer_kinds=("GKA", "*"))
    assert primed.to_dict()["model_type"] == "hybrid_llama"
    for window in ({"sliding_window": 5}, {}):
        with pytest.raises(ValueError, match="of a mistral model is not supported"):
            HybridConfig.from_dict({**SHAPE, "model_type": "mistral", **window})


VISION = {"vision_config": {"depth": 2}, "image_token_id": 5, "vision_start_token_id": 6}
MROPE = {"type": "mrope", "mrope_section": [2, 1, 1]}


@pytest.mark.parametrize(
    ("data", "family", "model_type"),
    [
        (
            {"model_type": "qwen3_5_moe", "text_config": BASES["qwen3_5_moe"]},
            "qwen3_5_moe",
            "qwen3_5_moe_text",
        ),
        (
            {"model_type": "qwen3_5_moe_hmf", "text_config": hybrid("qwen3_5_moe").to_dict()},
            "qwen3_5_moe",
            "qwen3_5_moe_hmf_text",
        ),
        (
            {"model_type": "hybrid_qwen2_5_vl", "text_config": hybrid("qwen2").to_dict()},
            "qwen2",
            "hybrid_qwen2",
        ),
        (
            {
                "model_type": "qwen2_5_vl",
                "text_config": {**SHAPE, "model_type": "qwen2_5_vl_text", "rope_scaling": MROPE},
            },
            "qwen2",
            "qwen2",
        ),
        ({**SHAPE, "model_type": "qwen2_5_vl", "rope_scaling": MROPE}, "qwen2", "qwen2"),
    ],
    ids=["qwen3_5_moe", "qwen3_5_moe_hmf", "hybrid_qwen2_5_vl", "qwen2_5_vl", "flat"],
)
def test_the_text_part_of_a_composite_model(data, family, model_type):
    data = {**data, **VISION, "architectures": ["XForConditionalGeneration"]}
    (data.get("text_config") or data).update(bos_token_id=1, eos_token_id=2)
    with pytest.warns(UserWarning, match="only the text part is read"):
        config = HybridConfig.from_dict({**data, "tie_word_embeddings": True})
    assert (config.family, config.tie_word_embeddings) == (family, True)
    written = config.to_dict()
    assert written["model_type"] == model_type and not VISION.keys() & written.keys()
    assert written["architectures"][0].endswith("ForCausalLM")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HybridConfig.from_dict(written).layer_kinds == config.layer_kinds
    if "rope_scaling" in str(data):
        assert config.rope == RopeConfig(1e6) and config.rms_norm_eps == 1e-5
    with pytest.raises(ValueError, match="quantized"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        HybridConfig.from_dict({**data, "quantization_config": {"bits": 8}})


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_models_say_why(model_type):
    with pytest.raises(ValueError, match=f"model_type '{model_type}' is not supported \\("):
        HybridConfig.from_dict({"model_type": model_type})
