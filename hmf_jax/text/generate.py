"""Text from an engine: continuation of plain texts, and what conversations share with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hmf_jax.engine import Engine, Finished, New, requests, start
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
      finish_reason: "eos", "stop" (a stop string), "length" or "capacity" (see `Output`).
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
      max_new_tokens, num_iter, capacity, prefill_chunk: see `hmf_jax.generate`.

    Returns:
      One `Reply` per prompt, in order.

    Raises:
      ValueError: an empty prompt, one that does not fit, or a setting out of range.
    """
    engine, texts = _begin(
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
    reasons: dict[int, str] = {}
    for _ in run(engine, texts, reasons, 32):
        pass
    return [reply_of(text, reasons[id]) for id, text in texts.items()]


def stream_text(
    model: HybridLM,
    prompt: str,
    tokenizer: Any = None,
    *,
    stop: str | Sequence[str] = (),
    **settings: Any,
) -> Iterator[str]:
    """Like `generate_text` for one prompt: yields its continuation in pieces."""
    engine, texts = _begin(model, [prompt], tokenizer, stop, **settings)
    return (piece for (piece,) in run(engine, texts, {}, 8) if piece)


def _begin(
    model: HybridLM,
    prompts: Sequence[str],
    tokenizer: Any,
    stop: str | Sequence[str],
    *,
    sampling: Any = None,
    capacity: int | None = None,
    prefill_chunk: int = 2048,
    **settings: Any,
) -> tuple[Engine, dict[int, TextStream]]:
    """An engine with a request for each prompt, and the text of each continuation so far, by id."""
    tokenizer = tokenizer_of(model, tokenizer)
    directory = directory_of(model, tokenizer)
    ends = stop_ids(model.config, tokenizer, directory)
    texts = [TextStream(tokenizer, stop, ends) for _ in prompts]
    asked = requests(
        model.config,
        [tokenizer.encode(p) for p in prompts],
        sampling=default_sampling(directory) if sampling is None else sampling,
        eos_ids=ends,
        **settings,
    )
    engine, ids = start(model, asked, capacity=capacity, prefill_chunk=prefill_chunk)
    return engine, dict(zip(ids, texts, strict=True))


def run(
    engine: Engine, texts: Mapping[int, TextStream], reasons: dict[int, str], steps: int
) -> Iterator[list[str]]:
    """Runs an engine until its requests are done; yields the new text of each after every step.

    Args:
      engine: has these requests and no others.
      texts: by request; a stop string that one finds ends its request.
      reasons: gets the finish reason of each request.
      steps: tokens per row that one call of the device makes.
    """
    while engine.busy:
        pieces = dict.fromkeys(texts, "")
        for event in engine.step(steps):
            if isinstance(event, New):
                text = texts[event.id]
                pieces[event.id] += text.push(event.tokens, event.logprobs)
                if text.stopped:
                    engine.abort(event.id)
            elif isinstance(event, Finished):
                text = texts[event.id]
                pieces[event.id] += text.finish()
                reasons[event.id] = "stop" if text.stopped else event.reason
        yield list(pieces.values())


def reply_of(text: TextStream, reason: str, open_thinking: bool = False) -> Reply:
    """The reply that a finished text is; `open_thinking` as in `split_thinking`."""
    thinking, answer = split_thinking(text.text, open_thinking)
    return Reply(answer, thinking, reason, text.tokens, text.logprobs)
