"""Answers: whole and in chunks they say the same, and every number in them is accounted for."""

from __future__ import annotations

import itertools
import json
from random import Random

import pytest

from hmf_jax.engine import Finished, New
from hmf_jax.serving.asks import ask, prompts_of, render
from hmf_jax.serving.choice import Choice
from hmf_jax.serving.protocol import Chat, Completion, read
from hmf_jax.text.deltas import Content
from tests.serving.fake import LENGTH, site

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "look", "arguments": {"a": "}{", "b": [1, {}]}}\n</tool_call>'


@pytest.fixture(scope="module")
def fake():
    with site() as site_:
        yield site_


def joined(chunks):
    """What the chunks of a chat say together, by choice, in the shape of whole answers."""
    out = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            message, delta = out.setdefault(choice["index"], {}), choice["delta"]
            for key in ("content", "reasoning", "reasoning_content"):
                if delta.get(key):
                    message[key] = message.get(key, "") + delta[key]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if len(calls) == call["index"]:
                    function = dict(call["function"])
                    calls.append({"id": call["id"], "type": call["type"], "function": function})
                else:
                    arguments = call["function"]["arguments"]
                    calls[call["index"]]["function"]["arguments"] += arguments
            if choice["finish_reason"]:
                message["finish_reason"] = choice["finish_reason"]
    return out


REPLIES = {
    "text": "Hello, wörld: 日本語 and more",
    "thinking": "<think>\nLet me see.\n</think>\n\nYes.",
    "only thinking": "<think>\nLet me see",
    "a call": CALL,
    "text and calls": f"Wait.\n{CALL}\n{CALL}",
    "all": f"<think>\nhm\n</think>\n\nWait.\n{CALL}",
    "no call": "<tool_call>\nlook(3)\n</tool_call>",
    "an empty answer": "",
    "line ends": "a\r\n\nb\u2028c\x85d\x0be",
}


@pytest.mark.parametrize("name", REPLIES)
def test_chunks_of_a_chat_are_the_answer(name, fake):
    fake.says(REPLIES[name])
    body = {"tools": TOOLS, "seed": 1}
    whole = fake.chat(**body)
    messages = [{"role": "user", "content": "hi"}]
    chunks = fake.stream("/v1/chat/completions", messages=messages, **body)
    (choice,) = whole["choices"]
    message = {k: v for k, v in choice["message"].items() if v and k != "role"}
    (told,) = joined(chunks).values()
    assert told.pop("finish_reason") == choice["finish_reason"]
    for calls in (message.get("tool_calls", ()), told.get("tool_calls", ())):
        for call in calls:
            assert len(call.pop("id")) == 29 and json.loads(call["function"]["arguments"])
    assert told == message
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[-1]["choices"][0]["delta"] == {} and "usage" not in chunks[-1]


def test_what_a_chat_is(fake):
    fake.says(REPLIES["all"])
    whole = fake.chat(tools=TOOLS)
    (choice,) = whole["choices"]
    message = choice["message"]
    assert message["reasoning"] == message["reasoning_content"] == "hm"
    assert message["content"] == "Wait." and choice["finish_reason"] == "tool_calls"
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "look", "arguments": '{"a": "}{", "b": [1, {}]}'}
    usage = whole["usage"]
    prompt = len(fake.engine.seen[-1].prompt)
    assert usage["prompt_tokens"] == prompt
    assert usage["prompt_tokens_details"] == {"cached_tokens": prompt // 2}
    reply = fake.tokenizer.encode(REPLIES["all"], add_special_tokens=False)
    assert usage["completion_tokens"] == len(reply) + 1  # the end token
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    thought = reply.index(fake.tokenizer.convert_tokens_to_ids("</think>")) + 1
    assert usage["completion_tokens_details"] == {"reasoning_tokens": thought}
    assert whole["id"].startswith("chatcmpl-") and whole["system_fingerprint"]

    hidden = fake.chat(tools=TOOLS, include_reasoning=False)["choices"][0]["message"]
    assert hidden["reasoning"] is None and hidden["content"] == "Wait."
    off = fake.chat(tools=TOOLS, tool_choice="none")["choices"][0]
    assert off["message"]["content"] == f"Wait.\n{CALL}" and off["finish_reason"] == "stop"
    fake.says(CALL)
    assert fake.chat(tools=TOOLS)["choices"][0]["message"]["content"] is None
    fake.says("<think>\nhm", ends=False)
    (choice,) = fake.chat(max_tokens=5)["choices"]
    assert choice["message"]["content"] is None and choice["finish_reason"] == "length"


def test_n_choices_and_several_prompts(fake):
    fake.says("ok")
    before = len(fake.engine.seen)
    answer = fake.text(["a", "b"], n=2, seed=7)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["seed"] for choice in answer["choices"]] == [7, 8, 7, 8]
    seen = fake.engine.seen[before:]
    assert [list(r.prompt) for r in seen] == [list(fake.tokenizer.encode(p)) for p in "aabb"]
    assert answer["usage"]["prompt_tokens"] == 2  # each prompt once
    assert answer["usage"]["completion_tokens"] == 4 * (len(fake.tokenizer.encode("ok")) + 1)
    chunks = fake.stream("/v1/completions", prompt=["a", "b"], n=2)
    texts = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: "ok", 1: "ok", 2: "ok", 3: "ok"}


