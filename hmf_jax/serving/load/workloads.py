"""Plans to choose from: prompts of one length, chats of many turns, a mixture of everything.

Each function returns the calls of each user, for `Plan`; equal seeds give equal calls. Texts are
words; prompts of an exact length are lists of token ids, which every byte-level vocabulary has.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hmf_jax.serving.load.call import CHAT, COMPLETIONS, Call
from hmf_jax.serving.load.client import Client
from hmf_jax.serving.load.reply import Reply

_WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work night point "
    "home water room mother area money story fact month lot right study book eye job word side"
).split()
_IDS = range(10, 90)
_STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def prompts(
    count: int,
    *,
    input_len: int,
    output_len: int,
    prefix_len: int = 0,
    seed: int = 0,
    fields: Mapping[str, Any] | None = None,
) -> list[list[Call]]:
    """`count` prompts of `input_len` random token ids, answered by `output_len` tokens each.

    Args:
      prefix_len: so many of the first ids are the same in all prompts.
      fields: more of the request, such as {"model": "default", "temperature": 0}.

    Raises ValueError if the prefix is no part of the prompt.
    """
    if not 0 <= prefix_len <= input_len or input_len < 1:
        raise ValueError(
            f"prefix_len={prefix_len} must be within input_len={input_len} (1 or more)."
        )
    rng = random.Random(seed)
    prefix = rng.choices(_IDS, k=prefix_len)
    body = _STREAM | {"max_tokens": output_len, "ignore_eos": True} | dict(fields or {})
    return [
        [Call(body | {"prompt": prefix + rng.choices(_IDS, k=input_len - prefix_len)}, COMPLETIONS)]
        for _ in range(count)
    ]


def chats(
    users: int,
    turns: int,
    *,
    words: int,
    output_len: int,
    system_words: int = 0,
    seed: int = 0,
    fields: Mapping[str, Any] | None = None,
) -> list[list[Call]]:
    """Users who chat: each message has `words` words, and each turn sends the whole conversation.

    Args:
      system_words: length of the system message, the same for all users.
      fields: more of the request.
    """
    rng = random.Random(seed)
    body = _STREAM | {"max_tokens": output_len, "ignore_eos": True} | dict(fields or {})
    system = text(rng, system_words)

    def calls() -> list[Call]:
        said = [text(rng, words) for _ in range(turns)]
        return [Call(functools.partial(_turn, body, system, said)) for _ in range(turns)]

    return [calls() for _ in range(users)]


def _turn(
    body: Mapping[str, Any], system: str, said: Sequence[str], earlier: Sequence[Reply]
) -> Mapping[str, Any]:
    """The next request of a conversation."""
    messages = [{"role": "system", "content": system}] if system else []
    for mine, reply in zip(said, earlier, strict=False):
        messages.append({"role": "user", "content": mine})
        messages.append({"role": "assistant", "content": reply.choices[0].text})
    return {**body, "messages": [*messages, {"role": "user", "content": said[len(earlier)]}]}


def text(rng: random.Random, words: int) -> str:
    """So many random words."""
    return " ".join(rng.choices(_WORDS, k=words))


async def tokens_per_word(client: Client, fields: Mapping[str, Any] | None = None) -> float:
    """How many tokens a word of `text` has for the model behind a server, by asking it.

    Raises ValueError if it does not answer.
    """
    rng, counts = random.Random(0), []
    for words in (8, 32):
        message = {"role": "user", "content": text(rng, words)}
        call = Call({"messages": [message], "max_tokens": 1, **(fields or {})})
        reply = await client.send(call)
        if not reply.ok:
            raise ValueError(f"the server does not answer a chat: {reply.problems or reply.error}")
        counts.append(reply.prompt_tokens)
    return max((counts[1] - counts[0]) / 24, 0.1)


def mixture(
    count: int,
    *,
    longest: int = 900,
    output_len: int = 64,
    most_choices: int = 3,
    num_iters: Sequence[int] = (),
    faults: float = 0.0,
    seed: int = 0,
    text: Callable[[random.Random, int], str] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> list[list[Call]]:
    """Requests of all kinds: chat and completions, streamed and not, greedy and seeded, one choice
    and several, long and short, most of them with a shared beginning.

    Args:
      longest: most characters of a prompt.
      output_len: most new tokens.
      most_choices: `n` is at most that.
      num_iters: solver iterations to choose from, for models with GKA layers.
      faults: this fraction of the clients closes its connection early; one in six of these reads
        nothing at all.
      text: makes a prompt's text of about so many characters; by default words.
      fields: more of every request; `about` of a call is its number.
    """
    rng = random.Random(seed)
    make = text or _words
    shared = [make(rng, size) for size in (longest // 4, longest // 2, longest * 3 // 4)]
    return [
        [_mixed(rng, i, make, shared, longest, output_len, most_choices, num_iters, faults, fields)]
        for i in range(count)
    ]


def _mixed(
    rng: random.Random,
    number: int,
    make: Callable[[random.Random, int], str],
    shared: Sequence[str],
    longest: int,
    output_len: int,
    most_choices: int,
    num_iters: Sequence[int],
    faults: float,
    fields: Mapping[str, Any] | None,
) -> Call:
    prefix = rng.choice(shared) if rng.random() < 0.6 else ""
    prompt = prefix + make(rng, rng.randint(1, max(1, longest - len(prefix))))
    greedy, n = rng.random() < 0.4, rng.randint(1, most_choices)
    body: dict[str, Any] = {"max_tokens": rng.randint(1, output_len), **(fields or {})}
    if greedy:
        body |= {"temperature": 0}
    else:
        body |= {"temperature": rng.choice([0.5, 1.0]), "seed": rng.randrange(2**31), "n": n}
        body |= rng.choice([{}, {"top_p": 0.9}, {"top_k": 8}, {"min_p": 0.05}])
    if num_iters:
        body["num_iter"] = rng.choice(num_iters)
    fault = None
    if rng.random() < faults:
        closes = ["close_queued", "close_prefill", "close_first", "close_middle", "close_last"]
        fault = "never_read" if rng.random() < 1 / 6 else rng.choice([*closes, "close_end"])
    if rng.random() < 0.5 or fault in ("close_first", "close_middle", "close_last"):
        body |= _STREAM
    wait = rng.choice([0.01, 0.1, 0.5]) if fault != "never_read" else 1.0
    if rng.random() < 0.5:
        body["messages"] = [{"role": "user", "content": prompt}]
        return Call(body, CHAT, fault=fault, wait=wait, about=number)
    return Call(body | {"prompt": prompt}, COMPLETIONS, fault=fault, wait=wait, about=number)


def _words(rng: random.Random, size: int) -> str:
    return text(rng, size // 5 + 1)[:size]
