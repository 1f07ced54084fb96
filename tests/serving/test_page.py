"""The chat page: nothing in it comes from elsewhere, and whatever a model says stays text."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

pytest.importorskip("starlette")  # the extra `serve`
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import hmf_jax
from hmf_jax import embedded
from hmf_jax.serving import running
from hmf_jax.serving.page import page, page_response

from .chromium import PROGRAM, Chromium

HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> [a link](javascript:alert(3))\n"
    "```html\n<b onclick=alert(4)>bold</b>\n```\n<style>*{display:none}</style> and &amp; the end"
)


def test_policy_allows_only_what_the_page_has():
    body, headers = page()
    html = body.decode()
    rules = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        (code,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == "'none'" and rules["trusted-types"] == "'none'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert (
        dict(page_response().headers).items()
        >= {name.lower(): value for name, value in headers.items()}.items()
    )


class Tags(HTMLParser):
    """The attributes of a document's tags, and which field each label is for."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.inside: set[str] = set()  # ids of fields inside a label

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        self.tags.append((tag, values))
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)
        if "label" in self.open:
            self.inside.add(values.get("id", ""))

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass


def test_page_is_one_file_without_requests_or_parsed_html():
    html = page()[0].decode()
    assert re.findall(r"https?://[^'\"\s]+", html) == ["http://www.w3.org/2000/svg"]  # a name
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                 "localStorage", "DOMParser", "new Function", "@import", "url("):  # fmt: skip
        assert word not in html, word
    tags = Tags()
    tags.feed(html)
    labels = {values.get("for") for tag, values in tags.tags if tag == "label"} | tags.inside
    for tag, values in tags.tags:
        assert not [name for name in values if name.startswith("on") or name == "style"], values
        assert not values.keys() & {"src", "action"} and not (tag == "script" and values)
        if tag in ("input", "select", "textarea"):
            assert values["id"] in labels, f"{values['id']} has no label"
    assert 'role="log"' in html and 'role="status"' in html


# ---- in a browser ----------------------------------------------------------------------------


