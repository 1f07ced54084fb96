"""Text to learn remembering from: facts, then something else, then questions about the facts.

    Gove has 47. Lida likes tea. Remo has 20. the old cat sees a red bird. 12+7=19. my dog ...
    Q: Remo?
    A: Remo has 20.
    Q: Gove?
    A: Gove has 47.

Names and numbers are drawn at random: nothing of an answer can be known but from its fact. Two more
kinds of rows teach the parts of the skill: dense pairs ("k4 b7 k4 ...", with longer keys and values
"gov=31 kem=80 ..."), where a repeated key calls for its value, and copies of random words. Tokens
are bytes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

END = "<|im_end|>"  # ends an answer
PAD = "<|endoftext|>"
END_ID, PAD_ID, VOCAB_SIZE = 256, 257, 264
_END_BYTE = "\x03"  # stands for END until the text becomes tokens

# The rows above are conversations in this template: the facts are the system message.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' %}Q: {{ message.content }}
{% elif message.role == 'assistant' %}A: {{ message.content }}<|im_end|>
{% else %}{{ message.content }}
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}A: {% endif -%}"""

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
NAMES = [
    a.upper() + b + c + d
    for a in _CONSONANTS
    for b in _VOWELS
    for c in _CONSONANTS
    for d in _VOWELS
]
NUMBERS = [str(n) for n in range(10, 100)]
THINGS = ["tea", "figs", "rain", "snow", "jazz", "salt", "maps", "rice"]
_NOUNS = ["the old cat", "a red bird", "the king", "my dog", "a small boy", "her ship", "the moon"]
_VERBS = ["sees", "finds", "follows", "hears", "takes", "wants"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Rows(NamedTuple):
    """Rows of T tokens.

    Attributes:
      tokens: [N, T] int32.
      weights: [N, T] float32: 1 for what is to be recalled from earlier in the row, else less.
    """

    tokens: np.ndarray
    weights: np.ndarray


class Questions(NamedTuple):
    """One question per row, asked of a context: feed context, then question, and compare.

    Attributes:
      context: [N, T] int32, facts and filler.
      question: [N, Q] int32, a question and its answer.
      answer: [Q] bool, where the two digits of the answer are.
    """

    context: np.ndarray
    question: np.ndarray
    answer: np.ndarray


def build_tokenizer() -> Any:
    """The tokenizer, in Hugging Face's format: token i is byte i; END and PAD follow.

    Any text encodes and decodes exactly.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The byte-level alphabet shows printable bytes as themselves, the others as U+0100, U+0101, ...
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in shown]
    vocab = {chr(b if b in shown else 256 + others.index(b)): b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, PAD])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode(text: str) -> np.ndarray:
    """The tokens of an ASCII text, [N] int32."""
    tokens = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int32)
    return np.where(tokens == ord(_END_BYTE), END_ID, tokens)


def decode(tokens: Sequence[int]) -> str:
    """The text of tokens up to the first one that is no byte, the end of an answer."""
    end = next((i for i, t in enumerate(tokens) if t > 255), len(tokens))
    return bytes(tokens[:end]).decode("latin-1")


def rows(rng: random.Random, count: int, length: int, level: int) -> Rows:
    """Training rows of `length` tokens (at least 64).

    Args:
      rng: where they come from; equal states give equal rows.
      level: 0: pairs of one letter and one digit; 1: pairs of every kind; 2: everything. Where a
        value comes later than its key, so that B'MOJO-F can know it: 3: pairs "k==4"; 4: pairs
        "gov has 31"; 5: number facts, questions at once; 6: facts, filler, questions. At levels 3
        to 5 what is not recalled hardly counts (0.02).
    """
    texts, weights = [], []
    for _ in range(count):
        text, known = _row(rng, length, level)
        texts.append(text[:length])
        weights.append(known[:length])
    tokens = encode("".join(texts)).reshape(count, length)
    other = 0.02 if 3 <= level <= 5 else 0.1
    return Rows(tokens, np.where(np.array(weights, bool), 1.0, other).astype(np.float32))


def questions(rng: random.Random, count: int, length: int, facts: int, gap: int) -> Questions:
    """Contexts of `length` tokens: number facts, filler of at least `gap` tokens, one question.

    Raises ValueError if they do not fit.
    """
    contexts, asked = [], []
    for _ in range(count):
        text, known = context(rng, length, facts, gap)
        contexts.append(text + "\n")
        asked.append("".join(ask(rng.choice(known))))
    question = encode("".join(asked)).reshape(count, -1)
    answer = np.zeros(question.shape[1], bool)
    first = asked[0].index(" has ") + len(" has ")
    answer[first : first + 2] = True
    return Questions(encode("".join(contexts)).reshape(count, length), question, answer)


def context(
    rng: random.Random, length: int, facts: int, gap: int
) -> tuple[str, list[tuple[str, str, str]]]:
    """Number facts, then filler of at least `gap` tokens, length - 1 tokens in all; the facts as
    (name, "has", number).

    Raises ValueError if they do not fit.
    """
    known = [(name, "has", rng.choice(NUMBERS)) for name in rng.sample(NAMES, facts)]
    text = "".join(map(_sentence, known))
    if len(text) + gap > length:
        raise ValueError(f"{facts} facts and a gap of {gap} do not fit into {length} tokens.")
    return text + _filler(rng, length - len(text) - 1), known


def _row(rng: random.Random, length: int, level: int) -> tuple[str, list[int]]:
    """A text of at least `length` characters, and for each whether it is to be recalled."""
    if level == 0:
        return _pairs(rng, length, 1, 1, "")
    if level == 3:
        return _pairs(rng, length, 1, 1, "==")
    if level == 4:
        return _pairs(rng, length, rng.randint(1, 3), rng.randint(1, 2), " has ")
    if level > 4:
        return _recall(rng, length, plain=level == 5)
    kind = rng.random()
    if level == 2 and kind < 0.6:
        return _recall(rng, length)
    if level == 2 and kind < 0.7:
        return _copies(rng, length)
    if kind < 0.8:
        return _pairs(rng, length, 1, 1, "")
    separator = rng.choice(["", "=", " has "])
    return _pairs(rng, length, rng.randint(1, 3), rng.randint(1, 2), separator)


def _pairs(
    rng: random.Random, length: int, key: int, value: int, separator: str
) -> tuple[str, list[int]]:
    size = key + len(separator) + value + 1
    most = max(3, min(24, 26**key // 2, length // size // 3))
    table: dict[str, str] = {}
    for _ in range(rng.randint(2, most)):
        name = "".join(rng.choices(_LETTERS, k=key))
        table[name] = "".join(rng.choices("0123456789", k=value))
    keys = list(table)
    text, known, seen = "", [], set()
    while len(text) < length:
        rng.shuffle(keys)
        for name in keys:
            text += name + separator + table[name] + " "
            known += [0] * (key + len(separator)) + [int(name in seen)] * value + [0]
            seen.add(name)
    return text, known


def _copies(rng: random.Random, length: int) -> tuple[str, list[int]]:
    size = rng.randint(6, length // 3)
    text = "".join(rng.choices(_LETTERS + "  ", k=size)) + "|"
    repeats = length // len(text) + 1
    return text * repeats, ([0] * len(text) + [1] * (len(text) * (repeats - 1)))


def _recall(rng: random.Random, length: int, plain: bool = False) -> tuple[str, list[int]]:
    """Facts (some filler between them), filler, questions about each fact until the row is full.

    plain: number facts only, no filler, and only digits are to be recalled.
    """
    most = max(2, length // (32 if plain else 40))
    facts = []
    for name in rng.sample(NAMES, rng.randint(2, most)):
        number = plain or rng.random() < 0.75
        relation, values = ("has", NUMBERS) if number else ("likes", THINGS)
        facts.append((name, relation, rng.choice(values)))
    told = [_sentence(fact) for fact in facts]
    gap = 0 if plain else rng.randint(0, max(0, length - sum(map(len, told)) - 60))
    early = rng.randint(0, gap) if rng.random() < 0.3 else 0
    told.insert(rng.randint(0, len(told)), _filler(rng, early) + " " * (early > 0))
    text = "".join(told) + _filler(rng, gap - early) + "\n"
    known = [0] * len(text)
    while len(text) < length:
        for fact in rng.sample(facts, len(facts)):
            before, answer, after = ask(fact)
            text += before + answer + after
            asked = [int(c.isdigit() or not plain) for c in answer]
            known += [0] * len(before) + asked + [0] * len(after)
    return text, known


def _sentence(fact: tuple[str, str, str]) -> str:
    return "{} {} {}. ".format(*fact)


def ask(fact: tuple[str, str, str]) -> tuple[str, str, str]:
    """The question, with the name that the answer begins with, what is to be recalled, the end."""
    name, relation, value = fact
    return f"Q: {name}?\nA: {name} ", f"{relation} {value}", f".{_END_BYTE}\n"


def _filler(rng: random.Random, size: int) -> str:
    """Sentences and sums, exactly `size` characters."""
    out = ""
    while len(out) < size:
        if rng.random() < 0.15:
            a, b = rng.randint(1, 49), rng.randint(1, 49)
            out += f"{a}+{b}={a + b}. "
        else:
            out += f"{rng.choice(_NOUNS)} {rng.choice(_VERBS)} {rng.choice(_NOUNS)}. "
    return out[:size]
