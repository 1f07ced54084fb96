"""Conversations: messages, the chat template, and a state that stays warm between turns."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from hmf_jax.engine import Engine, Request, capacity_for
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingParams
from hmf_jax.text.detokenizer import TextStream, check_stop
from hmf_jax.text.generate import Reply, reply_of, run
from hmf_jax.text.thinking import THINK
from hmf_jax.text.tokenizer import default_sampling, directory_of, stop_ids, tokenizer_of


class ChatSession:
    """A conversation with a model; remembers the messages and keeps the model's state warm.

    A new turn prefills only what is new if the conversation, as the chat template writes it,
    begins with the text that the state already holds; otherwise it starts over. (Templates that
    drop earlier thinking, or add an empty thinking block only to the newest turn, start over.)

    Args:
      model: the model.
      tokenizer: its Hugging Face tokenizer; None loads the one in the model's directory.
      system: system message.
      thinking: `enable_thinking` for the chat template; None leaves it to the template.
      num_iter: Chebyshev iterations of GKA layers; None = the config's.
      sampling: how to choose tokens; None = what generation_config.json says, else greedy.
      stop: strings that end a reply (and are not part of it).
      max_new_tokens: most tokens per reply, thinking included.
      capacity: most tokens of the whole conversation. None grows in powers of two as needed (and
        then prefills again), up to max_position_embeddings.
      prefill_chunk: prompts are fed in pieces of this many tokens.

    Attributes:
      messages: the conversation so far, as Hugging Face chat messages.
      last: the newest `Reply`.

    Raises:
      ValueError: the tokenizer has no chat template, or a setting is out of range.
      FileNotFoundError: no tokenizer in the model's directory.
    """

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Any = None,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        num_iter: int | None = None,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        max_new_tokens: int = 1024,
        capacity: int | None = None,
        prefill_chunk: int = 2048,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer_of(model, tokenizer)
        if not self.tokenizer.chat_template:
            raise ValueError(
                "The tokenizer has no chat template, so it does not know how to write a "
                "conversation. Set tokenizer.chat_template, add chat_template.jinja to the model "
                "directory, or use generate_text for plain continuation."
            )
        directory = directory_of(model, self.tokenizer)
        self.system, self.thinking, self.stop = system, thinking, check_stop(stop)
        self.sampling = default_sampling(directory) if sampling is None else sampling
        self.stop_ids = stop_ids(model.config, self.tokenizer, directory)
        self.num_iter, self.max_new_tokens = num_iter, max_new_tokens
        self.capacity, self.prefill_chunk = capacity, prefill_chunk
        self.last: Reply | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the conversation (the system message stays)."""
        self.messages: list[dict[str, str]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self._engine: Engine | None = None  # its one row holds the conversation so far

    def send(self, text: str) -> Reply:
        """Say something and wait for the whole reply. Raises what `stream` raises."""
        for _ in self._stream(text, 32):
            pass
        assert self.last is not None
        return self.last

    def stream(self, text: str) -> Generator[str]:
        """Say something; the reply in pieces, as the model writes it (thinking with its tags).

        Closing the iterator early ends the reply there. `last` and `messages` are updated when it
        is exhausted or closed.

        Raises:
          ValueError: the conversation does not fit into the capacity; it is unchanged then.
        """
        return self._stream(text, 8)

    def _stream(self, text: str, tokens_per_dispatch: int) -> Generator[str]:
        messages = [*self.messages, {"role": "user", "content": text}]
        options = {} if self.thinking is None else {"enable_thinking": self.thinking}
        prompt = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options
        )
        engine, new, after = self._place(prompt)
        request = Request(
            new,
            self.max_new_tokens,
            self.sampling,
            self.stop_ids,
            self.num_iter,
            after=after,
            keep=True,
        )
        id = engine.add(request)
        self._engine = None  # until this reply is complete, nobody else may continue its state
        return self._reply(messages, prompt, engine, id, tokens_per_dispatch)

    def _reply(
        self, messages, prompt: str, engine: Engine, id: int, tokens_per_dispatch: int
    ) -> Generator[str]:
        reply = TextStream(self.tokenizer, self.stop, self.stop_ids)
        reasons: dict[int, str] = {}
        intact = True
        try:
            for (piece,) in run(engine, {id: reply}, reasons, tokens_per_dispatch):
                if piece:
                    yield piece
        except BaseException as e:
            # Closed by the caller: keep the state. Anything else, a keyboard interrupt for example,
            # may have come between a dispatch and its result.
            intact = isinstance(e, GeneratorExit)
            raise
        finally:
            reply.finish()
            engine.abort(id)
            while intact and engine.busy:
                engine.step()
            open_thinking = prompt.rstrip().endswith(THINK)
            self.last = reply_of(reply, reasons.get(id, "stop"), open_thinking)
            answer = {"role": "assistant", "content": self.last.text}
            if self.last.thinking is not None:
                answer["reasoning_content"] = self.last.thinking
            self.messages, self._engine = [*messages, answer], engine if intact else None

    def _place(self, prompt: str) -> tuple[Engine, list[int], int | None]:
        """An engine, the tokens it must be fed to hold the whole prompt, and what they continue."""
        encode = self.tokenizer.encode
        config, engine = self.model.config, self._engine
        if engine is not None:
            (id,) = engine.held
            held = engine.context(id)
            text = self.tokenizer.decode(
                held, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            if prompt.startswith(text):
                new = encode(prompt[len(text) :], add_special_tokens=False)
                needed = len(held) + len(new) + self.max_new_tokens
                if new and capacity_for(config, needed, self.capacity) <= engine.capacity:
                    self._check_room(len(held) + len(new), engine.capacity)
                    return engine, new, id
        new = encode(prompt, add_special_tokens=False)
        capacity = capacity_for(config, len(new) + self.max_new_tokens, self.capacity)
        self._check_room(len(new), capacity)
        chunk = self.prefill_chunk
        return (
            Engine(self.model, 1, capacity=capacity, prefill_chunk=chunk, together=True),
            new,
            None,
        )

    def _check_room(self, tokens: int, capacity: int) -> None:
        if tokens >= capacity:
            raise ValueError(
                f"The conversation has {tokens} tokens, which leaves no room for a reply in a "
                f"capacity of {capacity}. Start over with reset(), or make a ChatSession with a "
                f"larger capacity (at most {self.model.config.max_position_embeddings})."
            )
