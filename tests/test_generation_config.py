"""What generation_config.json may say, and what comes of it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from hmf_jax.config import HybridConfig
from hmf_jax.generation_config import GenerationDefaults, generation_defaults
from hmf_jax.sampling import SamplingParams

CONFIG = HybridConfig.preset("tiny", eos_token_id=[2, 3])


def read(path: Path, stored: Any, config: HybridConfig | None = CONFIG) -> GenerationDefaults:
    text = stored if isinstance(stored, str) else json.dumps(stored)
    (path / "generation_config.json").write_text(text)
    return generation_defaults(config, path)


def test_what_is_recommended(tmp_path):
    warnings.simplefilter("error")
    assert generation_defaults(CONFIG, tmp_path).eos_ids == (2, 3)
    assert generation_defaults(None).sampling == SamplingParams()
    found = read(
        tmp_path,
        {
            "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1,
            "repetition_penalty": 1.1, "eos_token_id": [5, 2], "max_new_tokens": 7,
            "transformers_version": "5", "num_beams": 1, "pad_token_id": 0, "use_cache": True,
            "no_repeat_ngram_size": 0, "length_penalty": 1.0, "forced_eos_token_id": None,
        },
    )  # fmt: skip
    assert found.sampling == SamplingParams(0.6, 20, 0.95, 0.1, 1.1)
    assert found.eos_ids == (5, 2, 3) and found.limit(100, 50) == 7
    assert read(tmp_path, {"eos_token_id": 5}, None).eos_ids == (5,)
    # A penalty also acts without sampling, the rest does not.
    found = read(tmp_path, {"temperature": 0.6, "repetition_penalty": 1.1})
    assert found.sampling == SamplingParams(repetition_penalty=1.1)
    assert read(tmp_path, {"do_sample": True}).sampling == SamplingParams(temperature=1.0)


def test_limits(tmp_path):
    assert read(tmp_path, {}).limit(10, 50) == 50
    assert read(tmp_path, {"max_length": 40}).limit(10, 50) == 30
    assert read(tmp_path, {"max_length": 40, "max_new_tokens": 60}).limit(10, 50) == 60
    with pytest.raises(ValueError, match="max_length=40, and the prompt has 40 tokens"):
        read(tmp_path, {"max_length": 40}).limit(40, 50)


@pytest.mark.parametrize(
    ("stored", "error"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"temperature": NaN}', "not valid JSON"),
        ('{"temperature": 1e999}', "not valid JSON"),
        ({"do_sample": "yes"}, "do_sample='yes' must be true or false"),
        ({"temperature": "hot"}, "temperature='hot' must be a number"),
        ({"temperature": True}, "temperature=True must be a number"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_p": 1.5, "do_sample": True}, "top_p=1.5"),
        ({"top_k": 1.5}, "top_k=1.5 must be a whole number"),
        ({"top_k": -1}, "top_k=-1 must be a whole number"),
        ({"min_p": 2}, "min_p=2"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"repetition_penalty": [1.1]}, r"repetition_penalty=\[1.1\] must be a number"),
        ({"eos_token_id": -1}, "eos_token_id=-1 must be a token id"),
        ({"eos_token_id": 10**6}, "below the vocabulary size 320"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id=.* must be a token id"),
        ({"eos_token_id": True}, "eos_token_id=True must be a token id"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id=.* must be a token id"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number >= 1"),
        ({"max_new_tokens": "9"}, "max_new_tokens='9' must be a whole number"),
        ({"max_length": 2**40}, "max_length=1099511627776 must be a whole number"),
    ],
)
def test_values_that_cannot_be(tmp_path, stored, error):
    with pytest.raises(ValueError, match=error) as told:
        read(tmp_path, stored)
    assert str(tmp_path / "generation_config.json") in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "stored",
    [
        {"num_beams": 4},
        {"penalty_alpha": 0.6},
        {"typical_p": 0.9},
        {"no_repeat_ngram_size": 3},
        {"min_length": 5},
        {"bad_words_ids": [[1]]},
        {"stop_strings": ["x"]},
        {"temprature": 0.5},
        {"early_stopping": True},
    ],
)
def test_what_is_not_supported_is_said(tmp_path, stored):
    (name,) = stored
    with pytest.warns(UserWarning, match=f"{name}=.* is not supported and has no effect"):
        read(tmp_path, stored)
