"""Stock Qwen3: logits equal transformers' own, for random models it saved (needs torch)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.loading import from_pretrained, save_pretrained
from tests.util import rel

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers")

BASE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,  # heads x head_dim differs from hidden_size, as in the 32B model
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 5e6},
)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True},
    "sliding": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "yarn": {"rope_parameters": YARN},
    "yarn-fine": {
        "rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(tmp_path, variant):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**{**BASE, **VARIANTS[variant]}, attn_implementation="eager")
    stock = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():  # freshly made norms and biases are ones and zeros: not a test of them
        for name, p in stock.named_parameters():
            p.copy_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.5) + ("norm" in name))
    stock.save_pretrained(tmp_path / "stock", max_shard_size="100KB")
    tokens = np.random.default_rng(0).integers(0, 97, (2, 40))
    with torch.no_grad():
        wanted = stock(torch.from_numpy(tokens)).logits.numpy()

    with jax.default_matmul_precision("highest"):
        model = from_pretrained(tmp_path / "stock", dtype=jnp.float32, progress=False)
        logits, _ = model(jnp.asarray(tokens))
        assert rel(logits, wanted) < 2e-6
        # Saved again it is still the same model, here and there.
        save_pretrained(model, tmp_path / "saved", progress=False)
        again = from_pretrained(tmp_path / "saved", dtype=jnp.float32, progress=False)
        np.testing.assert_array_equal(again(jnp.asarray(tokens))[0], logits)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager"
    )
    with torch.no_grad():
        np.testing.assert_array_equal(theirs(torch.from_numpy(tokens)).logits.numpy(), wanted)
