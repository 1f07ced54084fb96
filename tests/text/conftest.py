"""One model and one size for all conversations, so that they share programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest

from hmf_jax.config import HybridConfig
from hmf_jax.demo import build_tokenizer
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingParams
from hmf_jax.text import ChatSession

TOKENIZER: Any = build_tokenizer()
SIZE: dict[str, Any] = {"capacity": 1024, "prefill_chunk": 64}


@pytest.fixture(scope="package")
def model() -> HybridLM:
    ends = TOKENIZER.eos_token_id
    config = HybridConfig.preset("tiny", layer_kinds=("*", "M2"), eos_token_id=ends)
    return HybridLM.init(config, dtype=jnp.float32)


@pytest.fixture
def session(model: HybridLM) -> Callable[..., ChatSession]:
    """Makes a session; options as those of `ChatSession`."""

    def make(tokenizer: Any = TOKENIZER, **options: Any) -> ChatSession:
        usual = {"sampling": SamplingParams(temperature=1.0, seed=3), "max_new_tokens": 40}
        return ChatSession(model, tokenizer, **{**usual, **SIZE, **options})

    return make