STOPS = {
    "over chunks": ("one two three four five", ["ee fo"], "one two thr", "ee fo"),
    "the first one": ("one two three", ["three", "two"], "one ", "two"),
    "at the end": ("one two", ["two"], "one ", "two"),
    "not quite": ("one two thre", ["three"], "one two thre", None),
    "in the first token": ("one", ["o"], "", "o"),
}


@pytest.mark.parametrize("name", STOPS)
def test_stop_strings(name, fake):
    said, stop, text, reason = STOPS[name]
    fake.says(said)
    answer = fake.text(stop=stop, logprobs=0, return_token_ids=True)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["stop_reason"]) == (text, reason)
    assert choice["finish_reason"] == "stop"
    # Tokens after the stop string are neither told nor billed.
    count = answer["usage"]["completion_tokens"]
    assert count == len(choice["token_ids"]) == len(choice["logprobs"]["tokens"])
    assert "".join(choice["logprobs"]["tokens"]).startswith(text + (reason or ""))
    chunks = fake.stream("/v1/completions", prompt="abc", stop=stop)
    assert "".join(c["choices"][0]["text"] for c in chunks) == text
    kept = fake.text(stop=stop, include_stop_str_in_output=True)["choices"][0]["text"]
    assert kept == text + (reason or "")


def test_a_stop_string_frees_the_row(fake):
    fake.engine.script = lambda request: fake.tokenizer.encode("a stop" + " b" * 150)
    assert fake.text(max_tokens=150, stop="stop")["choices"][0]["text"] == "a "
    fake.says("ok")
    assert fake.text()["choices"][0]["text"] == "ok"
    assert not fake.engine._left


def test_stop_strings_are_not_for_calls_that_have_to_be(fake):
    fake.says(CALL)
    (choice,) = fake.chat(tools=TOOLS, tool_choice="required", stop=["name", "}"])["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].endswith("[1, {}]}")
    assert choice["finish_reason"] == "tool_calls"


def test_ends(fake):
    fake.says("abc<|endoftext|>def")
    pad = fake.tokenizer.pad_token_id
    assert fake.text()["choices"][0]["text"] == "abcdef"
    shown = fake.text(skip_special_tokens=False)["choices"][0]["text"]
    assert shown == "abc<|endoftext|>def"
    (choice,) = fake.text(stop_token_ids=[pad])["choices"]
    assert (choice["text"], choice["stop_reason"]) == ("abc", pad)
    (choice,) = fake.text(max_tokens=2)["choices"]
    assert choice["finish_reason"] == "length" and choice["stop_reason"] is None


def test_log_probabilities_of_completions(fake):
    """Keys are texts, so two tokens of one text must not become one; the chosen one is there."""
    fake.says("hé")
    answer = fake.text(logprobs=2)
    told = answer["choices"][0]["logprobs"]
    ids = [*fake.tokenizer.encode("hé"), fake.tokenizer.eos_token_id]
    assert told["token_logprobs"] == [-id / 1000 for id in ids]
    # Two bytes make the é, which is there when both are; the end token has no text.
    assert told["text_offset"] == [0, 1, 1, 2]
    for token, value, top in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
    ):
        assert top[token] == value and len(top) == 3
    fake.engine.script = lambda request: [ids[1], ids[2]]  # "\ufffd" each by itself
    (choice,) = fake.text(logprobs=0, max_tokens=2)["choices"]
    assert choice["logprobs"]["tokens"] == ["\ufffd", "\ufffd"] and choice["text"] == "é"
    named = fake.text(logprobs=0, max_tokens=2, return_tokens_as_token_ids=True)
    names = named["choices"][0]["logprobs"]["tokens"]
    assert names == [f"token_id:{id}" for id in ids[1:3]]


