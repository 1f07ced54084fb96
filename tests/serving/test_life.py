"""The life of requests: whoever goes away, waits too long or comes too late, rows get free."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from hmf_jax.serving import service, stream
from hmf_jax.serving.reading import Reader
from tests.serving.fake import error, site, wait

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def fake():
    with site(shutdown_timeout=0.2) as site_:
        site_.says("ok")
        yield site_


def endless(fake, turn=0.02, pace=1):
    """Answers that take their time: seconds of a turn, and tokens in it."""
    letter = fake.tokenizer.encode("a")
    fake.engine.script = lambda request: letter * 10_000
    fake.engine.turn, fake.engine.pace = turn, pace


def at_rest(fake):
    """Nothing of any request is left."""
    service = fake.running.service
    wait(lambda: not fake.engine.busy and not service._rows and not service.replies)
    assert service.waiting == service.waiting_tokens == service.running == 0
    assert not service._numbers and not fake.engine._requests


def hang_up(fake, *, until=lambda: True, **body):
    """Asks for an answer and closes the connection without having it."""
    with httpx.Client(base_url=fake.url, timeout=20) as client:
        if body.get("stream"):
            with client.stream("POST", "/v1/completions", json={"prompt": "a", **body}) as response:
                next(response.iter_bytes())
        else:
            with contextlib.suppress(httpx.ReadTimeout):
                client.post("/v1/completions", json={"prompt": "a", **body}, timeout=0.15)


@pytest.mark.parametrize("streams", [True, False])
def test_clients_that_go_away_free_their_rows(fake, streams):
    endless(fake)
    hang_up(fake, stream=streams, max_tokens=250)
    at_rest(fake)
    metrics = fake.http.get("/metrics").text
    assert 'finished_reason="abort",model_name="m"} 1.0' in metrics


def test_those_that_wait_can_go_away_too(fake):
    endless(fake)
    with background(fake, 4):
        wait(lambda: fake.running.service.running == 4)
        hang_up(fake, max_tokens=9)
        wait(lambda: fake.running.service.waiting == 0)
        assert fake.running.service.running == 4
    at_rest(fake)


@contextlib.contextmanager
def background(fake, count, **body):
    """So many requests that run meanwhile; then they are aborted."""
    answers = []

    def ask():
        answers.append(fake.post("/v1/completions", prompt="a", max_tokens=250, **body))

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    wait(lambda: len(fake.running.service.replies) >= count)
    try:
        yield answers
    finally:
        fake.post("/abort_request", abort_all=True)
        for thread in threads:
            thread.join()


def test_a_full_queue_is_429_and_says_when_to_come_back():
    with site(max_queue=2) as fake:
        endless(fake)
        with background(fake, 6) as answers:
            wait(lambda: fake.running.service.waiting == 2)
            response = fake.post("/v1/completions", prompt="a")
            told = error(response, 429)
            assert told["code"] == "queue_full" and told["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) >= 1
            # What is wrong is told as that.
            assert fake.error("/v1/completions", 400, prompt=3)["param"] == "prompt"
            with fake.http.stream(
                "POST", "/v1/completions", json={"prompt": "a", "stream": True}
            ) as streamed:
                assert streamed.status_code == 429
            metrics = fake.http.get("/metrics").text
            assert 'vllm:num_requests_waiting{engine="0",model_name="m"} 2.0' in metrics
            assert 'vllm:num_requests_running{engine="0",model_name="m"} 4.0' in metrics
        assert [answer.status_code for answer in answers] == [499] * 6
        at_rest(fake)


def test_a_queue_can_be_full_of_tokens():
    with site(max_queued_tokens=100) as fake:
        endless(fake)
        with background(fake, 5):
            wait(lambda: fake.running.service.waiting == 1)
            assert fake.error("/v1/completions", 429, prompt="x" * 120)["code"] == "queue_full"
        at_rest(fake)
        fake.says("ok")
        assert fake.text("x" * 120)  # whatever is alone may come


def test_waiting_has_an_end():
    with site(queue_timeout=0.1) as fake:
        endless(fake)
        with background(fake, 4):
            wait(lambda: fake.running.service.running == 4)
            response = fake.post("/v1/completions", prompt="a")
            assert error(response, 503)["code"] == "queue_timeout"
            assert "retry-after" in response.headers
        at_rest(fake)


def test_so_have_requests():
    with site(request_timeout=0.1) as fake:
        endless(fake)
        response = fake.post("/v1/completions", prompt="a", max_tokens=250)
        assert error(response, 503)["code"] == "request_timeout"
        lines = fake.post("/v1/completions", prompt="a", max_tokens=250, stream=True).text
        assert "[DONE]" not in lines  # a stream ends with the error instead
        last = json.loads(lines.strip().split("\n\n")[-1].removeprefix("data: "))
        assert last["error"]["code"] == "request_timeout"
        at_rest(fake)


def test_abort_by_name(fake):
    endless(fake)
    with background(fake, 1, request_id="mine") as answers:
        assert fake.post("/abort_request", request_id="other").json() == {"aborted": 0}
        assert fake.post("/abort_request", request_id="mine").json() == {"aborted": 1}
        wait(lambda: bool(answers))
        error(answers[0], 499)
    fake.error("/abort_request", 400)
    at_rest(fake)


def test_shutting_down_lets_requests_end():
    with site(shutdown_timeout=5.0) as fake:
        fake.says("one two three four five six seven eight")
        fake.engine.turn = 0.01
        answers = []

        def ask():
            answers.append(fake.text(max_tokens=200)["choices"][0]["text"])

        thread = threading.Thread(target=ask)
        thread.start()
        wait(lambda: fake.running.service.running == 1)
        ending = threading.Thread(target=fake.running.stop)
        ending.start()
        wait(lambda: fake.running.service.state == "draining")
        assert fake.http.get("/ready").status_code == 503
        assert fake.http.get("/health").status_code == 200
        response = fake.post("/v1/completions", prompt="a")
        assert error(response, 503)["code"] == "draining" and "retry-after" in response.headers
        thread.join()
        ending.join()
        assert answers == ["one two three four five six seven eight"]


def test_shutting_down_does_not_take_forever(fake):
    endless(fake)
    answers = []
    body = {"prompt": "a", "max_tokens": 250, "stream": True}
    thread = threading.Thread(
        target=lambda: answers.append(fake.post("/v1/completions", **body).text)
    )
    thread.start()
    wait(lambda: fake.running.service.running == 1)
    fake.running.stop()
    thread.join()
    assert '"code":"draining"' in answers[0] and "[DONE]" not in answers[0]


def test_a_row_that_fails_is_a_fault_of_that_request_only(fake):
    fake.engine.broken = {0}
    response = fake.post("/v1/completions", prompt="a")
    told = error(response, 500)
    assert told["code"] == "engine_error" and "NaN" in told["message"]
    assert response.headers["x-should-retry"] == "false"
    assert fake.text()["choices"][0]["text"] == "ok"
    metrics = fake.http.get("/metrics").text
    assert 'hmf:nonfinite_total{engine="0",model_name="m"} 1.0' in metrics
    at_rest(fake)


def test_a_grammar_that_cannot_be_kept_to_is_a_fault_of_that_request(fake):
    def breaks(request):
        request.constraint.error = "too many lexer states"
        return [fake.tokenizer.eos_token_id]

    fake.engine.script = breaks
    body = {"prompt": "a", "structured_outputs": {"choice": ["yes"]}}
    response = fake.post("/v1/completions", **body)
    assert "too many lexer states" in error(response, 500)["message"]
    assert response.headers["x-should-retry"] == "false"
    fake.says("yes")
    assert fake.text(**body)["choices"][0]["text"] == "yes"
    at_rest(fake)


def test_a_tokenizer_that_raises_is_a_fault_of_that_request_only(fake, monkeypatch):
    from hmf_jax.serving.choice import Choice

    push = Choice.push

    def raising(self, event):
        if self.ask.request_id == "bad":
            raise RuntimeError("cannot decode")
        push(self, event)

    monkeypatch.setattr(Choice, "push", raising)
    response = fake.post("/v1/completions", prompt="a", request_id="bad", n=2)
    assert "log" in error(response, 500)["message"]
    assert fake.text()["choices"][0]["text"] == "ok"
    at_rest(fake)


def test_an_engine_that_starts_over_goes_on(fake):
    endless(fake)
    with background(fake, 2) as answers:
        fake.engine.fault = MemoryError("no memory")
        wait(lambda: len(answers) == 2)
        for answer in answers:
            assert error(answer, 500)["code"] == "engine_error"
            assert "x-should-retry" not in answer.headers  # it may well work the next time
    fake.says("ok")
    assert fake.text()["choices"][0]["text"] == "ok"
    assert 'hmf:nonfinite_total{engine="0",model_name="m"} 0.0' in fake.http.get("/metrics").text
    at_rest(fake)


def test_an_engine_that_dies_ends_everything(fake):
    endless(fake)
    died = []
    fake.running.service._on_end = lambda: died.append(True)
    with background(fake, 5) as answers:
        fake.engine.fault = RuntimeError("CUDA error")
        wait(lambda: len(answers) == 5)
        assert {error(answer, 503)["code"] for answer in answers} == {"engine_dead"}
        assert died == [True]
        assert fake.error("/v1/completions", 503, prompt="a")["code"] == "engine_dead"
        assert fake.http.get("/health").status_code == 503
        assert fake.http.get("/ready").status_code == 503


def test_a_silent_engine_is_not_healthy(fake, monkeypatch):
    assert fake.http.get("/health").status_code == 200
    monkeypatch.setattr(service, "SILENCE", -1.0)
    assert fake.http.get("/health").status_code == 503


def test_pings_come_while_there_is_nothing_else(fake, monkeypatch):
    monkeypatch.setattr(stream, "PING", 0.02)
    endless(fake)
    with (
        background(fake, 4),
        fake.http.stream(
            "POST", "/v1/completions", json={"prompt": "a", "stream": True}
        ) as response,
    ):
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        assert next(response.iter_text()).startswith(": ping\n\n")
    at_rest(fake)


def test_who_does_not_read_is_given_up(monkeypatch):
    monkeypatch.setattr(stream, "PATIENCE", 0.02)
    closed, sent = [], []

    async def batches():
        try:
            while True:
                yield [{"text": "a"}]
        finally:
            closed.append(True)

    async def receive():
        await asyncio.sleep(60)
        return {}

    async def send(message):
        sent.append(message)
        if len(sent) == 3:
            await asyncio.sleep(60)

    asyncio.run(stream.EventStream(batches())({"type": "http"}, receive, send))
    assert closed == [True] and len(sent) == 3


def test_bodies_that_do_not_come(fake, monkeypatch):
    from hmf_jax.serving import reading

    monkeypatch.setattr(reading, "SECONDS", 0.1)

    def slow():
        yield b'{"prompt": '
        time.sleep(0.3)

    headers = {"content-type": "application/json"}
    try:
        response = fake.http.post("/v1/completions", content=slow(), headers=headers)
        assert error(response, 408)["type"] == "timeout_error"
    except httpx.WriteError:
        pass  # the server has closed the connection after its answer


def test_many_requests_at_once_keep_nobody_waiting(fake):
    """What is malformed is answered within 100 ms, and so is /health, while the server is busy."""
    endless(fake, turn=0.005)
    seconds = {"/health": [], "/v1/completions": []}

    async def main():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=fake.url, timeout=20, limits=limits) as client:

            async def busy():
                response = await client.post("/v1/completions", json={"prompt": "a " * 100})
                assert response.status_code in (200, 429)

            async def look(path, status, **body):
                began = time.perf_counter()
                response = await client.request("POST" if body else "GET", path, **body)
                seconds[path].append(time.perf_counter() - began)
                assert response.status_code == status

            tasks = [asyncio.create_task(busy()) for _ in range(60)]
            await asyncio.sleep(0.05)
            for i in range(25):
                await look("/health", 200)
                await look("/v1/completions", 400, json={"prompt": "a", "temperature": 3 + i})
            await asyncio.gather(*tasks)

    asyncio.run(main())
    for path, found in seconds.items():  # not the slowest: others may have this machine, too
        assert sorted(found)[len(found) // 2] < 0.1, (path, found)


def test_reading_a_request_lets_others_come_between():
    async def main():
        reader, rounds = Reader(1000), 0
        headers = [(b"content-type", b"application/json")]

        async def receive():
            return {"type": "http.request", "body": b'{"a": 1}'}

        async def count():
            nonlocal rounds
            while True:
                rounds += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        requests = (Request({"type": "http", "headers": headers}, receive) for _ in range(50))
        fields = await asyncio.gather(*(reader.read(request, dict) for request in requests))
        counting.cancel()
        assert fields == [{"a": 1}] * 50 and rounds >= 50

    asyncio.run(main())


def test_keys(monkeypatch):
    with site(api_keys=("one", "two"), cors_origins=("https://a.example",)) as fake:
        fake.says("ok")
        app: Any = fake.running._server.config.app
        paths = [(route.path, route.methods) for route in app.routes]
        for path, methods in paths:
            open_ = path in ("/", "/health", "/ready", "/version")
            for method in methods - {"HEAD"}:
                response = fake.http.request(method, path.replace("{name:path}", "m"))
                assert (response.status_code == 401) is not open_, path
                if not open_:
                    told = error(response, 401)
                    assert told["type"] == "authentication_error"
                    assert told["code"] == "invalid_api_key"
        assert error(fake.http.get("/nowhere"), 401)
        for key, status in (("one", 200), ("two", 200), ("three", 401), ("on", 401), ("é", 401)):
            headers = [(b"authorization", f"Bearer {key}".encode())]
            assert fake.http.get("/v1/models", headers=headers).status_code == status
        assert "two" not in repr(fake.what.settings)
        preflight = fake.http.options(
            "/v1/models",
            headers={
                "origin": "https://a.example",
                "access-control-request-method": "GET",
                "access-control-request-headers": "authorization",
            },
        )
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        other = fake.http.get("/health", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_names_of_requests(fake):
    assert len(fake.http.get("/health").headers["x-request-id"]) == 32
    headers = {"x-request-id": "my-7"}
    response = fake.http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    assert response.headers["x-request-id"] == "my-7"
    assert response.json()["id"] == "cmpl-my-7"
    assert fake.text(request_id="other")["id"] == "cmpl-other"


def test_the_cache_can_be_looked_at_and_emptied(fake):
    (told,) = fake.http.get("/prefix_cache").json()["engines"]
    assert told["entries"] == {"device": 3} and told["prefix_bytes"] == {"device_kv": 7}
    assert fake.http.post("/reset_prefix_cache").json() == {"dropped": 3}


def test_numbers(fake):
    fake.says("one two three four")
    fake.text("abcd", max_tokens=100)
    fake.text("abcd", max_tokens=1)
    text = fake.http.get("/metrics").text
    count = len(fake.tokenizer.encode("one two three four")) + 1
    prompt = len(fake.tokenizer.encode("abcd"))
    label = 'engine="0",model_name="m"'
    for line in (
        f"vllm:prompt_tokens_total{{{label}}} {2.0 * prompt}",
        f"vllm:generation_tokens_total{{{label}}} {count + 1.0}",
        f"vllm:prefix_cache_queries_total{{{label}}} {2.0 * prompt}",
        f"vllm:prefix_cache_hits_total{{{label}}} {2.0 * (prompt // 2)}",
        'vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 1.0',
        'vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 1.0',
        f"vllm:time_to_first_token_seconds_count{{{label}}} 2.0",
        f"vllm:e2e_request_latency_seconds_count{{{label}}} 2.0",
        f"vllm:request_prompt_tokens_sum{{{label}}} {2.0 * prompt}",
        f"vllm:num_requests_running{{{label}}} 0.0",
        f"vllm:request_params_n_sum{{{label}}} 2.0",
        f"vllm:request_params_max_tokens_sum{{{label}}} 101.0",
        'hmf:num_iter_requests_total{engine="0",model_name="m",num_iter="30"} 2.0',
        f"vllm:kv_cache_usage_perc{{{label}}} 0.25",
        f"vllm:num_preemptions_total{{{label}}} 5.0",
        f"hmf:compiles_total{{{label}}} 0.0",
        f"hmf:host_gap_seconds_sum{{{label}}} 0.25",
        'hmf:dispatch_seconds_sum{engine="0",kind="decode",model_name="m"} 0.5',
        'hmf:slots{engine="0",model_name="m",state="decode"} 1.0',
        'hmf:prefix_bytes{engine="0",kind="kv",model_name="m",place="device"} 7.0',
    ):
        assert line in text, line
