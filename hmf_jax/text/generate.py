"""Texts from a decoder: continuation of plain texts, and what conversations share with it.

The only file here, beside `chat.py`, that knows the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hmf_jax.generation import Decoder, Step
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingParams
from hmf_jax.text.detokenizer import TextStream
from hmf_jax.text.thinking import split_thinking
from hmf_jax.text.tokenizer import default_sampling, directory_of, stop_ids, tokenizer_of


@dataclass(frozen=True)
class Reply:
    """What the model wrote; `str(reply)` is its text.

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
    decoder, first, texts = _begin(
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
    for _ in decode(decoder, first, texts, 32):
        pass
    return [reply_of(text, decoder, row) for row, text in enumerate(texts)]


def stream_text(
    model: HybridLM,
    prompt: str,
    tokenizer: Any = None,
    *,
    stop: str | Sequence[str] = (),
    **settings: Any,
) -> Iterator[str]:
    """Like `generate_text` for one prompt: yields its continuation in pieces."""
    decoder, first, texts = _begin(model, [prompt], tokenizer, stop, **settings)
    return (piece for (piece,) in decode(decoder, first, texts, 8) if piece)


def _begin(
    model: HybridLM, prompts: Sequence[str], tokenizer: Any, stop, sampling=None, **settings: Any
) -> tuple[Decoder, Step, list[TextStream]]:
    """A started decoder, its first tokens, and the text of each prompt's continuation so far."""
    tokenizer = tokenizer_of(model, tokenizer)
    directory = directory_of(model, tokenizer)
    ends = stop_ids(model.config, tokenizer, directory)
    texts = [TextStream(tokenizer, stop, ends) for _ in prompts]
    decoder, first = Decoder.begin(
        model,
        [tokenizer.encode(p) for p in prompts],
        sampling=default_sampling(directory) if sampling is None else sampling,
        eos_ids=ends,
        **settings,
    )
    return decoder, first, texts


def decode(
    decoder: Decoder, first: Step, texts: Sequence[TextStream], tokens_per_dispatch: int
) -> Iterator[list[str]]:
    """Decode until all rows are done; yields the new text of every row after each dispatch.

    Args:
      decoder: has been started.
      first: what its start returned.
      texts: one per row; a stop string that one finds ends its row.
      tokens_per_dispatch: tokens per row that one call of the device makes.
    """
    step = first
    while True:
        pieces = []
        for row, (text, (tokens, logprobs)) in enumerate(zip(texts, step, strict=True)):
            piece = text.push(tokens, logprobs)
            if text.stopped:
                decoder.stop(row)
            pieces.append(piece if decoder.finish_reason[row] is None else piece + text.finish())
        yield pieces
        if not decoder.active:
            return
        step = decoder.step(tokens_per_dispatch)


def reply_of(text: TextStream, decoder: Decoder, row: int, open_thinking: bool = False) -> Reply:
    """The reply of a row that is done; `open_thinking` as in `split_thinking`."""
    thinking, answer = split_thinking(text.text, open_thinking)
    reason = decoder.finish_reason[row] or "stop"
    return Reply(answer, thinking, reason, text.tokens, text.logprobs)
