"""Clients that others wrote talk to the server: the `openai` package, lm-eval."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
import openai
import pydantic
import pytest

from hmf_jax import score
from tests.serving.live import Live

CAPACITY = 256


@pytest.fixture(scope="module")
def live():
    with Live.random("M2", "*", slots=4, capacity=CAPACITY) as live:
        yield live


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


QUESTION = [
    {"role": "system", "content": "Gove has 47. Remo has 20. the old cat sees a red bird."},
    {"role": "user", "content": "Remo?"},
]


def ask(client, messages=QUESTION, **more):
    more = {"model": "m", "max_tokens": 12, "temperature": 0} | more
    return client.chat.completions.create(messages=messages, **more)


def test_chat(client):
    answer = ask(client)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length") and choice.message.tool_calls is None
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 1 <= usage.completion_tokens <= 12


def test_a_stream_is_the_answer_in_pieces(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    ends = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert ends == [whole.choices[0].finish_reason]


def test_the_helper_for_streams(client):
    whole = ask(client).choices[0].message.content
    with client.chat.completions.stream(
        model="m", messages=QUESTION, max_tokens=12, temperature=0, stop=[whole[3:6]]
    ) as stream:
        text = "".join(e.delta for e in stream if e.type == "content.delta")
        final = stream.get_final_completion()
    assert text == final.choices[0].message.content == whole[:3]


def test_many_at_once(live):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            return await asyncio.gather(
                *(ask(client, temperature=1, seed=seed % 4, n=2) for seed in range(8))
            )

    answers = asyncio.run(main())
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[:4] == texts[4:] and texts[0] != texts[1]
    assert texts[0][1] == texts[1][0]  # choice i has seed + i


def test_completions(client):
    prompts = ["Remo has 20. Q: Remo?\nA: ", "Gove has 47. Q: Gove?\nA: "]
    answer = client.completions.create(model="m", prompt=prompts, max_tokens=8, temperature=0)
    alone = [
        client.completions.create(model="m", prompt=p, max_tokens=8, temperature=0) for p in prompts
    ]
    assert [c.index for c in answer.choices] == [0, 1]
    assert [c.text for c in answer.choices] == [a.choices[0].text for a in alone]
    stream = client.completions.create(
        model="m", prompt=prompts[0], max_tokens=8, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_a_stop_string_and_a_bias(client):
    text = ask(client).choices[0].message.content
    stopped = ask(client, stop=[text[3:6]])
    assert stopped.choices[0].message.content == text[: text.index(text[3:6])]
    assert stopped.choices[0].finish_reason == "stop"
    only = ask(client, logit_bias={"65": 100}, max_tokens=3)
    assert only.choices[0].message.content == "AAA"


def test_logprobs(client):
    answer = ask(client, logprobs=True, top_logprobs=3)
    told = answer.choices[0].logprobs.content
    assert len(told) == answer.usage.completion_tokens
    for item in told:
        assert len(item.top_logprobs) >= 3 and item.logprob <= 0
        assert item.logprob == max(t.logprob for t in item.top_logprobs)  # greedy
        assert item.token in [t.token for t in item.top_logprobs]
    bare = ask(client, logprobs=True)
    assert [i.logprob for i in bare.choices[0].logprobs.content] == [i.logprob for i in told]


def test_echo_with_logprobs_is_what_scores(client):
    answer = client.completions.create(
        model="m", prompt="Remo has 20.", max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    told = answer.choices[0].logprobs
    assert told.token_logprobs[0] is None and len(told.tokens) == 13
    assert "".join(told.tokens) == answer.choices[0].text
    assert answer.choices[0].text.startswith("Remo has 20.")


class Trip(pydantic.BaseModel):
    city: Literal["Rome", "Oslo"]
    alone: bool


@pytest.mark.slow
def test_structured_output(client):
    answer = client.chat.completions.parse(
        model="m", messages=QUESTION, response_format=Trip, max_tokens=150, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Trip)
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=60)
    assert answer.choices[0].message.content.lstrip().startswith("{")


def tools(*names):
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    return [
        {"type": "function", "function": {"name": name, "parameters": parameters}} for name in names
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_tools(client, choice):
    asked = dict(tools=tools("weather"), tool_choice=choice, max_tokens=150)
    answer = ask(client, **asked).choices[0]
    assert answer.finish_reason in ("tool_calls", "stop")
    (call,) = answer.message.tool_calls
    assert call.type == "function" and call.function.name == "weather" and call.id
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    name, arguments = "", ""
    for chunk in ask(client, stream=True, **asked):
        for delta in chunk.choices[0].delta.tool_calls or []:
            assert delta.index == 0
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
    assert (name, arguments) == ("weather", call.function.arguments)
    history = [*QUESTION, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
    assert ask(client, history, tools=tools("weather")).choices


def test_models_without_a_solver_have_no_iterations(client):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, extra_body={"num_iter": 0})
    assert error.value.param == "num_iter"


@pytest.mark.slow
def test_number_of_solver_iterations():
    with Live.embedded(slots=4, capacity=CAPACITY) as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none")
        told = ask(client, model="gka").choices[0].message.content
        assert told == "Remo has 20."
        solved = [
            ask(client, model="gka", extra_body={"num_iter": n}, logprobs=True).choices[0].logprobs
            for n in (0, 1, 30)
        ]
    assert solved[0] != solved[1] != solved[2]


def test_errors_are_typed(client, live):
    with pytest.raises(openai.NotFoundError) as error:
        ask(client, model="nobody")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, temperature=5)
    assert error.value.param == "temperature" and error.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, [{"role": "user", "content": "a" * 2000}])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.02), max_tokens=180, extra_body={"ignore_eos": True})
    with pytest.raises(openai.APIConnectionError):
        ask(openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="x", max_retries=0))
    assert ask(client).choices


def test_a_stream_that_is_closed_frees_its_slot(client, live):
    for _ in range(8):
        stream = ask(client, stream=True, max_tokens=180, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    assert ask(client).choices
    live.rests()


def test_models_and_ids_of_requests(client):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == "m"
    raw = client.chat.completions.with_raw_response.create(
        model="m", messages=QUESTION, max_tokens=1, extra_headers={"x-request-id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine" and raw.parse()._request_id == "mine"


def test_a_key():
    with Live.random("M2", "*", slots=4, capacity=CAPACITY, api_keys=("right",)) as live:
        with pytest.raises(openai.AuthenticationError):
            ask(openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0))
        assert ask(openai.OpenAI(base_url=f"{live.url}/v1", api_key="right")).choices


# lm-eval

# lm-eval scores a blank at the end of a context with the continuation.
CONTEXTS = ["Remo has 20. Gove has 47.", "the old cat sees", "Q: Remo?\nA: Remo"]
CONTINUATIONS = [" 12+7=19.", " a red bird", " has 20."]
PAIRS = [[a, b] for a in CONTEXTS for b in CONTINUATIONS]


@pytest.fixture(scope="module")
def direct(live):
    """Log-probability and greediness of each pair, by `hmf_jax.score`."""
    encode = [[live.tokenizer(text)["input_ids"] for text in pair] for pair in PAIRS]
    ids = np.zeros((len(PAIRS), max(len(a) + len(b) for a, b in encode)), np.int32)
    for row, (head, tail) in enumerate(
        encode
    ):  # what comes after the end changes nothing before it
        ids[row, : len(head) + len(tail)] = head + tail
    values = np.asarray(score(live.model, jnp.asarray(ids)))
    best = np.asarray(live.model(jnp.asarray(ids))[0].argmax(-1))
    told = []
    for row, (head, tail) in enumerate(encode):
        place = slice(len(head) - 1, len(head) + len(tail) - 1)
        told.append((float(values[row, place].sum()), bool((best[row, place] == tail).all())))
    return told


@pytest.mark.slow
def test_the_request_of_lm_eval(live, client, direct):
    tokenizer = live.tokenizer
    ids = [tokenizer(a + b)["input_ids"] for a, b in PAIRS]
    answer = client.completions.create(
        model="m", prompt=ids, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    for choice, (a, _), (logprob, greedy) in zip(answer.choices, PAIRS, direct, strict=True):
        values = choice.logprobs.token_logprobs[len(a) : -1]
        tops = choice.logprobs.top_logprobs[len(a) : -1]
        assert sum(values) == pytest.approx(logprob, abs=1e-4)
        is_greedy = all(v == max(t.values()) for v, t in zip(values, tops, strict=True))
        assert is_greedy == greedy


@pytest.mark.slow
def test_lm_eval(live, client, direct):
    python = os.environ.get("LM_EVAL_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import lm_eval"], capture_output=True).returncode:
        pytest.skip("no lm-eval: set LM_EVAL_PYTHON to a Python with `lm_eval[api]`")
    script = Path(__file__).with_name("lm_eval_client.py")
    asked = {"pairs": PAIRS, "prompts": CONTEXTS}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, script, live.url, "m"], input=json.dumps(asked), text=True,
        capture_output=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    for name in ("loglikelihood_one", "loglikelihood_many"):
        for (value, greedy), wanted in zip(told[name], direct, strict=True):
            assert value == pytest.approx(wanted[0], abs=1e-4) and greedy == wanted[1]
    for name in ("generate_one", "generate_many"):
        answers = client.completions.create(
            model="m", prompt=CONTEXTS, temperature=0, max_tokens=8, stop=["\n\n"]
        )
        assert told[name] == [choice.text for choice in answers.choices]
    assert all(value < 0 for value in told["rolling"])
    chats = [ask(client, [{"role": "user", "content": text}], max_tokens=8) for text in CONTEXTS]
    assert told["chat"] == [chat.choices[0].message.content for chat in chats]
