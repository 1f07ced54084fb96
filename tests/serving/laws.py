"""What must hold of the replies of a server, whatever its load was: `check` compares them with
`generate`, the same slots and capacity."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from hmf_jax.sampling import SamplingParams
from hmf_jax.serving.load import CHAT, Call, Reply

_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def prompt_of(asked: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """The tokens that a request is about."""
    if "messages" in asked:
        text = tokenizer.apply_chat_template(
            asked["messages"], tokenize=False, add_generation_prompt=True
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = asked["prompt"]
    return prompt if isinstance(prompt, list) else tokenizer(prompt)["input_ids"]


def sampling_of(asked: Mapping[str, Any], choice: int) -> SamplingParams:
    """How the server was asked to choose the tokens of a choice."""
    settings = {name: asked[name] for name in _SETTINGS if name in asked}
    settings = {"temperature": 1.0} | settings
    if "seed" in asked:
        settings["seed"] = (asked["seed"] + choice) % 2**32
    return SamplingParams.of(settings)


def expected(model: Any, tokenizer: Any, replies: Iterable[Reply], **engine: Any) -> dict:
    """The output of `generate` for every choice of every reply with tokens, {(reply, index): }.

    Prompts and settings that are equal are generated once. `engine`: slots, capacity, chunk, ends.
    """
    wanted: dict[Any, tuple] = {}
    where: dict[tuple[int, int], Any] = {}
    for i, reply in enumerate(replies):
        asked = reply.asked
        for index in reply.choices:
            sampling = sampling_of(asked, index)
            prompt = prompt_of(asked, tokenizer)
            row = (prompt, asked["max_tokens"], sampling, asked.get("num_iter"))
            key = (tuple(prompt), *row[1:])
            wanted[repr(key)] = row
            where[i, index] = repr(key)
    if not wanted:
        return {}
    prompts, lengths, sampling, num_iter = map(list, zip(*wanted.values(), strict=True))
    outputs = model.generate(
        prompts,
        max_new_tokens=lengths,
        sampling=sampling,
        num_iter=None if set(num_iter) == {None} else num_iter,
        logprobs=True,
        **engine,
    )
    found = dict(zip(wanted, outputs, strict=True))
    return {place: found[key] for place, key in where.items()}


def differences(model: Any, tokenizer: Any, replies: Iterable[Reply], **engine: Any) -> list[str]:
    """One line for each choice that is not, bit for bit, what `generate` gives; what came of a
    reply that was cut off must be how that begins."""
    replies = [reply for reply in replies if reply.choices]
    lines = []
    for (i, index), output in expected(model, tokenizer, replies, **engine).items():
        reply, choice = replies[i], replies[i].choices[index]
        about = f"{reply.call.about}, choice {index}"
        got = choice.token_ids
        if got != output.tokens[: len(got)] or (reply.ok and len(got) != len(output.tokens)):
            lines.append(f"{about}: tokens {got} instead of {output.tokens}")
            continue
        logprobs = [max(value, -9999.0) for value in output.logprobs[: len(choice.logprobs)]]
        if choice.logprobs != logprobs:
            lines.append(f"{about}: logprobs {choice.logprobs} instead of {logprobs}")
        if not reply.ok:
            continue
        if reply.asked.get("logprobs") and len(choice.logprobs) != len(got):
            lines.append(f"{about}: {len(choice.logprobs)} logprobs of {len(got)} tokens")
        text = tokenizer.decode(got, skip_special_tokens=True)
        if choice.text != text:
            lines.append(f"{about}: text {choice.text!r} instead of {text!r}")
        reason = {"eos": "stop"}.get(output.finish_reason, output.finish_reason)
        if choice.finish_reason != reason:
            lines.append(f"{about}: ended by {choice.finish_reason}, not {reason}")
        if index == 0 and reply.usage is not None:
            size = len(prompt_of(reply.asked, tokenizer))
            if reply.prompt_tokens != size:
                lines.append(f"{about}: {reply.prompt_tokens} prompt tokens instead of {size}")
    return lines


def comparable(call: Call) -> Call:
    """The call, asking for tokens and log-probabilities, too."""
    assert isinstance(call.body, Mapping)
    logprobs = True if call.path == CHAT else 0
    body = {**call.body, "return_token_ids": True, "logprobs": logprobs}
    return dataclasses.replace(call, body=body)