def test_log_probabilities_of_chats(fake):
    fake.says("hé")
    messages = [{"role": "user", "content": "hi"}]
    whole = fake.chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in whole) == "hé<|im_end|>".encode()
    for entry in whole:
        mine = {k: v for k, v in entry.items() if k != "top_logprobs"}
        assert mine in entry["top_logprobs"] and len(entry["top_logprobs"]) == 3
    chunks = fake.stream("/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=2)
    told = [c["choices"][0]["logprobs"] for c in chunks]
    assert [entry for one in told if one for entry in one["content"]] == whole
    assert fake.chat(logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert fake.chat()["choices"][0]["logprobs"] is None


def test_tokens_come_with_their_text(fake):
    """Text that is held back delays its tokens: every chunk is about the same ones."""
    text = "日本 sto stop"
    fake.says(text)
    body = {"prompt": "abc", "stop": ["stopped"], "logprobs": 0, "return_token_ids": True}
    ids = []
    for chunk in fake.stream("/v1/completions", **body):
        (choice,) = chunk["choices"]
        ids += choice["token_ids"]
        assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"])
        assert (
            fake.tokenizer.decode(choice["token_ids"], skip_special_tokens=True) == choice["text"]
        )
    assert ids == [*fake.tokenizer.encode(text), fake.tokenizer.eos_token_id]


def test_scoring_as_lm_eval_asks_for_it(fake):
    fake.says("z")
    ids = fake.tokenizer.encode("some context, continuation")
    answer = fake.text([ids], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234)
    (choice,) = answer["choices"]
    told, own = choice["logprobs"], fake.tokenizer.encode("z")
    assert choice["text"] == "some context, continuation" + "z"
    assert told["token_logprobs"] == [None, *(-id / 1000 for id in [*ids[1:], *own])]
    assert told["top_logprobs"][0] is None
    for token, value, top in zip(
        told["tokens"][1:], told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True
    ):
        assert top[token] == value
    assert told["text_offset"][:2] == [0, len(told["tokens"][0])]
    assert fake.engine.seen[-1].prompt_logprobs == 1
    # Only the prompt: nothing is generated.
    answer = fake.text([ids], max_tokens=0, logprobs=1, echo=True)
    assert answer["usage"]["completion_tokens"] == 0
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(ids)
    assert answer["choices"][0]["finish_reason"] == "length"
    chunks = fake.stream("/v1/completions", prompt=ids, echo=True, max_tokens=1)
    assert "".join(c["choices"][0]["text"] for c in chunks) == choice["text"]


def test_scores_of_the_prompt(fake):
    fake.says("z")
    (choice,) = fake.text([5, 6, 7], prompt_logprobs=2)["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None and choice["text"] == "z"
    assert set(rest[0]) == {"0", "1", "6"}
    assert rest[0]["1"]["rank"] == 2 and rest[0]["6"]["rank"] is None
    assert rest[0]["6"]["logprob"] == -0.006 and rest[0]["6"]["decoded_token"]


def test_echo_of_a_text_is_that_text(fake):
    fake.says("z")
    prompt = "<|im_start|>é"
    assert fake.text(prompt, echo=True)["choices"][0]["text"] == prompt + "z"


def test_usage_in_streams(fake):
    fake.says("one two three four five")
    options = {"include_usage": True}
    chunks = fake.stream("/v1/completions", prompt="abc", stream_options=options)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 3
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = fake.stream("/v1/completions", prompt="abc", stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == chunks[-1]["usage"]["completion_tokens"]


def test_thinking_is_decided_by_the_prompt(fake):
    fake.says("hm</think>yes")
    for kwargs in ({}, {"reasoning_effort": "none"}):
        message = fake.chat(**kwargs)["choices"][0]["message"]
        assert message["reasoning"] is None  # nobody has opened it
    text = fake.tokenizer.decode(fake.engine.seen[-1].prompt)
    assert text.endswith("</think>\n\n")  # the template was told
    fake.chat(chat_template_kwargs={"enable_thinking": True}, reasoning_effort="none")
    assert "</think>" not in fake.tokenizer.decode(fake.engine.seen[-1].prompt)


def written(what, body, tokens, cuts):
    """A choice of these tokens, told in pieces that end at these places, and the pieces."""
    chat = "messages" in body
    fields, _ = read(Chat if chat else Completion, body)
    found = [render(fields, what)] if isinstance(fields, Chat) else prompts_of(fields, what)
    choice = Choice(ask(fields, found, what, request_id="x"), 0, what)
    pieces = []
    for start, end in itertools.pairwise([0, *cuts, len(tokens)]):
        new = tokens[start:end]
        choice.push(New(0, new, [-t / 1000 for t in new]))
        pieces += [choice.take()]
    choice.push(Finished(0, "eos"))
    return choice, [piece for piece in [*pieces, choice.take()] if piece is not None]


@pytest.mark.parametrize("chat", [True, False])
def test_however_the_tokens_are_told_the_answer_is_the_same(fake, chat):
    what, random = fake.what, Random(0)
    parts = [*REPLIES.values(), "sto", "stop", "</think>", "<think>", "\U0001f600", "{", "\n"]
    for _ in range(60):
        text = "".join(random.choice(parts) for _ in range(random.randint(1, 4)))
        tokens = fake.tokenizer.encode(text, add_special_tokens=False)
        body = {"stop": random.choice([None, ["stop"], ["Wait", "\n\n"]]), "tools": TOOLS}
        body |= {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "a"}
        whole, _ = written(what, body, tokens, [])
        cuts = sorted(random.randrange(len(tokens) + 1) for _ in range(random.randint(0, 6)))
        choice, pieces = written(what, body, tokens, cuts)
        assert (choice.text, choice.reasoning) == (whole.text, whole.reasoning)
        assert [c["function"] for c in choice.calls] == [c["function"] for c in whole.calls]
        assert choice.tokens == whole.tokens == [t for p in pieces for t in p.tokens]
        assert (choice.finish_reason, choice.stop_reason, choice.count, choice.thought) == (
            (whole.finish_reason, whole.stop_reason, whole.count, whole.thought)
        )
        deltas = [delta for piece in pieces for delta in piece.deltas]
        said = "".join(d.text for d in deltas if isinstance(d, Content))
        assert choice.text == (said if chat else "".join(piece.text for piece in pieces))
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)


def test_texts_and_messages_as_tokens_and_back(fake):
    tokens = fake.tokenizer.encode("abc abc")
    told = fake.post("/tokenize", prompt="abc abc").json()
    assert told == {"tokens": tokens, "count": len(tokens), "max_model_len": LENGTH}
    strings = fake.post("/tokenize", prompt="abc abc", return_token_strs=True).json()["token_strs"]
    assert strings == fake.tokenizer.convert_ids_to_tokens(tokens)
    assert fake.post("/detokenize", tokens=tokens).json() == {"prompt": "abc abc"}
    messages = [{"role": "user", "content": "hi"}]
    told = fake.post("/tokenize", messages=messages).json()
    chat = fake.chat("hi", return_token_ids=True)
    assert told["tokens"] == chat["choices"][0]["prompt_token_ids"]
    shorter = fake.post("/tokenize", messages=messages, add_generation_prompt=False).json()
    assert shorter["tokens"] == told["tokens"][: shorter["count"]] != told["tokens"]
    for body, status, param in (
        ({}, 400, "prompt"),
        ({"prompt": 3}, 400, "prompt"),
        ({"messages": []}, 400, "messages"),
        ({"prompt": "a", "model": "nobody"}, 404, "model"),
    ):
        assert fake.error("/tokenize", status, **body)["param"] == param
    assert fake.error("/detokenize", 400, tokens=[10**6])["param"] == "tokens"
    info = fake.http.get("/tokenizer_info").json()
    assert info["eos_token"] == fake.tokenizer.eos_token and "messages" in info["chat_template"]
