"""Text in, text out: tokenizer, chat template, stop strings, conversations.

The only file that knows text; everything below it (`hmf_jax.generation`) knows tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmf_jax.config import HybridConfig
from hmf_jax.generation import Decoder, Step, capacity_for
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingParams

THINK, END_THINK = "<think>", "</think>"
_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Reply:
    """What the model wrote; `print(reply)` shows its text.

    Attributes:
      text: without thinking, end tokens and stop string.
      thinking: what stood between <think> and </think>, None if the model did not think.
      finish_reason: "eos", "stop" (a stop string), "length", "capacity" (see `Generation`).
      tokens: all tokens generated for it, up to the one that ended it.
      logprobs: one per token, under the model's own distribution.
    """

    text: str
    thinking: str | None
    finish_reason: str
    tokens: list[int]
    logprobs: list[float]

    def __str__(self) -> str:
        return self.text


def load_tokenizer(directory: str | Path) -> Any:
    """The Hugging Face tokenizer of a model directory.

    Raises:
      FileNotFoundError: there is none.
    """
    path = Path(directory)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise FileNotFoundError(
            f"{path} has no tokenizer (tokenizer.json, tokenizer_config.json); copy these files "
            "from the original model, or pass tokenizer=load_tokenizer(other_directory)."
        )
    # Imported where text is needed, since it takes seconds; it need not advise to install PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer, PreTrainedConfig

    # A blank config: transformers would refuse the model's own, whose type it does not know.
    return AutoTokenizer.from_pretrained(str(path), config=PreTrainedConfig())


def stop_ids(config: HybridConfig, tokenizer: Any, directory: str | Path | None) -> tuple[int, ...]:
    """End tokens: those of generation_config.json, of the config and of the tokenizer together."""
    found: list[int] = []
    stored = _generation_config(directory).get("eos_token_id")
    for ids in (stored, config.eos_token_id, tokenizer.eos_token_id):
        found += [] if ids is None else [ids] if isinstance(ids, int) else ids
    return tuple(dict.fromkeys(found))


def default_sampling(directory: str | Path | None) -> SamplingParams:
    """The settings that generation_config.json recommends; greedy if it has none."""
    stored = _generation_config(directory)
    if not stored.get("do_sample"):
        return SamplingParams()
    values = {k: stored[k] for k in _SAMPLING_KEYS if stored.get(k) is not None}
    return SamplingParams(**{"temperature": 1.0, **values})


class TextStream:
    """Turns the tokens of one row into text, piece by piece.

    A character whose bytes are spread over several tokens appears once it is complete, and text
    that may be the beginning of a stop string is held back until that is decided. The pieces do
    not depend on how the tokens were grouped, and together they are `text`.

    Args:
      tokenizer: a Hugging Face tokenizer.
      stop: generation ends before the first of these strings to be completed.
      end_ids: tokens that have no text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), end_ids: Sequence[int] = ()):
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.stopped = False
        self._tokenizer, self._end_ids = tokenizer, frozenset(end_ids)
        self._stop = check_stop(stop)
        self._window: list[int] = []  # newest tokens; decoding needs some context before them
        self._context = 0  # how many of them are context
        self._sent = 0  # characters of the decoded window already passed on
        self._held = ""  # passed on, but perhaps the beginning of a stop string

    def push(self, tokens: Sequence[int], logprobs: Sequence[float]) -> str:
        """Add tokens; the text that is certain now. What follows a stop string is ignored."""
        out = ""
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.stopped:
                break
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if token not in self._end_ids:
                out += self._scan(self._detokenize(token))
        self.text += out
        return out

    def finish(self) -> str:
        """The rest of the text, once no more tokens will come."""
        if self.stopped:
            return ""
        rest = self._scan(self._decode(self._window)[self._sent :]) + self._held
        self._window, self._held = [], ""
        self._context = self._sent = 0
        self.text += rest
        return rest

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _detokenize(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        # An unfinished character decodes to one replacement character at the end.
        certain = text.removesuffix("\ufffd")
        new = certain[self._sent :]
        self._sent = max(self._sent, len(certain))
        if certain == text:
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._sent = len(self._decode(self._window))
        return new

    def _scan(self, piece: str) -> str:
        self._held += piece
        found = [(i + len(s), i) for s in self._stop if (i := self._held.find(s)) >= 0]
        if found:
            _, start = min(found)
            out, self._held, self.stopped = self._held[:start], "", True
            return out
        longest = max((len(s) - 1 for s in self._stop), default=0)
        keep = next(
            n
            for n in range(min(longest, len(self._held)), -1, -1)
            if n == 0 or any(s.startswith(self._held[-n:]) for s in self._stop)
        )
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out


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
        self.model, self.tokenizer = model, _tokenizer_of(model, tokenizer)
        if not self.tokenizer.chat_template:
            raise ValueError(
                "The tokenizer has no chat template, so it does not know how to write a "
                "conversation. Set tokenizer.chat_template, add chat_template.jinja to the model "
                "directory, or use generate_text for plain continuation."
            )
        directory = _directory(model, self.tokenizer)
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
        self._decoder: Decoder | None = None

    def send(self, text: str) -> Reply:
        """Say something, wait for the whole reply. Errors as in `stream`."""
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
        decoder, new = self._place(prompt)
        self._decoder = None  # until this reply is complete, nobody else may continue its state
        first = decoder.start(
            [new],
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            eos_ids=self.stop_ids,
            num_iter=self.num_iter,
        )
        return self._reply(messages, prompt, decoder, first, tokens_per_dispatch)

    def _reply(
        self, messages, prompt: str, decoder: Decoder, first: Step, tokens_per_dispatch: int
    ) -> Generator[str]:
        stream = TextStream(self.tokenizer, self.stop, self.stop_ids)
        intact = True
        try:
            for (piece,) in run(decoder, first, [stream], tokens_per_dispatch):
                if piece:
                    yield piece
        except BaseException as e:
            # Closed by the caller: keep the state. Anything else, a keyboard interrupt for example,
            # may have come between a dispatch and its result.
            intact = isinstance(e, GeneratorExit)
            raise
        finally:
            stream.finish()
            if decoder.active:
                decoder.stop(0)
            open_thinking = prompt.rstrip().endswith(THINK)
            self.last = _reply(stream, decoder, 0, open_thinking)
            answer = {"role": "assistant", "content": self.last.text}
            if self.last.thinking is not None:
                answer["reasoning_content"] = self.last.thinking
            self.messages, self._decoder = [*messages, answer], decoder if intact else None

    def _place(self, prompt: str) -> tuple[Decoder, list[int]]:
        """A decoder, and the tokens it must be fed to hold the whole prompt."""
        encode = self.tokenizer.encode
        config, decoder = self.model.config, self._decoder
        if decoder is not None:
            held = decoder.context[0]
            text = self.tokenizer.decode(
                held, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            if prompt.startswith(text):
                new = encode(prompt[len(text) :], add_special_tokens=False)
                needed = len(held) + len(new) + self.max_new_tokens
                if new and capacity_for(config, needed, self.capacity) <= decoder.capacity:
                    self._check_room(len(held) + len(new), decoder.capacity)
                    return decoder, new
        new = encode(prompt, add_special_tokens=False)
        capacity = capacity_for(config, len(new) + self.max_new_tokens, self.capacity)
        self._check_room(len(new), capacity)
        chunk = self.prefill_chunk
        return Decoder(self.model, 1, capacity=capacity, prefill_chunk=chunk), new

    def _check_room(self, tokens: int, capacity: int) -> None:
        if tokens >= capacity:
            raise ValueError(
                f"The conversation has {tokens} tokens, which leaves no room for a reply in a "
                f"capacity of {capacity}. Start over with reset(), or make a ChatSession with a "
                f"larger capacity (at most {self.model.config.max_position_embeddings})."
            )


def generate_text(
    model: HybridLM,
    prompts: str | Sequence[str],
    tokenizer: Any = None,
    *,
    max_new_tokens: int | Sequence[int] = 128,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    stop: str | Sequence[str] = (),
    num_iter: int | Sequence[int] | None = None,
    capacity: int | None = None,
    prefill_chunk: int = 2048,
) -> list[Reply]:
    """Continue plain texts, without a chat template.

    Args:
      model: the model.
      prompts: one text or several.
      tokenizer: its Hugging Face tokenizer; None loads the one in the model's directory.
      stop: strings that end a text (and are not part of it).
      sampling: None = what generation_config.json says, else greedy.
      max_new_tokens, num_iter, capacity, prefill_chunk: see `hmf_jax.generation.generate`.

    Returns:
      One `Reply` per prompt, in order.

    Raises:
      ValueError: an empty prompt, one that does not fit, or a setting out of range.
    """
    decoder, first, streams = _begin(
        model,
        [prompts] if isinstance(prompts, str) else prompts,
        tokenizer,
        stop,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        num_iter=num_iter,
        capacity=capacity,
        prefill_chunk=prefill_chunk,
    )
    for _ in run(decoder, first, streams, 32):
        pass
    return [_reply(s, decoder, row) for row, s in enumerate(streams)]


def stream_text(
    model: HybridLM,
    prompt: str,
    tokenizer: Any = None,
    *,
    stop: str | Sequence[str] = (),
    **settings: Any,
) -> Iterator[str]:
    """Like `generate_text` for one prompt: yields its continuation in pieces."""
    decoder, first, streams = _begin(model, [prompt], tokenizer, stop, **settings)
    return (piece for (piece,) in run(decoder, first, streams, 8) if piece)


def _begin(
    model: HybridLM, prompts: Sequence[str], tokenizer: Any, stop, sampling=None, **settings: Any
) -> tuple[Decoder, Step, list[TextStream]]:
    tokenizer = _tokenizer_of(model, tokenizer)
    directory = _directory(model, tokenizer)
    ends = stop_ids(model.config, tokenizer, directory)
    streams = [TextStream(tokenizer, stop, ends) for _ in prompts]
    decoder, first = Decoder.begin(
        model,
        [tokenizer.encode(p) for p in prompts],
        sampling=default_sampling(directory) if sampling is None else sampling,
        eos_ids=ends,
        **settings,
    )
    return decoder, first, streams


def run(
    decoder: Decoder, first: Step, streams: Sequence[TextStream], tokens_per_dispatch: int
) -> Iterator[list[str]]:
    """Decode until all rows are done; the new text of every row after each dispatch."""
    step = first
    while True:
        pieces = []
        for row, (stream, (tokens, logprobs)) in enumerate(zip(streams, step, strict=True)):
            piece = stream.push(tokens, logprobs)
            if stream.stopped:
                decoder.stop(row)
            pieces.append(piece if decoder.finish_reason[row] is None else piece + stream.finish())
        yield pieces
        if not decoder.active:
            return
        step = decoder.step(tokens_per_dispatch)


def split_thinking(text: str, open_thinking: bool = False) -> tuple[str | None, str]:
    """(thinking, answer) of a reply; `open_thinking` if the prompt already ended with <think>."""
    before, end, after = text.partition(END_THINK)
    if end:
        return before.strip().removeprefix(THINK).strip(), after.lstrip("\n")
    if open_thinking or text.lstrip().startswith(THINK):
        return text.strip().removeprefix(THINK).strip(), ""
    return None, text


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a tuple; ValueError if one is empty."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"stop={stop!r}: stop strings must be non-empty strings.")
    return stops


def _reply(stream: TextStream, decoder: Decoder, row: int, open_thinking: bool = False) -> Reply:
    thinking, text = split_thinking(stream.text, open_thinking)
    reason = decoder.finish_reason[row] or "stop"
    return Reply(text, thinking, reason, stream.tokens, stream.logprobs)


def _tokenizer_of(model: HybridLM, tokenizer: Any) -> Any:
    if tokenizer is not None:
        return tokenizer
    if model.source is None:
        raise ValueError(
            "This model was not loaded from a directory, so its tokenizer is unknown; pass "
            "tokenizer=load_tokenizer(directory)."
        )
    return load_tokenizer(model.source)


def _directory(model: HybridLM, tokenizer: Any) -> str | None:
    """Where generation_config.json is: with the model, else with the tokenizer."""
    return model.source or getattr(tokenizer, "name_or_path", None) or None


def _generation_config(directory: str | Path | None) -> dict[str, Any]:
    path = None if directory is None else Path(directory) / "generation_config.json"
    if path is None or not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON ({e}); download it again or remove it.") from e
