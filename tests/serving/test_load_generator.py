"""The load generator against servers that play a script: what it measures, what it objects to."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest

from hmf_jax.serving.load import CHAT, COMPLETIONS, Call, Client, Plan, Reply, run_load, workloads

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"


def chunk(**fields):
    told = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", **fields}
    return b"data: " + json.dumps(told).encode() + b"\n\n"


def piece(text, ids, reason=None, index=0):
    return chunk(choices=[dict(index=index, text=text, token_ids=ids, finish_reason=reason)])


USAGE = dict(prompt_tokens=3, completion_tokens=3, total_tokens=6)
WHOLE = [
    b": ping\n\n",
    piece("ab", [1, 2]),
    piece("c", [3]),
    piece("", [], "length"),
    chunk(choices=[], usage=USAGE),
    b"data: [DONE]\n\n",
]
ASKED = {"prompt": "x", "stream": True, "return_token_ids": True}
ASKED["stream_options"] = {"include_usage": True}


async def served(answer, use):
    """What `use(url)` returns, of a server that runs `answer(writer, head, body)` per request."""

    async def connected(reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                await answer(writer, head, await reader.readexactly(size))
                await writer.drain()
        except (EOFError, ConnectionError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        return await use(f"http://{host}:{port}")


def streamed(events, *, cut=None, pause=0.0):
    """Plays events, in chunks of `cut` bytes."""

    async def answer(writer, head, body):
        writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        data = [b"".join(events)] if cut else events
        for event in data:
            for i in range(0, len(event), cut or len(event)):
                part = event[i : i + (cut or len(event))]
                writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            await writer.drain()
            await asyncio.sleep(pause)
        writer.write(b"0\r\n\r\n")

    return answer


def reply_to(events, asked=ASKED, **options):
    async def use(url):
        client = Client(url)
        reply = await client.send(Call(asked, COMPLETIONS, **options))
        await client.close()
        return reply

    return asyncio.run(served(streamed(events), use))


@pytest.mark.parametrize("cut", [None, 1, 7])
def test_a_stream_however_it_is_cut(cut):
    async def use(url):
        return await run_load(url, Plan([[Call(ASKED, COMPLETIONS)]] * 3, connections=1))

    report = asyncio.run(served(streamed(WHOLE, cut=cut), use))
    assert report.problems == []
    for reply in report.all:
        (choice,) = reply.choices.values()
        assert (choice.text, choice.token_ids, choice.finish_reason) == ("abc", [1, 2, 3], "length")
        assert reply.ok and reply.counts == [2, 1]
    numbers = report.numbers({"ttft": 1e4})
    assert numbers["completed"] == 3 and numbers["total_output_tokens"] == 9
    assert numbers["total_input_tokens"] == 9 and numbers["goodput_fraction"] == 1
    assert "Time to first token" in report.table()


@pytest.mark.parametrize(
    "events, says",
    [
        (WHOLE[:-1], "without [DONE]"),
        ([*WHOLE[:3], *WHOLE[4:]], "has 0 ends"),
        ([*WHOLE[:4], WHOLE[3], *WHOLE[4:]], "goes on after its end"),
        ([*WHOLE[:4], *WHOLE[5:]], "usage None"),
        ([*WHOLE, WHOLE[1]], "after the end"),
        ([*WHOLE[:2], *WHOLE[3:]], "completion_tokens 3, but 2"),
        ([b"data: {]\n\n", *WHOLE], "not JSON"),
        ([b"data: {\"a\": NaN}\n\n", *WHOLE], "NaN is not JSON"),
        ([b"event: x\ndata: {}\n\n", *WHOLE], "not an event of one data line"),
        ([WHOLE[1].replace(b"cmpl-1", b"cmpl-2"), *WHOLE[2:]], "id 'cmpl-1' after 'cmpl-2'"),
        ([piece("ab", [1, 2], index=1), *WHOLE[1:]], "choices [0, 1]"),
        ([*WHOLE, b"data: "], "within an event"),
        ([b'data: {"error": "no"}\n\n'], "shape of an error"),
    ],
)  # fmt: skip
def test_what_breaks_the_protocol_is_told(events, says):
    assert any(says in problem for problem in reply_to(events).problems)


def test_an_error_in_a_stream_is_an_end():
    error = dict(message="it broke", type="server_error", param=None, code="engine_error")
    reply = reply_to([*WHOLE[:2], b"data: " + json.dumps({"error": error}).encode() + b"\n\n"])
    assert not reply.ok and reply.error == error and reply.problems == []


@pytest.mark.parametrize("fault, tokens", [("close_first", 2), ("close_middle", 3)])
def test_clients_that_hang_up(fault, tokens):
    reply = reply_to([*WHOLE[:3], *WHOLE], fault=fault)
    assert reply.left and sum(reply.counts) == tokens and reply.problems == []


def test_errors_and_retry_after():
    async def answer(writer, head, body):
        code, more = (b"429", b"") if b"/v1/completions" in head else (b"400", b"x: y\r\n")
        told = b'{"error": {"message": "m", "type": "t", "param": null, "code": null}}'
        writer.write(b"HTTP/1.1 %s X\r\n%scontent-length: %d\r\n\r\n" % (code, more, len(told)))
        writer.write(told)

    async def use(url):
        calls = [Call({}, COMPLETIONS), Call({}, CHAT), Call({}, CHAT, expect=(400,))]
        return await run_load(url, Plan([calls]))

    full, bad, right = asyncio.run(served(answer, use)).all
    assert full.problems == ["429 without Retry-After"]
    assert "status 400 instead of [200, 429, 503]" in bad.problems[0]
    assert right.problems == [] and right.status == 400


def test_a_full_server_is_asked_again():
    times = iter([429, 503, 429])
    ok = streamed(WHOLE)

    async def answer(writer, head, body):
        if code := next(times, None):
            told = b'{"error": {"message": "m", "type": "t", "param": null, "code": null}}'
            writer.write(b"HTTP/1.1 %d X\r\nretry-after: 0\r\n" % code)
            writer.write(b"content-length: %d\r\n\r\n%s" % (len(told), told))
        else:
            await ok(writer, head, body)

    async def use(url):
        users = [[Call(ASKED, COMPLETIONS), Call(ASKED, COMPLETIONS)]]
        return await run_load(url, Plan(users, retries=2))

    report = asyncio.run(served(answer, use))
    assert [(r.status, r.refused) for r in report.all] == [(429, 2), (200, 0)]
    assert report.problems == [] and report.numbers()["refused"] == 3


def test_nobody_there():
    report = asyncio.run(run_load("http://127.0.0.1:9", Plan([[Call({})]])))
    assert "the connection broke" in report.problems[0] and not report.all[0].ok
    with pytest.raises(ValueError, match="not the address of a server"):
        Client("ftp://somewhere")


def test_equal_seeds_give_equal_calls():
    def bodies(seed):
        return [call.body for (call,) in workloads.mixture(50, seed=seed, faults=0.5)]

    assert bodies(1) == bodies(1) != bodies(2)


def test_a_chat_sends_what_was_said():
    first, second = workloads.chats(1, 2, words=3, system_words=2, output_len=4)[0]
    before, after = cast(Any, first.body), cast(Any, second.body)
    reply = Reply(first)
    reply.event(piece("hello", [7]).strip(), 0.0)
    said = after([reply])["messages"]
    assert [m["role"] for m in said] == ["system", "user", "assistant", "user"]
    assert said[2]["content"] == "hello" and said[:2] == before([])["messages"]
