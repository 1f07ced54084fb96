"""Chat templates: programs that come with a model and write messages down as text."""

from __future__ import annotations

import ctypes
import functools
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hmf_jax.convert.directories import printable

SECONDS = 10.0  # a template that takes longer does not end
MEMORY = 1 << 30  # bytes that it may take meanwhile
LONGEST = 1 << 26  # characters that it may write
LARGEST = 1_000_000  # numbers that may be in it


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """What the chat template of a tokenizer makes of messages, as text.

    transformers runs templates without access to anything; here they also have to come to an end.

    Args:
      tokenizer: a Hugging Face tokenizer.
      messages: as `hmf_jax.text.messages.check_messages` returns them.
      options: of `apply_chat_template`: add_generation_prompt, tools, chat_template, ... and of the
        template: enable_thinking, ...

    Raises:
      ValueError: one line that names the template: it refuses these messages, is damaged, takes
        more than 10 seconds, or too much memory, or writes more than 64 million characters.
    """
    whose = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    name = f"the chat template of {printable(whose)}"

    def write() -> str:
        for text in texts(options.get("chat_template") or tokenizer.chat_template):
            if line := _line_of_large_numbers(text):
                raise ValueError(f"line {line} computes with very large numbers, so it is not run")
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)

    try:
        text = _within(SECONDS, write)
    except TimeoutError:
        raise ValueError(f"{name} takes too long or too much memory; is it damaged?") from None
    except Exception as e:
        raise ValueError(f"{name} fails for this conversation: {one_line(e)}") from e
    if not isinstance(text, str) or len(text) > LONGEST:
        raise ValueError(f"{name} writes more than {LONGEST:,} characters; is it damaged?")
    return text


def texts(template: Any) -> Iterator[str]:
    """The text of a template, or those of several by name."""
    if isinstance(template, Mapping):
        for one in template.values():
            yield from texts(one)
    elif isinstance(template, str):
        yield template


def one_line(error: BaseException) -> str:
    """What an error says, in one line that may be shown."""
    text = printable(" ".join(str(error).split()), 300)
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


@functools.lru_cache
def _line_of_large_numbers(text: str) -> int | None:
    """Where a template could fill the memory in one step, which no limit stops: 'a' * 10**9."""
    import jinja2

    try:
        for line, kind, value in jinja2.Environment().lex(text):
            large = kind == "integer" and int(value.replace("_", ""), 0) > LARGEST
            wide = kind == "string" and re.search(r"[%<>^:]\d{7,}", value)
            if large or wide or (kind == "operator" and value == "**"):
                return line
    except jinja2.TemplateError:
        pass  # is said when it is used
    return None


def _within(seconds: float, do: Callable[[], Any]) -> Any:
    """What `do` returns or raises; if it takes more time or memory, it is ended: TimeoutError."""
    result: list[Any] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            result.append(do())
        except BaseException as e:
            error.append(e)

    thread = threading.Thread(target=run, daemon=True)
    end, memory = time.monotonic() + seconds, _memory()
    thread.start()
    try:
        thread.join(0.05)
        while thread.is_alive() and time.monotonic() < end and _memory() < memory + MEMORY:
            thread.join(0.01)
    finally:
        if thread.is_alive() and thread.ident is not None:
            stop = ctypes.py_object(SystemExit)  # is raised in the thread, at its next step
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), stop)
    if result:
        return result[0]
    if not error or isinstance(error[0], SystemExit):
        raise TimeoutError
    raise error[0]


def _memory() -> int:
    """Bytes of this process; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return 4096 * int(pages)
