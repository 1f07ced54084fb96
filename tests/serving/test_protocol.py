"""What is wrong with a request is told by field, in one shape, and never as a fault of ours."""

from __future__ import annotations

import typing

import pytest

from hmf_jax.generation_config import GenerationDefaults
from hmf_jax.serving.asks import ask, prompts_of
from hmf_jax.serving.config import ServeConfig
from hmf_jax.serving.errors import ApiError
from hmf_jax.serving.protocol import Chat, Completion, read
from hmf_jax.serving.reading import parse
from tests.serving.fake import LENGTH, error, served, site

ROUTES = {"/v1/completions": Completion, "/v1/chat/completions": Chat}
GOOD = {
    "/v1/completions": {"prompt": "abc"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}
WRONG: list[typing.Any] = ["3", -5, 3.5, True, [], {}, [{}], [None], {"a": []}, 2**63, "\x00"]


@pytest.fixture(scope="module")
def fake():
    with site(aliases={"fast": {"num_iter": 10}}) as site_:
        site_.says("ok")
        yield site_


@pytest.fixture(scope="module")
def what():
    return served(ServeConfig(slots=4))


def refusal(kind, body, what):
    """The error that a body is refused with; None if it is not."""
    try:
        fields, _ = read(kind, body)
        prompts = prompts_of(fields, what) if isinstance(fields, Completion) else []
        ask(fields, prompts, what, request_id="x")
    except ApiError as e:
        return e
    return None


def fields_of():
    for path, kind in ROUTES.items():
        for name, field in kind.model_fields.items():
            yield path, field.alias or name


@pytest.mark.parametrize("path,name", list(fields_of()))
def test_wrong_values_of_every_field_are_400_and_name_it(path, name, what):
    """Generated from the models: whatever is put there is either fine or refused by name."""
    refused = 0
    for value in WRONG:
        found = refusal(ROUTES[path], {**GOOD[path], name: value}, what)
        if found is not None:
            assert found.status == 400 or found.code == "model_not_found", (value, found.message)
            assert name in found.message or name in (found.param or ""), (value, found.message)
            refused += 1
    assert refused >= (3 if name in ("logits_processors", "prompt_embeds") else 5)


@pytest.mark.parametrize("path", ROUTES)
def test_null_is_absent_everywhere(path, what, fake):
    names = [name for p, name in fields_of() if p == path and name not in GOOD[path]]
    answer = fake.post(path, **GOOD[path], **dict.fromkeys(names))
    assert answer.status_code == 200, answer.text


GRAMMAR = {"structured_outputs": {"choice": ["yes", "no"]}}
BAD: dict[str, tuple[dict, str]] = {
    "n above the slots": ({"n": 5}, "n"),
    "n and greedy": ({"n": 2, "temperature": 0}, "n"),
    "best_of": ({"best_of": 2}, "best_of"),
    "options without stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "beams": ({"use_beam_search": True}, "use_beam_search"),
    "suffix": ({"suffix": "x"}, "suffix"),
    "truncated at the right": ({"truncation_side": "right"}, "truncation_side"),
    "truncated to nothing": ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    "a word of several tokens": ({"bad_words": ["strange words"]}, "bad_words[0]"),
    "a bias of no token": ({"logit_bias": {"320": 1}}, "logit_bias"),
    "a stop of no token": ({"stop_token_ids": [320]}, "stop_token_ids"),
    "an allowed one that is none": ({"allowed_token_ids": [320]}, "allowed_token_ids"),
    "min over max": ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    "iterations": ({"vllm_xargs": {"num_iter": "9"}}, "vllm_xargs.num_iter"),
    "scores in a stream": ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    "nothing to do": ({"max_tokens": 0}, "max_tokens"),
    "no token of the prompt": ({"prompt": [1, 320]}, "prompt"),
    "an empty prompt": ({"prompt": ["a", ""]}, "prompt[1]"),
    "texts and tokens": ({"prompt": ["a", [1]]}, "prompt"),
    "too many prompts": ({"prompt": ["a"] * 513}, "prompt"),
    "17 stops": ({"stop": ["x"] * 17}, "stop"),
    "an empty stop": ({"stop": ""}, "stop"),
    "a grammar and a length": ({**GRAMMAR, "min_tokens": 9}, "min_tokens"),
    "a grammar and tokens": ({**GRAMMAR, "allowed_token_ids": [9]}, "allowed_token_ids"),
}


@pytest.mark.parametrize("case", BAD)
def test_contradictions_of_completions(case, fake):
    body, param = BAD[case]
    told = fake.error("/v1/completions", 400, **{"prompt": "abc", **body})
    assert told["param"] == param and told["type"] == "invalid_request_error"


def test_millions_of_tokens_are_refused_before_anything_is_looked_at(what):
    refused = refusal(Completion, {"prompt": [1] * (2**21 + 1)}, what)
    assert refused is not None and refused.param == "prompt" and "2,097,152" in refused.message


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "other"}}
BAD_CHATS: dict[str, tuple[dict, str]] = {
    "nobody says anything": ({"messages": []}, "messages"),
    "unknown role": ({"messages": [{"role": "x", "content": "a"}]}, "messages[0].role"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0]",
    ),
    "no tools": ({"tools": []}, "tools"),
    "a tool without name": ({"tools": [{"type": "function"}]}, "tools[0].function"),
    "which tool": ({"tool_choice": "required"}, "tool_choice"),
    "another tool": ({"tools": [TOOL], "tool_choice": NAMED}, "tool_choice"),
    "top without logprobs": ({"top_logprobs": 2}, "top_logprobs"),
    "21 of them": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "a template": ({"chat_template": "x"}, "chat_template"),
    "begins and goes on": (
        {"add_generation_prompt": True, "continue_final_message": True},
        "continue_final_message",
    ),
    "a switch that is none": (
        {"chat_template_kwargs": {"enable_thinking": "no"}},
        "chat_template_kwargs.enable_thinking",
    ),
    "a format": ({"response_format": {"type": "x"}}, "response_format.type"),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_contradictions_of_chats(case, fake):
    body, param = BAD_CHATS[case]
    body = {**GOOD["/v1/chat/completions"], **body}
    assert fake.error("/v1/chat/completions", 400, **body)["param"] == param