class Scripted:
    """A server whose answers are known; it keeps what it was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.gone = 0  # streams that the client left
        self.refusals: list[tuple[int, dict, dict]] = []  # given before any answer
        routes = [
            Route("/", lambda request: page_response()),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        app = Starlette(routes=routes)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))

    def models(self, request: Request) -> Response:
        if self.refusals and self.refusals[0][0] == 401:
            if request.headers.get("authorization") != "Bearer secret":
                return self.refuse(*self.refusals[0])
        names = ("tiny", "fast")
        return JSONResponse({"data": [{"id": name, "max_model_len": 4096} for name in names]})

    def refuse(self, status: int, error: dict, headers: dict) -> Response:
        return JSONResponse({"error": error}, status, headers)

    async def chat(self, request: Request) -> Response:
        self.keys.append(request.headers.get("authorization"))
        if self.refusals and self.refusals[0][0] != 401:
            return self.refuse(*self.refusals.pop(0))
        self.asked.append(await request.json())
        return StreamingResponse(self.stream(request), media_type="text/event-stream")

    async def stream(self, request: Request):
        question = self.asked[-1]["messages"][-1]["content"]
        turn, made = len(self.asked[-1]["messages"]), 0
        usage: dict[str, Any] = {"prompt_tokens": 100 * turn, "completion_tokens": 0}
        usage["prompt_tokens_details"] = {"cached_tokens": 100 * (turn - 1) // 2}
        deltas = [{"role": "assistant", "content": ""}]
        if "think" in question:
            words = ("Let me ", "see: ", "<i>hm</i>")
            deltas += [{"reasoning_content": word, "reasoning": word} for word in words]
        if "count" in question:
            deltas += [{"content": f"{n} "} for n in range(10_000)]
        else:
            deltas += [{"content": word} for word in re.findall(r".{1,9}", HOSTILE, re.DOTALL)]
        yield ": ping\n\n"
        try:
            for delta in deltas:
                made += 1
                usage["completion_tokens"] = made
                yield self.event(delta, usage)
                await asyncio.sleep(0.004)
                if "break" in question and made == 4:
                    return
                if "fail" in question and made == 4:
                    yield 'data: {"error": {"message": "<b>logits</b> are NaN"}}\n\n'
                    return
        except asyncio.CancelledError:
            self.gone += 1
            raise
        yield self.event({}, usage, "stop")
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

    def event(self, delta: dict, usage: dict, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return f"data: {json.dumps({'choices': [choice], 'usage': usage})}\n\n"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if PROGRAM is None:
        pytest.skip("no chromium on this machine")
    chromium = Chromium(tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()


@pytest.fixture
def service() -> Iterator[Scripted]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        service = Scripted(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        thread = threading.Thread(target=service.server.run, args=([listener],), daemon=True)
        thread.start()
        yield service
        service.server.should_exit = service.server.force_exit = True
        thread.join(10)


IDLE = "document.getElementById('send').textContent === 'Send'"


def ask(browser: Chromium, text: str, wait: bool = True) -> None:
    browser.evaluate("at('text').focus()")
    browser.type(text)
    browser.press("Enter")
    if wait:
        browser.until(IDLE)


def last(browser: Chromium, name: str) -> str:
    return browser.evaluate(f"[...document.querySelectorAll('.{name}')].at(-1)?.textContent ?? ''")


@pytest.fixture
def chat(browser: Chromium, service: Scripted) -> Chromium:
    browser.events.clear()
    browser.window(1100, 760)
    browser.open(service.url)
    browser.evaluate("sessionStorage.clear()")
    browser.until("!at('model').disabled")
    return browser


def quiet(browser: Chromium) -> None:
    """No dialog was opened, no script has failed, nothing was asked of another server."""
    seen = [method for method, _ in browser.events]
    assert "Page.javascriptDialogOpening" not in seen and "Runtime.exceptionThrown" not in seen
    for method, params in browser.events:
        if method == "Network.requestWillBeSent":
            assert re.match(r"http://127\.0\.0\.1:|data:", params["request"]["url"]), params
        assert method != "Log.entryAdded" or "Security Policy" not in params["entry"]["text"]


@pytest.mark.slow
def test_what_a_model_says_stays_text(chat: Chromium, service: Scripted):
    ask(chat, "hello <script>alert(0)</script>")
    reply = "[...document.querySelectorAll('.reply .words')].at(-1)"
    shown = chat.evaluate(f"[...{reply}.children].map((node) => [node.tagName, node.textContent])")
    before, code, after = HOSTILE.split("```")
    assert shown == [
        ["SPAN", before.strip("\n")],
        ["PRE", code.removeprefix("html\n").strip("\n")],
        ["SPAN", after.removeprefix("\n")],
    ]
    assert chat.evaluate(f"{reply}.querySelectorAll('script, img, a, b, style').length") == 0
    assert chat.evaluate("document.querySelectorAll('script').length") == 1
    assert last(chat, "user .words") == "hello <script>alert(0)</script>"
    quiet(chat)
    with pytest.raises(RuntimeError, match="TrustedHTML"):  # the browser would not have it either
        chat.evaluate("document.body.innerHTML = '<b>x</b>'")


@pytest.mark.slow
def test_turns_thinking_and_settings(chat: Chromium, service: Scripted):
    chat.evaluate("at('system').value = 'Be brief.'")
    ask(chat, "please think")
    assert last(chat, "thought") == "Let me see: <i>hm</i>"
    assert last(chat, "reply summary").startswith("Thought for")
    assert not chat.evaluate("document.querySelector('details').open")
    first = service.asked[0]
    assert [m["role"] for m in first["messages"]] == ["system", "user"] and first["stream"]
    assert first["model"] == "tiny" and not first.keys() & {"num_iter", "seed", "temperature"}
    assert last(chat, "prompt") == "200 prompt tokens, 50 from the cache"

    chat.evaluate("at('num_iter').value = 7; at('num_iter').dispatchEvent(new Event('input'))")
    chat.evaluate("at('seed').value = 5; at('temperature').value = 0.5; at('model').value = 'fast'")
    chat.evaluate("at('thinking').value = 'off'")
    ask(chat, "again")
    second = service.asked[1]
    assert second["num_iter"] == 7 and second["seed"] == 5 and second["temperature"] == 0.5
    assert second["model"] == "fast"
    assert second["chat_template_kwargs"] == {"enable_thinking": False}
    assert second["messages"][2] == {
        "role": "assistant", "content": HOSTILE, "reasoning_content": "Let me see: <i>hm</i>",
    }  # fmt: skip
    assert last(chat, "prompt") == "400 prompt tokens, 150 from the cache"
    assert re.fullmatch(r"first token \d+ ms", last(chat, "ttft"))
    assert re.fullmatch(r"\d+ tokens, [\d.]+ tokens/s", last(chat, "rate"))
    assert last(chat, "solver") == "num_iter 7"
    rows = "[...document.querySelectorAll('#rates tbody td:first-child')].map((x) => x.textContent)"
    assert chat.evaluate(rows) == ["model's own", "7"]

    chat.evaluate("[...document.querySelectorAll('.tools button')].at(-1).click()")  # Try again
    chat.until(f"{IDLE} && document.querySelectorAll('.reply').length === 2")
    assert service.asked[2]["messages"] == second["messages"]
    chat.evaluate("at('new').click()")
    chat.until("!document.querySelector('article')")
    ask(chat, "new")
    assert [m["role"] for m in service.asked[3]["messages"]] == ["system", "user"]
    quiet(chat)


@pytest.mark.slow
def test_stop_and_keys(chat: Chromium, service: Scripted):
    chat.evaluate("at('text').focus()")
    chat.type("count")
    chat.press("Enter", shift=True)
    chat.type("please")
    chat.press("Enter")
    assert chat.until("at('send').textContent === 'Stop'")
    chat.until("document.querySelector('.reply .words').textContent.includes('20 ')")
    chat.press("Escape")
    chat.until(IDLE)
    said = last(chat, "reply .words")
    assert "stopped" in last(chat, "facts") and service.asked[0]["messages"][0]["content"] == (
        "count\nplease"
    )
    end = time.monotonic() + 5
    while not service.gone and time.monotonic() < end:
        time.sleep(0.02)
    assert service.gone == 1
    time.sleep(0.1)
    assert last(chat, "reply .words") == said
    ask(chat, "on")
    assert service.asked[1]["messages"][1] == {"role": "assistant", "content": said}
    quiet(chat)


@pytest.mark.slow
def test_errors_in_words(chat: Chromium, service: Scripted):
    service.refusals = [(429, {"message": "full"}, {"Retry-After": "1"})]
    ask(chat, "hello", wait=False)
    assert "queue is full. Trying again in 1 s" in chat.until(
        "document.querySelector('.bad')?.textContent"
    )
    chat.until(IDLE)
    assert last(chat, "bad") == "" and len(service.asked) == 1

    service.refusals = [
        (400, {"message": "<b>too long</b>", "code": "context_length_exceeded"}, {})
    ]
    ask(chat, "hello")
    assert "no longer fits" in last(chat, "bad") and "<b>too long</b>" in last(chat, "bad")
    for text, words in (("break", "connection was lost"), ("fail", "<b>logits</b> are NaN")):
        ask(chat, text)
        assert words in last(chat, "bad") and last(chat, "reply .words") == HOSTILE[:27]
    chat.evaluate("document.querySelector('.reply:last-child .bad button').click()")
    chat.until(IDLE)
    assert "NaN" in last(chat, "bad") and len(service.asked) == 4

    service.server.should_exit = service.server.force_exit = True
    chat.until("fetch('v1/models').then(() => false, () => true)")
    ask(chat, "anybody?")
    assert "cannot be reached" in last(chat, "bad")
    quiet(chat)


@pytest.mark.slow
def test_key_is_asked_for_and_kept_in_the_tab(browser: Chromium, service: Scripted):
    service.refusals = [(401, {"message": "no key"}, {})]
    browser.window(390, 760)
    browser.open(service.url)
    browser.until("document.activeElement.id === 'key' && at('model').disabled")
    browser.type("secret")
    browser.evaluate("at('key').dispatchEvent(new Event('change'))")
    browser.until("!at('model').disabled")
    browser.evaluate("at('toggle').click()")
    ask(browser, "hello")
    assert service.keys == ["Bearer secret"]
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")  # a phone
    assert browser.evaluate("sessionStorage.getItem('api-key')") == "secret"
    assert (
        browser.evaluate("localStorage.length") == 0 and browser.evaluate("document.cookie") == ""
    )


@pytest.mark.slow
def test_page_of_a_server_with_a_model(browser: Chromium):
    model = hmf_jax.from_pretrained(embedded.directory("gka"), dtype="float32", progress=False)
    aliases = {"quick": {"num_iter": 1}}
    with running(model, port=0, slots=2, prefix_cache="fast", aliases=aliases) as server:
        browser.window(1100, 760)
        browser.open(server.url)
        browser.until("!at('model').disabled")
        names = "[...at('model').options].map((option) => option.value)"
        assert browser.evaluate(names) == ["gka", "quick"]
        facts = "Rada has 71. Ruga has 55. Buse has 84. " + "the moon takes a red bird. " * 20
        browser.evaluate(f"at('system').value = {json.dumps(facts)}; at('temperature').value = 0")
        for name, number in (("Rada", 71), ("Buse", 84)):
            ask(browser, f"{name}?")
            assert last(browser, "reply .words") == f"{name} has {number}."
        assert int(re.findall(r", (\d+) from the cache", last(browser, "prompt"))[0]) > len(facts)
        browser.evaluate("at('own').checked = false; at('num_iter').max = 2000")
        browser.evaluate("at('num_iter').value = 1001")  # more than a server takes
        ask(browser, "Ruga?")
        assert "num_iter" in last(browser, "bad")
        quiet(browser)
