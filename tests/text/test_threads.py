"""Sessions and threads: turns wait for each other, nothing is lost."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest


def test_threads_of_one_session_take_turns(session):
    chat = session(max_new_tokens=3)
    chat.send("first")

    def speak(name: str) -> None:
        for i in range(3):
            if i % 2:
                list(chat.stream(f"{name}{i}"))
            else:
                chat.send(f"{name}{i}")

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(speak, name) for name in "abc"]:
            done.result()
    roles = [m["role"] for m in chat.messages]
    assert roles == ["user", "assistant"] * 10
    said = [m["content"] for m in chat.messages[::2]]
    assert sorted(said) == sorted(["first", *(f"{n}{i}" for n in "abc" for i in range(3))])
    for name in "abc":  # each thread's own order stays
        assert [s for s in said if s.startswith(name)] == [f"{name}{i}" for i in range(3)]


def test_a_thread_does_not_wait_for_itself(session):
    chat = session(max_new_tokens=30)
    stream = chat.stream("Hello")
    next(stream)
    for call in (lambda: chat.send("Again"), lambda: chat.stream("Again"), chat.reset):
        with pytest.raises(RuntimeError, match="still being streamed; exhaust or close"):
            call()
    assert chat.messages == []
    rest = list(stream)
    assert rest and len(chat.messages) == 2
    assert chat.send("Again").tokens and len(chat.messages) == 4


def test_an_abandoned_stream_gives_its_turn_back(session):
    chat = session(max_new_tokens=30)
    unread = chat.stream("never read")
    assert chat.send("Hello").tokens and len(chat.messages) == 2
    del unread
    stream = chat.stream("Go on")
    next(stream)
    del stream  # nobody will read the rest
    assert [m["content"] for m in chat.messages[::2]] == ["Hello", "Go on"]
    assert chat.send("And on").tokens


def test_a_stream_of_a_thread_that_has_ended(session):
    chat, kept = session(max_new_tokens=30), []

    def begin() -> None:
        kept.append(chat.stream("Hello"))
        next(kept[0])

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match="still being streamed"):
        chat.send("Again")
    kept[0].close()
    assert chat.send("Again").tokens and len(chat.messages) == 4


def test_sessions_of_one_model_in_several_threads(session):
    def talk(name: str) -> list[str]:
        chat = session(max_new_tokens=5)
        return [chat.send(f"{name}{i}").text for i in range(2)]

    expected = [talk(name) for name in "abc"]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(talk, "abc")) == expected