def test_prompts_that_are_too_long(fake):
    for body in ({"prompt": [1] * LENGTH}, {"prompt": [1] * 250, "max_tokens": 7}):
        told = fake.error("/v1/completions", 400, **body)
        assert told["code"] == "context_length_exceeded"
        assert "-" not in told["message"]  # no negative number of tokens
    assert fake.text([1] * (LENGTH - 1), ignore_eos=True)["usage"]["completion_tokens"] == 1
    told = fake.error(
        "/v1/chat/completions", 400, messages=[{"role": "user", "content": "x" * 300}]
    )
    assert told["code"] == "context_length_exceeded" and told["param"] == "messages"


def test_models_are_known_by_name(fake):
    told = fake.error("/v1/completions", 404, prompt="a", model="gpt-4")
    assert told["code"] == "model_not_found" and told["param"] == "model"
    assert fake.text(model="fast")["model"] == "fast"
    assert fake.engine.seen[-1].num_iter == 10
    fake.text(model="fast", num_iter=3)
    assert fake.engine.seen[-1].num_iter == 3
    fake.text(model="m")
    assert fake.engine.seen[-1].num_iter is None
    names = [card["id"] for card in fake.http.get("/v1/models").json()["data"]]
    assert names == ["m", "fast"]
    assert fake.http.get("/v1/models/fast").json()["parent"] == "m"
    error(fake.http.get("/v1/models/x"), 404)


BODIES: dict[str, tuple[bytes, int]] = {
    "cut off": (b'{"prompt": "a', 400),
    "nothing": (b"", 400),
    "no object": (b"[1]", 400),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', 400),
    "infinity": (b'{"prompt": "a", "temperature": 1e999}', 400),
    "no UTF-8": (b'{"prompt": "\xff"}', 400),
    "half of a pair": (b'{"prompt": "\\ud800"}', 400),
    "half of a pair as a key": (b'{"prompt": "a", "\\udc00": 1}', 400),
    "65 deep": (b'{"prompt": ' + b"[" * 64 + b"]" * 64 + b"}", 400),
    "very deep": (b'{"a":' * 10_000, 400),
    "a long number": (b'{"prompt": [' + b"9" * 5000 + b"]}", 400),
    "too long": (b'{"prompt": "' + b"x" * 70_000 + b'"}', 413),
}


@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_are_none(case):
    body, status = BODIES[case]
    with pytest.raises(ApiError) as e:
        if status == 413:
            raise ApiError(413, "")  # by the next test
        parse(body)
    assert e.value.status == status


def test_bodies_over_http():
    with site(max_body=65_536) as small:
        small.says("ok")

        def send(content, kind="application/json"):
            return small.http.post(
                "/v1/completions", content=content, headers={"content-type": kind}
            )

        for body, status in BODIES.values():
            told = error(send(body), status)
            assert told["type"] == "invalid_request_error"
        assert error(send(b"prompt=a", "application/x-www-form-urlencoded"), 415)
        assert send(b'{"prompt": "a"}', "application/json; charset=utf-8").status_code == 200
        pieces = (b"x" * 1000 for _ in range(1000))
        told = small.http.post(
            "/v1/completions", content=pieces, headers={"content-type": "application/json"}
        )
        error(told, 413)
        assert error(small.http.post("/v1/completions"), 400)["code"] == "invalid_json"
        error(small.http.get("/v1/completions"), 405)
        error(small.http.get("/nowhere"), 404)
        error(small.http.put("/nowhere"), 404)


