"""How much a new turn reads: the last answer and the new words, whatever the template drops."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.config import HybridConfig
from hmf_jax.model import HybridLM
from hmf_jax.text import ChatSession, load_tokenizer
from tests.text.conftest import SIZE
from tests.text.scripted import script
from tests.text.tokenizers import reasoning

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
MODES = ("on", "off", "tools")


def reply(tokenizer: Any, text: str, mode: str) -> list[int]:
    thought = "" if mode == "off" else f"<think>\nhm {text[:2]}\n</think>\n\n"
    end = [tokenizer.eos_token_id]
    return tokenizer.encode(thought + text, add_special_tokens=False) + end


def options_of(mode: str) -> dict[str, Any]:
    given = {"tools": [TOOL]} if mode == "tools" else {}
    return {"thinking": mode != "off", **given, "max_new_tokens": 40, **SIZE}


def written(chat: ChatSession, **options: Any) -> list[int]:
    """The conversation as the template writes it, as tokens."""
    chat_options = {"enable_thinking": chat.thinking, "tools": chat.tools or None, **options}
    text = chat.tokenizer.apply_chat_template(chat.messages, tokenize=False, **chat_options)
    return chat.tokenizer.encode(text, add_special_tokens=False)


def ten_turns(model: HybridLM, tokenizer: Any, mode: str, monkeypatch) -> ChatSession:
    """Every turn reads only what comes after the question of the turn before."""
    replies = [reply(tokenizer, f"{i} foxes.", mode) for i in range(10)]
    with monkeypatch.context() as patch:
        script(patch, replies)
        chat = ChatSession(model, tokenizer, **options_of(mode))
        held = 0
        for i in range(10):
            said = chat.send(f"Question {i}?")
            assert said.text == f"{i} foxes." and (said.thinking is None) == (mode == "off")
            answer = chat.messages.pop()
            whole = len(written(chat, add_generation_prompt=True))
            assert said.prefilled <= whole - held
            if i > 0:
                last = [chat.messages[-2]["content"], chat.messages[-1]["content"]]
                words = sum(len(tokenizer.encode(text)) for text in last)
                assert said.prefilled <= words + 60  # and what stands around messages
            held = len(written(chat))
            chat.messages.append(answer)
    assert len(chat.messages) == 20
    return chat


@pytest.mark.parametrize("mode", MODES)
def test_ten_turns_read_the_last_answer_and_the_new_words(model, mode, monkeypatch):
    tokenizer = reasoning()
    chat = ten_turns(model, tokenizer, mode, monkeypatch)
    # What the state has become in the meantime is what a fresh session reads.
    said = chat.send("And then?")
    fresh = ChatSession(model, tokenizer, messages=chat.messages[:20], **options_of(mode))
    again = fresh.send("And then?")
    assert said == again or said.tokens == again.tokens
    np.testing.assert_allclose(said.logprobs, again.logprobs, atol=1e-4)
    assert again.prefilled > 5 * said.prefilled


QWEN3 = Path(os.environ.get("HMF_QWEN3_TOKENIZER", "does not exist"))


@pytest.mark.slow
@pytest.mark.skipif(
    not (QWEN3 / "tokenizer.json").is_file(),
    reason="HMF_QWEN3_TOKENIZER is no directory with Qwen3's tokenizer.json and its template",
)
@pytest.mark.parametrize("mode", MODES)
def test_ten_turns_with_the_template_of_qwen3(mode, monkeypatch):
    config = HybridConfig.preset("tiny", layer_kinds=("*", "M2"), vocab_size=151936)
    model = HybridLM.init(config, dtype=jnp.float32)
    ten_turns(model, load_tokenizer(QWEN3), mode, monkeypatch)


def test_steps_with_tools_and_the_question_after_them(model, monkeypatch):
    """Each step goes on where the last one ended; then what was thought meanwhile is dropped."""
    tokenizer = reasoning()
    calls = [reply(tokenizer, CALL, "tools") for _ in range(6)]
    script(
        monkeypatch, [*calls, reply(tokenizer, "3.", "tools"), reply(tokenizer, "Yes.", "tools")]
    )
    chat = ChatSession(model, tokenizer, **options_of("tools"))
    said = chat.send("What is 1 + 2?")
    question = len(written(chat)) - len(calls[0]) - 1  # the mark before the reply
    for step in range(6):
        (call,) = said.tool_calls
        assert call["function"] == {"name": "add", "arguments": {"a": 1, "b": 2}}
        assert said.text == "" and said.thinking == "hm <t"
        said = chat.send({"role": "tool", "name": "add", "content": "3"})
        # The newest token of the call, the result, and the beginning of the next reply.
        assert said.prefilled < 60 and len(chat.messages) == 4 + 2 * step
    assert said.text == "3."
    said = chat.send("Sure?")
    whole = len(written(chat)) - len(reply(tokenizer, "Yes.", "tools")) - 1
    assert said.text == "Yes." and abs(said.prefilled - (whole - question)) < 30


def test_an_edited_message_goes_back_to_the_turn_before_it(model, monkeypatch):
    tokenizer = reasoning()
    replies = [reply(tokenizer, f"{i} dogs.", "off") for i in range(6)]
    script(monkeypatch, [*replies, *(reply(tokenizer, text, "off") for text in ("End.", "So."))])
    chat = ChatSession(model, tokenizer, **options_of("off"))
    for i in range(6):
        chat.send(f"Question {i}?")
    whole = written(chat)
    chat.messages = chat.messages[:-4]  # instead of the last two questions
    said = chat.send("Another question?")
    assert said.prefilled < len(whole) / 2
    chat.messages[0]["content"] = "All is different."
    chat.messages = chat.messages[:2]
    said = chat.send("Is it?")
    chat.messages.pop()
    whole = written(chat, add_generation_prompt=True)
    assert len(whole) - 10 < said.prefilled <= len(whole)  # the template begins alike
