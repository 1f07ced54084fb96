"""Text from an engine: continuation of plain texts, and what conversations share with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

from hmf_jax.engine import Engine, Finished, New, Started, requests
from hmf_jax.engine.batch import Batch
from hmf_jax.engine.request import Sampling, tell_errors
from hmf_jax.generation_config import generation_defaults
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingSettings
from hmf_jax.text.detokenizer import TextStream
from hmf_jax.text.messages import check_text
from hmf_jax.text.tokenizer import directory_of, stop_ids, tokenizer_of


@dataclass(frozen=True)
class Reply:
    """What the model wrote; `str(reply)` is its text.

    Attributes:
      text: without thinking, calls of tools, end tokens and stop string.
      thinking: what a `ChatSession` found between <think> and </think>, also if the end is missing;
        None if the model did not think. A continuation of plain text has none.
      finish_reason: "eos", "stop" (a stop string), "length", "capacity" or "error" (logits that are
        not finite), see `Output`.
      tokens: all tokens generated for it, up to the one that ended it.
      logprobs: one per token, under the model's own distribution.
      tool_calls: [{"type": "function", "function": {"name": str, "arguments": dict}}, ...], if the
        session has tools.
      error: why there is nothing after these tokens, if finish_reason is "error".
      prefilled: tokens that the model had to read for it; a session keeps what it has read.
    """

    text: str
    thinking: str | None
    finish_reason: str
    tokens: list[int]
    logprobs: list[float]
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    prefilled: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return self.text


def generate_text(
    model: HybridLM,
    prompts: str | Sequence[str],
    tokenizer: Any = None,
    *,
    max_new_tokens: int | Sequence[int] | None = None,
    sampling: Sampling = None,
    stop: str | Sequence[str] | None = (),
    num_iter: int | Sequence[int] | None = None,
    capacity: int | None = None,
    prefill_chunk: int = 2048,
    **settings: Unpack[SamplingSettings],
) -> list[Reply]:
    """Continue plain texts, without a chat template. What a model thinks is part of the text.

    Args:
      model: the model.
      prompts: one text or several.
      tokenizer: its Hugging Face tokenizer; None loads the one in the model's directory.
      stop: strings that end a text (and are not part of it).
      max_new_tokens: None = what generation_config.json says, else 128.
      sampling, settings: how to choose tokens; None = what generation_config.json says, else
        greedy.
      num_iter, capacity, prefill_chunk: see `hmf_jax.generate`.

    Returns:
      One `Reply` per prompt, in order. As in `hmf_jax.generate`, one whose logits are NaN or
      infinite has finish_reason "error", and a RuntimeWarning names it.

    Raises:
      ValueError: an empty prompt, one that does not fit, or a setting out of range.
      FloatingPointError: there is one prompt only, and its logits are NaN or infinite.
    """
    batch, texts = _begin(
        model,
        [prompts] if isinstance(prompts, str) else prompts,
        tokenizer,
        stop,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        num_iter=num_iter,
        capacity=capacity,
        prefill_chunk=prefill_chunk,
        **settings,
    )
    ended: dict[int, Finished] = {}
    for _ in run(batch, texts, {}, ended, 32):
        pass
    errors = {i: f"Prompt {i}, {e.error}" for i in texts if (e := ended[i]).error}
    tell_errors(errors, len(texts))
    return [
        Reply(
            text.text, None, ended[i].reason, text.tokens, text.logprobs, error=errors.get(i),
            prefilled=len(batch.asked[i].prompt),
        )
        for i, text in texts.items()
    ]  # fmt: skip


def stream_text(
    model: HybridLM,
    prompt: str,
    tokenizer: Any = None,
    *,
    stop: str | Sequence[str] | None = (),
    **settings: Any,
) -> Iterator[str]:
    """Like `generate_text` for one prompt: yields its continuation in pieces."""
    batch, texts = _begin(model, [prompt], tokenizer, stop, **settings)

    def pieces() -> Iterator[str]:
        ended: dict[int, Finished] = {}
        for (piece,) in run(batch, texts, {}, ended, 8):
            if piece:
                yield piece
        tell_errors({id: e.error for id, e in ended.items() if e.error}, 1)

    return pieces()


def _begin(
    model: HybridLM,
    prompts: Sequence[str],
    tokenizer: Any,
    stop: str | Sequence[str] | None,
    *,
    max_new_tokens: int | Sequence[int] | None = None,
    sampling: Sampling = None,
    num_iter: int | Sequence[int] | None = None,
    capacity: int | None = None,
    prefill_chunk: int = 2048,
    **settings: Any,
) -> tuple[Batch, dict[int, TextStream]]:
    """The prompts as a batch, and the text of each continuation so far, by its row."""
    for i, prompt in enumerate(prompts):
        check_text(prompt, f"Prompt {i}", "text")
    tokenizer = tokenizer_of(model, tokenizer)
    directory = directory_of(model, tokenizer)
    ends = stop_ids(model.config, tokenizer, directory)
    defaults = generation_defaults(model, directory)
    texts = [TextStream(tokenizer, stop, ends) for _ in prompts]
    asked = requests(
        model.config,
        [tokenizer.encode(prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=ends,
        num_iter=num_iter,
        settings=settings,
        defaults=defaults,
    )
    batch = Batch(model, asked, capacity=capacity, prefill_chunk=prefill_chunk)
    return batch, dict(enumerate(texts))


def run(
    engine: Engine | Batch,
    texts: Mapping[int, TextStream],
    started: dict[int, Started],
    ended: dict[int, Finished],
    steps: int,
) -> Iterator[list[str]]:
    """Runs requests until they are done; yields the new text of each after every step.

    Args:
      engine: what runs these requests and no others.
      texts: by request; a stop string that one finds ends its request.
      started, ended: get how each request has begun, and how it has ended.
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
            elif isinstance(event, Started):
                started[event.id] = event
            elif isinstance(event, Finished):
                text = texts[event.id]
                pieces[event.id] += text.finish()
                ended[event.id] = replace(event, reason="stop") if text.stopped else event
        yield list(pieces.values())
