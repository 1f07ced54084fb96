"""What a request asks of the engine: its fields, checked against the model that is served."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from hmf_jax.engine import Request
from hmf_jax.engine.request import Constraint
from hmf_jax.sampling import SamplingParams
from hmf_jax.serving.allowed import Allowed
from hmf_jax.serving.errors import invalid, unsupported
from hmf_jax.serving.grammar import structured_output
from hmf_jax.serving.protocol import Chat, Completion, Conversation, Generation, NamedFunction
from hmf_jax.serving.served import Served
from hmf_jax.text import render_prompt
from hmf_jax.text.template import one_line

END_IDS = 16  # end tokens that the device looks for; the host looks for the others
GREEDY = 1e-5  # temperatures below it
NEVER = float("-inf")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as tokens.

    Attributes:
      tokens: of the prompt.
      text: what the client sent, if that was a text.
      cuts: see `hmf_jax.engine.Request`.
      thinking: it ends within a block of thinking.
    """

    tokens: list[int]
    text: str | None = None
    cuts: tuple[int, ...] = ()
    thinking: bool = False


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request that can be given to the engine.

    Attributes:
      fields: of the request.
      id: of the answer.
      request_id: as the client calls it.
      model: as the client calls it.
      created: unix seconds.
      prompts: one or more.
      requests: one per choice; choice i belongs to prompt i // n.
      fingerprint: of all that decides about the bits of the answer.
    """

    fields: Generation
    id: str
    request_id: str
    model: str
    created: int
    prompts: list[Prompt]
    requests: list[Request]
    fingerprint: str

    @property
    def chat(self) -> bool:
        """Whether it is a conversation."""
        return isinstance(self.fields, Chat)

    def prompt(self, choice: int) -> Prompt:
        """The prompt of a choice."""
        return self.prompts[choice // self.fields.n]


def prompts_of(fields: Completion, served: Served) -> list[Prompt]:
    """The prompts of a completion, as tokens; ApiError for what is none."""
    found = []
    for i, prompt in enumerate(fields.prompt):
        param = "prompt" if len(fields.prompt) == 1 else f"prompt[{i}]"
        if isinstance(prompt, str):
            tokens = served.tokenizer.encode(prompt, add_special_tokens=fields.add_special_tokens)
            found.append(Prompt(_checked(tokens, served, param), prompt))
        else:
            found.append(Prompt(_checked(prompt, served, param)))
    return found


def render(fields: Conversation, served: Served, *, effort: str | None = None) -> Prompt:
    """The prompt that the chat template makes of a conversation; ApiError if it cannot."""
    settings = served.settings
    if fields.chat_template is not None and not settings.trust_request_chat_template:
        raise unsupported("chat_template", "bringing a template (--trust-request-chat-template)")
    begins = fields.add_generation_prompt
    if begins is None:
        begins = not fields.continue_final_message
    kwargs = dict(fields.chat_template_kwargs or {})
    if effort is not None:
        kwargs.setdefault("enable_thinking", effort != "none")
    hidden = (
        isinstance(fields, Chat)
        and fields.tool_choice == "none"
        and settings.exclude_tools_when_none
    )
    tools = [] if hidden else fields.tools or []
    try:
        rendered = render_prompt(
            served.tokenizer,
            fields.messages,
            tools=[tool.model_dump(exclude_unset=True) for tool in tools] or None,
            add_generation_prompt=begins,
            continue_final_message=fields.continue_final_message,
            add_special_tokens=fields.add_special_tokens,
            template=fields.chat_template,
            **kwargs,
        )
    except (ValueError, TypeError) as e:
        said = one_line(e)
        named = re.match(r"(messages|tools|chat_template|continue_final_message)[\w.\[\]]*", said)
        raise invalid(said, named[0] if named else "messages") from None
    tokens = _checked(rendered.tokens, served, "messages")
    return Prompt(tokens, rendered.text, rendered.cuts, rendered.thinking)


def ask(
    fields: Completion | Chat,
    prompts: list[Prompt],
    served: Served,
    *,
    request_id: str,
    constrain: Callable[[], Constraint] | None = None,
) -> Ask:
    """What is asked of the engine.

    Args:
      fields: of the request.
      prompts: its prompts.
      served: the model.
      request_id: for a request that brings none.
      constrain: makes the constraint of each choice.

    Raises:
      ApiError: fields that contradict each other or what is served.
    """
    alias = served.alias(fields.model)
    check(fields, served)
    if constrain is not None:
        for name in ("min_tokens", "allowed_token_ids"):
            if getattr(fields, name):  # nothing might be left to choose
                raise unsupported(name, "it together with structured output")
    num_iter = _num_iter(fields, served, alias)
    prompts = [_truncated(prompt, fields, served) for prompt in prompts]
    seed = served.seeds.getrandbits(32) if fields.seed is None else fields.seed
    sampling = _sampling(fields, served)
    ends = [] if fields.ignore_eos else [*served.ends]
    ends = list(dict.fromkeys([*ends, *fields.stop_token_ids]))[:END_IDS]
    scored = _scored(fields)
    requests = []
    for place, prompt in enumerate(prompts):
        param = "prompt" if len(prompts) == 1 else f"prompt[{place}]"
        limit = _limit(fields, len(prompt.tokens), served, param)
        if fields.min_tokens > limit:
            raise invalid(f"min_tokens: more than the {limit} of max_tokens", "min_tokens")
        for i in range(fields.n):
            constraint = None if constrain is None else constrain()
            if fields.allowed_token_ids is not None:
                allowed = [*fields.allowed_token_ids, *ends]
                constraint = Allowed(allowed, served.config.vocab_size, constraint)
            requests.append(
                Request(
                    prompt.tokens,
                    limit,
                    dataclasses.replace(sampling, seed=(seed + i) % 2**32),
                    ends,
                    num_iter,
                    min_new_tokens=fields.min_tokens,
                    top_logprobs=alternatives(fields) or 0,
                    prompt_logprobs=scored,
                    priority=fields.priority,
                    cuts=prompt.cuts,
                    namespace=fields.cache_salt or "",
                    constraint=constraint,
                )
            )
    name = fields.request_id or request_id
    effective = num_iter if num_iter is not None else getattr(served.config.gka, "num_iter", None)
    return Ask(
        fields,
        f"{'chatcmpl' if isinstance(fields, Chat) else 'cmpl'}-{name}",
        name,
        fields.model or served.names[0],
        int(time.time()),
        prompts,
        requests,
        served.fingerprint if effective is None else f"{served.fingerprint}-{effective}",
    )


def structured(fields: Completion | Chat) -> dict[str, Any] | None:
    """The grammar that the answer has to keep to, if one is asked for; ApiError if it cannot be."""
    given: dict[str, Any] = {}
    for name in ("response_format", "structured_outputs"):
        value = getattr(fields, name)
        if value is not None:
            given[name] = value.model_dump(by_alias=True, exclude_none=True)
    if isinstance(fields, Chat) and fields.tools:
        choice = fields.tool_choice
        given["tools"] = [tool.model_dump(exclude_unset=True) for tool in fields.tools]
        given["tool_choice"] = choice.model_dump() if isinstance(choice, NamedFunction) else choice
        if "parallel_tool_calls" in fields.model_fields_set:
            given["parallel_tool_calls"] = fields.parallel_tool_calls
    try:
        return structured_output(**given)
    except ValueError as e:
        raise invalid(str(e), str(e).split(" ")[0].split(".")[0].rstrip(":")) from None


def alternatives(fields: Generation) -> int | None:
    """How many of the most likely tokens are told at each place; None: no log-probabilities."""
    if isinstance(fields, Chat):
        return (fields.top_logprobs or 0) if fields.logprobs else None
    assert isinstance(fields, Completion)
    return fields.logprobs


def check(fields: Generation, served: Served) -> None:
    """Raises ApiError for fields that contradict each other, or that are not to be had."""
    if fields.best_of not in (None, fields.n):
        raise unsupported("best_of", "anything but the value of n")
    most = min(128, served.settings.slots)
    if fields.n > most:
        raise invalid(f"n: must be at most {most}, which run at a time, not {fields.n}", "n")
    if fields.n > 1 and _temperature(fields, served) < GREEDY:
        raise invalid("n: several choices would be the same with temperature 0", "n")
    if fields.stream_options is not None and not fields.stream:
        raise invalid("stream_options: only with stream", "stream_options")
    for name, given in (
        ("use_beam_search", fields.use_beam_search),
        ("logits_processors", fields.logits_processors),
        ("prompt_embeds", fields.prompt_embeds),
        ("suffix", fields.suffix),
    ):
        if given:
            raise unsupported(name, "it")
    if fields.truncation_side != "left":
        raise unsupported("truncation_side", "anything but left")
    served.check_ids([int(token) for token in fields.logit_bias or ()], "logit_bias")
    served.check_ids(fields.allowed_token_ids or [], "allowed_token_ids")
    served.check_ids(fields.stop_token_ids, "stop_token_ids")
    if isinstance(fields, Chat):
        _check_chat(fields)
    elif isinstance(fields, Completion):
        if fields.prompt_logprobs is not None and fields.stream:
            raise unsupported("prompt_logprobs", "it together with stream")
        if fields.max_tokens == 0 and not fields.echo:
            raise invalid("max_tokens: must be at least 1, unless echo is set", "max_tokens")


def _check_chat(fields: Chat) -> None:
    if fields.top_logprobs is not None and not fields.logprobs:
        raise invalid("top_logprobs: only with logprobs", "top_logprobs")
    choice = fields.tool_choice
    if choice in (None, "none", "auto"):
        return
    if not fields.tools:
        raise invalid("tool_choice: there are no tools", "tool_choice")
    names = [tool.function.name for tool in fields.tools]
    if isinstance(choice, NamedFunction) and choice.name not in names:
        raise invalid(f"tool_choice: there is no tool {choice.name!r}", "tool_choice")


def _checked(tokens: list[int], served: Served, param: str) -> list[int]:
    if not tokens:
        raise invalid(f"{param}: is empty; at least one token is needed", param)
    served.check_ids(tokens, param)
    return tokens


def _truncated(prompt: Prompt, fields: Completion | Chat, served: Served) -> Prompt:
    most = fields.truncate_prompt_tokens
    if most is None:
        return prompt
    if most == 0 or most > served.length:
        raise invalid(
            f"truncate_prompt_tokens: must be -1, or 1 to {served.length}, not {most}",
            "truncate_prompt_tokens",
        )
    if most == -1:
        most = max(served.length - (_most_new(fields)[0] or 1), 1)
    if len(prompt.tokens) <= most:
        return prompt
    return Prompt(prompt.tokens[-most:], thinking=prompt.thinking)


def _most_new(fields: Completion | Chat) -> tuple[int | None, str]:
    """Most new tokens that the client wants, None: it does not say; and the field that says so."""
    if isinstance(fields, Chat) and fields.max_completion_tokens is not None:
        return fields.max_completion_tokens, "max_completion_tokens"
    return fields.max_tokens, "max_tokens"


def _limit(fields: Completion | Chat, length: int, served: Served, param: str) -> int:
    """Most new tokens after a prompt of this length."""
    (most, name), room = _most_new(fields), served.length - length
    if isinstance(fields, Chat):
        param = "messages"
    if room < 1:
        raise invalid(
            f"{param}: {length} tokens leave no room for an answer; this model takes at most "
            f"{served.length} tokens, prompt and answer together",
            param,
            "context_length_exceeded",
        )
    if most is None:
        return room if isinstance(fields, Chat) else min(16, room)
    if most > room:
        raise invalid(
            f"{name}: {most} after a prompt of {length} tokens are too many; this model takes "
            f"at most {served.length} tokens, prompt and answer together",
            name,
            "context_length_exceeded",
        )
    return most


def _temperature(fields: Generation, served: Served) -> float:
    if fields.temperature is not None:
        return fields.temperature
    return served.defaults.settings.get("temperature", 1.0)


def _sampling(fields: Generation, served: Served) -> SamplingParams:
    def said(name: str, otherwise: float) -> Any:
        value = getattr(fields, name)
        return served.defaults.settings.get(name, otherwise) if value is None else value

    temperature = _temperature(fields, served)
    bias = {int(token): value for token, value in (fields.logit_bias or {}).items()}
    return SamplingParams(
        temperature=0.0 if temperature < GREEDY else temperature,
        top_k=max(said("top_k", 0), 0),
        top_p=said("top_p", 1.0),
        min_p=said("min_p", 0.0),
        repetition_penalty=said("repetition_penalty", 1.0),
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        logit_bias={**bias, **_bad_words(fields, served)},
    )


def _bad_words(fields: Generation, served: Served) -> dict[int, float]:
    """Biases that keep words away; they are single tokens, with and without a blank before."""
    found: dict[int, float] = {}
    for i, word in enumerate(fields.bad_words or ()):
        own, after_blank = (
            served.tokenizer.encode(text, add_special_tokens=False)
            for text in (word, f" {word.lstrip()}")
        )
        if len(own) != 1:
            raise unsupported(f"bad_words[{i}]", f"{word!r}, which is {len(own)} tokens,")
        found |= {ids[0]: NEVER for ids in (own, after_blank) if len(ids) == 1}
    return found


def _num_iter(fields: Generation, served: Served, alias: Mapping[str, int]) -> int | None:
    """Iterations of GKA layers; None: the model's own."""
    value, param = fields.num_iter, "num_iter"
    if value is None and "num_iter" in (fields.vllm_xargs or {}):
        value, param = (fields.vllm_xargs or {})["num_iter"], "vllm_xargs.num_iter"
        if type(value) is not int or not 0 <= value <= 1000:
            raise invalid(f"{param}: must be a whole number from 0 to 1000", param)
    if value is None:
        return alias.get("num_iter")
    try:
        served.config.check_num_iter(value)
    except ValueError as e:
        raise invalid(f"{param}: {e}", param) from None
    return value


def _scored(fields: Generation) -> int | None:
    """How many most likely tokens are told at each place of the prompt; None: no scores."""
    if not isinstance(fields, Completion):
        return None
    wanted = [fields.prompt_logprobs, fields.logprobs if fields.echo else None]
    if fields.max_tokens == 0:
        wanted.append(0)
    return max((n for n in wanted if n is not None), default=None)
