"""Base models: random ones that transformers made equal its own, there and back (needs torch)."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.loading import from_pretrained, save_pretrained
from hmf_jax.parameters import flat_params
from tests.util import rel

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,  # three query heads on each
    head_dim=32,  # heads x head_dim is not hidden_size
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    rope_parameters={"rope_type": "default", "rope_theta": 5e6},
)
# Original contexts are shorter than the sequences, so that every scaling shows.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
FINE = {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
QUERY_SCALE = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
SECTIONS = {**PARTIAL, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
SLIDING = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
NEXT = {
    **MOE,
    "num_hidden_layers": 4,  # three linear ones, then one of attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 20,
    "rope_parameters": PARTIAL,
}
TIED = {"tie_word_embeddings": True}
# Changes to BASE, by the configuration class of transformers.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "Qwen3": {
        "plain": {},
        "tied": TIED,
        "bias": {"attention_bias": True},
        "sliding": SLIDING,
        "yarn": {"rope_parameters": YARN},
        "yarn-fine": {"rope_parameters": {**YARN, **FINE}},
        "linear": {"rope_parameters": LINEAR},
    },
    "Llama": {
        "plain": {},
        "tied": {"rope_parameters": LLAMA3, **TIED},
        "bias": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6},
        "yarn": {"rope_parameters": YARN, "num_attention_heads": 8, "num_key_value_heads": 1},
    },
    "Qwen2": {
        "groups of 7": {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1},
        "tied": TIED,
        "sliding": SLIDING,
        "yarn": {"rope_parameters": YARN},
    },
    "Ministral3": {
        "plain": {"rope_parameters": QUERY_SCALE},
        "tied": {"rope_parameters": QUERY_SCALE, "sliding_window": 7, **TIED},
    },
    "Qwen3Moe": {
        "dense layer": {**MOE, "norm_topk_prob": True, "mlp_only_layers": [1]},
        "every other": {**MOE, "norm_topk_prob": False, "decoder_sparse_step": 2, **TIED},
        "bias": {**MOE, "attention_bias": True, "num_experts_per_tok": 1},
        "sliding": {**MOE, **SLIDING},
    },
    "Qwen3Next": {
        "plain": NEXT,
        "other layers": {
            **NEXT,
            "norm_topk_prob": False,
            "mlp_only_layers": [0],
            "attention_bias": True,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 3,
            "layer_types": ["full_attention", "linear_attention"] * 2,
        },
    },
    "Qwen3_5MoeText": {
        "plain": NEXT,
        "tied": {**NEXT, "rope_parameters": SECTIONS, **TIED},
    },
}
UNKNOWN = {"Qwen2": ["head_dim"], "Qwen3_5MoeText": ["intermediate_size"]}  # keys of BASE
TOLERANCE = {"Qwen3Next": 2e-5, "Qwen3_5MoeText": 2e-5}  # float32 recurrences on both sides
CASES = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]


def random_values(stock) -> None:
    """Fresh norms and biases are ones and zeros, and fresh matrices small: not a test of them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in stock.named_parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.4)
            else:
                p.copy_(torch.randn_like(p) * (0.4 if "conv" in name else 0.2))


def stock_model(name: str, changes: dict[str, Any]):
    options = {key: x for key, x in {**BASE, **changes}.items() if key not in UNKNOWN.get(name, ())}
    config = getattr(transformers, f"{name}Config")(**options)
    stock = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    random_values(stock)
    return stock.eval()


def load(directory):
    return from_pretrained(directory, dtype=jnp.float32, progress=False)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_logits_equal_those_of_transformers(tmp_path, name, variant):
    stock = stock_model(name, VARIANTS[name][variant])
    stock.save_pretrained(tmp_path / "stock", max_shard_size="100KB")
    tokens = np.random.default_rng(0).integers(0, 97, (2, 40))
    with torch.no_grad():
        wanted = stock(torch.from_numpy(tokens)).logits.numpy()

    with jax.default_matmul_precision("highest"):
        model = load(tmp_path / "stock")
        logits, _ = model(jnp.asarray(tokens))
        assert rel(logits, wanted) < TOLERANCE.get(name, 4e-6)
        # Saved again it is still the same model, here and there.
        save_pretrained(model, tmp_path / "saved", progress=False)
        np.testing.assert_array_equal(load(tmp_path / "saved")(jnp.asarray(tokens))[0], logits)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        np.testing.assert_array_equal(theirs(torch.from_numpy(tokens)).logits.numpy(), wanted)


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_text_equals_that_of_transformers(tmp_path, name):
    stock = stock_model(name, next(iter(VARIANTS[name].values())))
    stock.save_pretrained(tmp_path)
    tokens = np.random.default_rng(1).integers(0, 97, 20)
    with torch.no_grad():
        theirs = stock.generate(
            torch.from_numpy(tokens[None]), max_new_tokens=8, do_sample=False, use_cache=True
        )
    with jax.default_matmul_precision("highest"):
        (ours,) = load(tmp_path).generate([tokens.tolist()], max_new_tokens=8)
    assert list(ours.tokens) == theirs[0, 20:].tolist()


@pytest.mark.parametrize("name", ["Qwen3Moe", "Qwen3Next", "Qwen3_5MoeText"])
def test_experts_are_read_from_one_tensor_or_one_each(tmp_path, name):
    stock = stock_model(name, next(iter(VARIANTS[name].values())))
    stock.save_pretrained(tmp_path / "each")
    stock.save_pretrained(tmp_path / "one", save_original_format=False)
    each, one = (flat_params(load(tmp_path / directory)) for directory in ("each", "one"))
    assert each.keys() == one.keys()
    for path, x in each.items():
        np.testing.assert_array_equal(one[path], x, err_msg=path)


def test_text_of_a_model_with_images(tmp_path):
    """The text of a hybrid of Qwen2.5-VL is a hybrid of Qwen2.5; its other tensors are ignored."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = {**BASE, "num_key_value_heads": 1, "rope_parameters": rope}
    del text["head_dim"]
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 48}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config={**vision, "intermediate_size": 32}
    )
    stock = transformers.Qwen2_5_VLForConditionalGeneration(config)
    random_values(stock)
    stock.eval().save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 40))
    with torch.no_grad():
        wanted = stock(input_ids=torch.from_numpy(tokens)).logits.numpy()

    written = json.loads((tmp_path / "config.json").read_text())
    written["model_type"] = "hybrid_qwen2_5_vl"
    written["architectures"] = ["HybridQwen2_5_VLForConditionalGeneration"]
    written["text_config"] |= {"model_type": "hybrid_qwen2", "hybrid_override_pattern": "*-*-*"}
    written["text_config"]["layer_types"] = ["*"] * 3
    (tmp_path / "config.json").write_text(json.dumps(written))
    with jax.default_matmul_precision("highest"):
        assert rel(load(tmp_path)(jnp.asarray(tokens))[0], wanted) < 4e-6
