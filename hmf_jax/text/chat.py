"""Conversations: messages, the chat template, and a state that stays warm between turns."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Unpack

from hmf_jax.engine import Engine, Finished, Request, Started, capacity_for, check_prompts
from hmf_jax.engine.api import conversation_engine
from hmf_jax.engine.request import sampling_of, tell_errors
from hmf_jax.generation_config import generation_defaults
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingParams, SamplingSettings
from hmf_jax.text.detokenizer import TextStream, check_stop
from hmf_jax.text.generate import Reply, run
from hmf_jax.text.messages import Message, Said, check_messages, check_tools, said
from hmf_jax.text.parts import TAGS, Piece, ReplyParts
from hmf_jax.text.prompt import Rendered, render_prompt
from hmf_jax.text.template import texts
from hmf_jax.text.tokenizer import directory_of, stop_ids, tag_ids, tokenizer_of

MAX_NEW_TOKENS = 1024  # where neither the caller nor the model's directory says


class ConversationFull(ValueError):
    """A conversation leaves no room for a reply; `forget_oldest` or `reset` makes some."""


class ChatSession:
    """A conversation with a model; remembers the messages and keeps the model's state warm.

    A new turn reads only what is new. The conversation as the chat template writes it now is
    compared token by token with what was read before, and the newest state that fits is continued.
    Templates that drop earlier thinking, or add an empty thinking block only to the newest turn,
    change what comes after the question; so the state before each reply is kept, and the one after
    it (recurrent states and windows are copied, keys and values are not).

    Several threads may use a session: a turn waits until the one before it is complete. Several
    sessions may use a model.

    Args:
      model: the model.
      tokenizer: its Hugging Face tokenizer; None loads the one in the model's directory.
      system: system message.
      messages: a conversation to go on with, instead of `system`.
      tools: what the model may call: JSON schemas, or Python functions with types and a docstring
        in Google's style. Calls are found in replies as <tool_call>{"name": ..., "arguments":
        {...}}</tool_call>; what is malformed stays text. Nothing is called.
      thinking: `enable_thinking` for the chat template; None leaves it to the template. With False,
        tags of thinking in a reply are text.
      num_iter: Chebyshev iterations of GKA layers; None = the config's.
      sampling, settings: how to choose tokens, as in `hmf_jax.generate`; None = what
        generation_config.json says, else greedy.
      stop: strings that end a reply (and are not part of it).
      max_new_tokens: most tokens per reply, thinking included; None = what generation_config.json
        says, else 1024.
      capacity: most tokens of the whole conversation. None grows in powers of two as needed, up to
        max_position_embeddings.
      prefill_chunk: prompts are fed in pieces of this many tokens.

    Attributes:
      last: the newest `Reply`.
      tools: the JSON schemas.

    Raises:
      ValueError: the tokenizer has no chat template, or none for tools; messages, tools or a
        setting that cannot be.
      FileNotFoundError: no tokenizer in the model's directory.
    """

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Any = None,
        *,
        system: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Any] | None = None,
        thinking: bool | None = None,
        num_iter: int | None = None,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        stop: str | Sequence[str] | None = (),
        max_new_tokens: int | None = None,
        capacity: int | None = None,
        prefill_chunk: int = 2048,
        **settings: Unpack[SamplingSettings],
    ) -> None:
        self.model, self.tokenizer = model, tokenizer_of(model, tokenizer)
        self.tools = check_tools(tools)
        self.thinking, self.stop = thinking, check_stop(stop)
        self._check_template()
        if system is not None and messages is not None:
            raise ValueError("pass system, or messages that begin with a system message, not both")
        directory = directory_of(model, self.tokenizer)
        self._defaults = generation_defaults(model, directory)
        (self.sampling,) = sampling_of(sampling, settings, self._defaults.settings, 1)
        self.stop_ids = stop_ids(model.config, self.tokenizer, directory)
        if not self.stop_ids:
            warnings.warn(
                "no end token is known (eos_token_id): replies end at max_new_tokens", stacklevel=2
            )
        self.num_iter, self.max_new_tokens = num_iter, max_new_tokens
        self.capacity, self.prefill_chunk = capacity, prefill_chunk
        self.last: Reply | None = None
        self._tags = tag_ids(self.tokenizer, TAGS)
        self._turns = _OneAtATime()
        if messages is None:
            messages = [] if system is None else [{"role": "system", "content": system}]
        self._messages = check_messages(messages)
        self._engine: Engine | None = None  # of one slot; holds what was read before

    @property
    def messages(self) -> list[Message]:
        """The conversation so far: plain JSON values, as chat templates take them.

        May be replaced, by what was saved for example, or changed between turns.
        """
        return self._messages

    @messages.setter
    def messages(self, messages: Sequence[Mapping[str, Any]]) -> None:
        with self._turns:
            self._messages = check_messages(messages)

    @property
    def system(self) -> str | None:
        """The system message that the conversation begins with."""
        return self._messages[0]["content"] if _is_system(self._messages) else None

    def reset(self) -> None:
        """Forget the conversation (the system message stays)."""
        with self._turns:
            self._messages = self._messages[: int(_is_system(self._messages))]
            self._engine = None

    def forget_oldest(self) -> bool:
        """Forget the oldest turn: what the user said first, and everything until the next time.

        Returns:
          Whether there was one. The system message stays.
        """
        with self._turns:
            users = [i for i, m in enumerate(self._messages) if m["role"] == "user"]
            if not users:
                return False
            end = users[1] if len(users) > 1 else len(self._messages)
            start = int(_is_system(self._messages))
            self._messages = [*self._messages[:start], *self._messages[end:]]
            return True

    def send(self, message: Said) -> Reply:
        """Say something and wait for the whole reply. Arguments and errors as those of `stream`."""
        turn = self._turn(message, 32)
        while True:
            try:
                next(turn)
            except StopIteration as end:
                return end.value

    def stream(self, message: Said) -> Generator[Piece, None, Reply]:
        """Say something; the reply in pieces, as the model writes it (thinking with its tags).

        Every piece is a string that knows what it is a part of: `piece.part` is "thinking", "text",
        "tool_call" or "tags". Closing the iterator early ends the reply there. `last` and
        `messages` are updated when it is exhausted or closed.

        Args:
          message: text of the user, or a message {"role": ..., "content": ...}, or several: the
            results of tools for example. See `hmf_jax.text.check_messages`.

        Raises:
          ConversationFull: the conversation does not fit into the capacity.
          ValueError: a message that cannot be, or that the chat template refuses.
          FloatingPointError: the model's logits are NaN or infinite.
          RuntimeError: this thread has not exhausted or closed an earlier stream of the session.

        After an error the conversation is what it was before.
        """
        self._turns.check()
        self._prepare(message)
        return self._turn(message, 8)

    def _turn(self, message: Said, steps: int) -> Generator[Piece, None, Reply]:
        with self._turns:
            messages, prompt = self._prepare(message)
            count = len(prompt.tokens)
            engine = self._ready(count)
            request = Request(
                prompt.tokens,
                self._limit(count),
                self.sampling,
                self.stop_ids,
                self.num_iter,
                cuts=prompt.cuts,
            )
            id = engine.add(request)
            self._engine = None  # until this reply is complete, nobody else may use it
            text = TextStream(
                self.tokenizer,
                self.stop,
                self.stop_ids,
                {token: tag for tag, token in self._tags.items()},
            )
            parts = ReplyParts(
                self._tags,
                opened=prompt.thinking,
                thinking=self.thinking is not False,
                tools=bool(self.tools),
            )
            started: dict[int, Started] = {}
            ended: dict[int, Finished] = {}
            whole, intact = True, True
            try:
                for (piece,) in run(engine, {id: text}, started, ended, steps):
                    yield from parts.push(piece, text.places)
                tell_errors({id: e.error for id, e in ended.items() if e.error}, 1)
                yield from parts.finish()
            except BaseException as e:
                # Closed by the caller: keep the engine. Anything else, a keyboard interrupt for
                # example, may have come between a dispatch and its result.
                intact, whole = isinstance(e, GeneratorExit), not isinstance(e, Exception)
                raise
            finally:
                if whole:
                    parts.push(text.finish(), text.places)
                    parts.finish()
                    engine.abort(id)
                    while intact and engine.busy:
                        engine.step()
                    reason = ended[id].reason if id in ended else "stop"
                    cached = started[id].cached if id in started else 0
                    self._end(messages, parts, text, reason, count - cached)
                    self._engine = engine if intact else None
            assert self.last is not None
            return self.last

    def _end(
        self, messages: list[Message], parts: ReplyParts, text: TextStream, reason: str, read: int
    ) -> None:
        """The reply becomes part of the conversation."""
        answer: Message = {"role": "assistant", "content": parts.text}
        if parts.thinking is not None:
            answer["reasoning_content"] = parts.thinking
        if parts.tool_calls:
            answer["tool_calls"] = parts.tool_calls
        self.last = Reply(
            parts.text,
            parts.thinking,
            reason,
            text.tokens,
            text.logprobs,
            parts.tool_calls,
            prefilled=read,
        )
        self._messages = [*messages, answer]

    def _prepare(self, message: Said) -> tuple[list[Message], Rendered]:
        """What a turn begins with: the messages, and the prompt that they make."""
        messages = check_messages([*self._messages, *said(message)])
        options: dict[str, Any] = (
            {} if self.thinking is None else {"enable_thinking": self.thinking}
        )
        prompt = render_prompt(self.tokenizer, messages, tools=self.tools, **options)
        check_prompts([prompt.tokens], self.model.config.vocab_size)
        capacity, count = self._capacity(len(prompt.tokens)), len(prompt.tokens)
        if count >= capacity:
            raise ConversationFull(
                f"The conversation has {count} tokens, which leaves no room for a reply in a "
                f"capacity of {capacity}. Start over with reset(), forget_oldest(), or make a "
                "ChatSession with a larger capacity (at most "
                f"{self.model.config.max_position_embeddings})."
            )
        return messages, prompt

    def _limit(self, tokens: int) -> int:
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return self._defaults.limit(tokens, MAX_NEW_TOKENS)

    def _capacity(self, tokens: int) -> int:
        return capacity_for(self.model.config, tokens + self._limit(tokens), self.capacity)

    def _ready(self, tokens: int) -> Engine:
        """The engine, with room for a prompt of so many tokens and the reply to it."""
        capacity = self._capacity(tokens)
        if self._engine is None:
            return conversation_engine(
                self.model, capacity=capacity, prefill_chunk=self.prefill_chunk
            )
        if capacity > self._engine.capacity:
            self._engine.grow(capacity)
        return self._engine

    def _check_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise ValueError(
                "The tokenizer has no chat template, so it does not know how to write a "
                "conversation. Set tokenizer.chat_template, add chat_template.jinja to the model "
                "directory, or use generate_text for plain continuation."
            )
        found = list(texts(self.tokenizer.chat_template))
        if self.tools and not any("tools" in text for text in found):
            raise ValueError("The tokenizer's chat template has no place for tools.")
        if self.thinking is not None and not any("enable_thinking" in text for text in found):
            warnings.warn(
                f"The tokenizer's chat template has no switch for thinking, so thinking="
                f"{self.thinking} is not told to the model.",
                stacklevel=3,
            )


class _OneAtATime:
    """A lock for the turns of a session; a thread that would wait for itself gets an error."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None

    def check(self) -> None:
        """Raises RuntimeError if the turn that is not complete is this thread's, or nobody's."""
        owner = self._owner
        if owner is not None and (owner is threading.current_thread() or not owner.is_alive()):
            raise RuntimeError(
                "a reply of this session is still being streamed; exhaust or close its iterator"
            )

    def __enter__(self) -> None:
        self.check()
        while not self._lock.acquire(timeout=0.5):
            self.check()
        self._owner = threading.current_thread()

    def __exit__(self, *exception: object) -> None:
        self._owner = None
        self._lock.release()


def _is_system(messages: Sequence[Message]) -> bool:
    """Whether the conversation begins with a system message."""
    return bool(messages) and messages[0]["role"] in ("system", "developer")
