"""Answers as clients get them: JSON values, whole or in chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hmf_jax.serving.asks import Ask, alternatives
from hmf_jax.serving.choice import Choice, Piece, Token
from hmf_jax.serving.protocol import Chat, Completion
from hmf_jax.serving.reply import Reply
from hmf_jax.serving.served import Served
from hmf_jax.text.deltas import CallStart, Content, Reasoning
from hmf_jax.text.tokenizer import token_bytes, token_text

LEAST = -9999.0  # JSON has no minus infinity


def whole(reply: Reply, served: Served) -> dict[str, Any]:
    """The answer, when all of it is there."""
    ask = reply.ask
    one = _chat_choice if ask.chat else _text_choice
    return {
        **_head(ask, "chat.completion" if ask.chat else "text_completion"),
        "choices": [one(choice, served) for choice in reply.choices],
        "usage": reply.usage,
    }


class Chunks:
    """An answer in chunks.

    Args:
      reply: the answer.
      served: the model.
    """

    def __init__(self, reply: Reply, served: Served) -> None:
        self._reply, self._served = reply, served
        options = reply.ask.fields.stream_options
        self._every = options is not None and bool(options.continuous_usage_stats)
        self._usage = options is not None and bool(options.include_usage)
        self._begun: set[int] = set()

    def of(self, pieces: Sequence[Piece]) -> Iterable[dict[str, Any]]:
        """The chunks that tell what is new."""
        for piece in pieces:
            choices = self._chat(piece) if self._reply.ask.chat else [self._text(piece)]
            for choice in choices:
                yield self._chunk([choice])

    def last(self) -> Iterable[dict[str, Any]]:
        """What comes after all choices have ended."""
        if self._usage:
            yield {**self._chunk([]), "usage": self._reply.usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        ask = self._reply.ask
        chunk = _head(ask, "chat.completion.chunk" if ask.chat else "text_completion")
        chunk["choices"] = choices
        if self._every:
            chunk["usage"] = self._reply.usage
        elif self._usage:
            chunk["usage"] = None
        return chunk

    def _text(self, piece: Piece) -> dict[str, Any]:
        ask = self._reply.ask
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": _text_logprobs(piece.tokens, ask, self._served),
            **_end(self._reply.choices[piece.index] if piece.finish_reason else None),
            **_ids(ask, piece.tokens, self._prompt(piece)),
        }

    def _chat(self, piece: Piece) -> Iterable[dict[str, Any]]:
        ask = self._reply.ask
        assert isinstance(ask.fields, Chat)
        if piece.index not in self._begun:
            head = _delta(piece.index, {"role": "assistant", "content": ""})
            yield {**head, **_ids(ask, [], self._prompt(piece))}
        logprobs = _chat_logprobs(piece.tokens, ask, self._served)
        deltas = _merged(piece, ask.fields.include_reasoning)
        if not deltas and piece.tokens and (logprobs or ask.fields.return_token_ids):
            deltas = [{}]
        for delta in deltas[:-1]:
            yield _delta(piece.index, delta)
        for delta in deltas[-1:]:  # the tokens are told with the last one
            yield {**_delta(piece.index, delta, logprobs), **_ids(ask, piece.tokens)}
        if piece.finish_reason is not None:
            yield {**_delta(piece.index, {}), **_end(self._reply.choices[piece.index])}

    def _prompt(self, piece: Piece) -> list[int] | None:
        """The tokens of the prompt, in the first chunk of a choice."""
        if piece.index in self._begun:
            return None
        self._begun.add(piece.index)
        return self._reply.ask.prompt(piece.index).tokens


def _head(ask: Ask, kind: str) -> dict[str, Any]:
    return {
        "id": ask.id,
        "object": kind,
        "created": ask.created,
        "model": ask.model,
        "system_fingerprint": ask.fingerprint,
    }


def _delta(index: int, delta: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _ids(
    ask: Ask, tokens: Sequence[Token], prompt: list[int] | None = None
) -> dict[str, list[int]]:
    """Token ids, if they were asked for."""
    if not ask.fields.return_token_ids:
        return {}
    own = {"token_ids": [token.id for token in tokens]}
    return own if prompt is None else {**own, "prompt_token_ids": prompt}


def _merged(piece: Piece, reasoning: bool) -> list[dict[str, Any]]:
    """The deltas of a piece, as few as possible."""
    out: list[dict[str, Any]] = []
    for delta in piece.deltas:
        if isinstance(delta, Reasoning):
            if not reasoning:
                continue
            told = {"reasoning": delta.text, "reasoning_content": delta.text}
        elif isinstance(delta, Content):
            told = {"content": delta.text}
        elif isinstance(delta, CallStart):
            function = {"name": delta.name, "arguments": ""}
            call = {"index": delta.index, "id": delta.id, "type": "function", "function": function}
            told = {"tool_calls": [call]}
        else:
            function = {"arguments": delta.text}
            told = {"tool_calls": [{"index": delta.index, "function": function}]}
        if out and "tool_calls" not in told and out[-1].keys() == told.keys():
            out[-1] = {key: out[-1][key] + told[key] for key in told}
        else:
            out.append(told)
    return out


def _chat_choice(choice: Choice, served: Served) -> dict[str, Any]:
    ask = choice.ask
    assert isinstance(ask.fields, Chat)
    thoughts = choice.reasoning if ask.fields.include_reasoning else None
    empty = None if choice.calls or choice.reasoning else ""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": choice.text or empty,
        "reasoning": thoughts,
        "reasoning_content": thoughts,
    }
    if choice.calls:
        message["tool_calls"] = choice.calls
    return {
        "index": choice.index,
        "message": message,
        "logprobs": _chat_logprobs(choice.tokens, ask, served),
        **_end(choice),
        **_ids(ask, choice.tokens, ask.prompt(choice.index).tokens),
    }


def _text_choice(choice: Choice, served: Served) -> dict[str, Any]:
    ask = choice.ask
    assert isinstance(ask.fields, Completion)
    told = {
        "index": choice.index,
        "text": choice.text,
        "logprobs": _text_logprobs(choice.tokens, ask, served),
        **_end(choice),
        **_ids(ask, choice.tokens, ask.prompt(choice.index).tokens),
    }
    if ask.fields.prompt_logprobs is not None:
        told["prompt_logprobs"] = [
            _prompt_logprobs(token, ask.fields.prompt_logprobs, served)
            for token in choice.prompt_tokens
        ]
    return told


def _end(choice: Choice | None) -> dict[str, Any]:
    """How a choice has ended; None: it has not yet."""
    if choice is None:
        return {"finish_reason": None, "stop_reason": None}
    return {
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "seed": choice.request.sampling.seed,
    }


def _name(id: int, ask: Ask, served: Served) -> str:
    if ask.fields.return_tokens_as_token_ids:
        return f"token_id:{id}"
    return token_text(served.tokenizer, id)


def _best(token: Token, count: int) -> list[tuple[int, float]]:
    """The most likely tokens, and the one that was chosen if it is not one of them; it comes first
    among those that are equally likely."""
    ranked = sorted(token.top.items(), key=lambda pair: (-pair[1], pair[0] != token.id))
    own = [pair for pair in ranked[count:] if pair[0] == token.id]
    return [(id, max(value, LEAST)) for id, value in [*ranked[:count], *own]]


def _chat_logprobs(tokens: Sequence[Token], ask: Ask, served: Served) -> dict[str, Any] | None:
    count = alternatives(ask.fields)
    if count is None:
        return None

    def one(id: int, logprob: float) -> dict[str, Any]:
        raw = list(token_bytes(served.tokenizer, id))
        return {"token": _name(id, ask, served), "logprob": logprob, "bytes": raw}

    def entry(token: Token) -> dict[str, Any]:
        assert token.logprob is not None
        best = [one(id, value) for id, value in _best(token, count)] if count else []
        return {**one(token.id, max(token.logprob, LEAST)), "top_logprobs": best}

    return {"content": [entry(token) for token in tokens], "refusal": None}


def _text_logprobs(tokens: Sequence[Token], ask: Ask, served: Served) -> dict[str, Any] | None:
    count = alternatives(ask.fields)
    if count is None:
        return None

    def top(token: Token) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        named = {_name(token.id, ask, served): max(token.logprob, LEAST)}
        for id, value in _best(token, count):
            if id != token.id:
                name = _name(id, ask, served)
                named[f"{name} [{id}]" if name in named else name] = value
        return named

    return {
        "tokens": [_name(token.id, ask, served) for token in tokens],
        "token_logprobs": [
            None if token.logprob is None else max(token.logprob, LEAST) for token in tokens
        ],
        "top_logprobs": [top(token) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _prompt_logprobs(token: Token, count: int, served: Served) -> dict[str, Any] | None:
    """A token of a prompt by its number, and the most likely ones, with their ranks if known."""
    if token.logprob is None:
        return None
    ranks = {id: rank for rank, (id, _) in enumerate(_best(token, count)[:count], 1)}
    return {
        str(id): {
            "logprob": value,
            "rank": ranks.get(id),
            "decoded_token": token_text(served.tokenizer, id),
        }
        for id, value in _best(token, count)
    }