def test_unknown_fields_are_counted_and_known_ones_without_effect_are_not(fake):
    fake.text(colour="red", user="me", metadata={}, store=True)
    metrics = fake.http.get("/metrics").text
    assert 'hmf:ignored_fields_total{field="colour"} 1.0' in metrics
    assert 'field="user"' not in metrics


def test_what_reaches_the_engine(fake):
    fake.text(
        [5, 6, 7],
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias={"3": -100, "4": 2.5},
        seed=-1,
        min_tokens=2,
        stop_token_ids=[8],
        priority=-7,
        cache_salt="me",
        logprobs=3,
    )
    got = fake.engine.seen[-1]
    assert list(got.prompt) == [5, 6, 7] and got.max_new_tokens == 9 and got.min_new_tokens == 2
    s = got.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p) == (0.5, 0.9, 0, 0.1)
    assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (0.5, -0.5, 1.5)
    assert dict(s.logit_bias) == {3: -100.0, 4: 2.5} and s.seed == 2**32 - 1
    assert list(got.eos_ids) == [fake.tokenizer.eos_token_id, 8]
    assert (got.priority, got.top_logprobs, got.prompt_logprobs) == (-7, 3, None)
    assert "me" in got.namespace
    fake.text(truncate_prompt_tokens=2, prompt=[5, 6, 7], ignore_eos=True, temperature=1e-6)
    got = fake.engine.seen[-1]
    assert list(got.prompt) == [6, 7] and got.eos_ids == [] and got.sampling.temperature == 0
    fake.text(allowed_token_ids=[5, 9])
    mask = fake.engine.seen[-1].constraint.mask()
    ends = [fake.tokenizer.eos_token_id]
    assert [t for t in range(320) if mask[t // 32] >> (t % 32) & 1] == sorted([5, 9, *ends])


def test_defaults_of_the_models_directory():
    defaults = GenerationDefaults({"do_sample": True, "temperature": 0.6, "top_k": 20})
    with site(defaults=defaults) as other:
        other.says("ok")
        other.text()
        got = other.engine.seen[-1].sampling
        assert (got.temperature, got.top_k) == (0.6, 20) and got.seed > 0
        other.text(temperature=1.5)
        assert other.engine.seen[-1].sampling.temperature == 1.5


def test_more_end_tokens_than_the_device_looks_for(fake):
    """The surplus ones are looked for in the answer."""
    many = list(range(100, 116))
    fake.engine.script = lambda request: [50, 115, 51, 52]
    (choice,) = fake.text(stop_token_ids=many, max_tokens=4)["choices"]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == 115
    assert len(fake.engine.seen[-1].eos_ids) == 16
    fake.says("ok")


def test_routes_about_tokens(fake):
    text = "é <|im_end|>"
    tokens = fake.post("/tokenize", prompt=text).json()
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == LENGTH
    assert fake.post("/detokenize", tokens=tokens["tokens"]).json() == {"prompt": text}
    messages = [{"role": "user", "content": "hi"}]
    chat = fake.post("/tokenize", messages=messages, return_token_strs=True).json()
    fake.chat("hi")
    assert chat["tokens"] == list(fake.engine.seen[-1].prompt) and len(chat["token_strs"]) > 3
    info = fake.http.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>" and "im_start" in info["chat_template"]
    assert fake.error("/detokenize", 400, tokens=[320])["param"] == "tokens"
    assert fake.error("/tokenize", 400, prompt=3)["param"] == "prompt"


def test_structured_output_becomes_a_constraint(fake):
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    fake.chat(response_format=wanted)
    mask = fake.engine.seen[-1].constraint.mask()
    allowed = {t for t in range(320) if mask[t // 32] >> (t % 32) & 1}
    (brace,) = fake.tokenizer.encode("{")
    assert brace in allowed and not allowed & set(fake.tokenizer.encode("abcxyz"))
    fake.text(n=2, structured_outputs={"choice": ["yes", "no"]})
    first, second = (request.constraint for request in fake.engine.seen[-2:])
    assert first is not second
    two = {"regex": "a", "choice": ["b"]}
    assert fake.error("/v1/completions", 400, prompt="a", structured_outputs=two)["param"]
    wrong = fake.error("/v1/completions", 400, prompt="a", structured_outputs={"regex": "("})
    assert "regex" in wrong["message"] and wrong["param"] == "structured_outputs"
    schema = {"type": "json_schema", "json_schema": {"strict": True, "schema": {"not": {}}}}
    wrong = fake.error("/v1/completions", 400, prompt="a", response_format=schema)
    assert wrong["param"] == "response_format"


def test_what_is_missing_is_named(monkeypatch):
    import hmf_jax.serving

    monkeypatch.setattr(hmf_jax.serving, "find_spec", lambda name: None if name == "uvicorn" else 1)
    with pytest.raises(ImportError, match=r'needs uvicorn: pip install "hmf-jax\[serve\]"'):
        hmf_jax.serving.running  # noqa: B018
