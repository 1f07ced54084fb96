"""Text in pieces is the text of one decode, with every kind of tokenizer; stop strings cut it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hmf_jax.text import TextStream, check_stop
from tests.text.tokenizers import KINDS

TOKENIZERS: dict[str, Any] = {name: make() for name, make in KINDS.items()}
TOKENIZER = TOKENIZERS["byte level"]
END = TOKENIZER.eos_token_id


def pieces_of(tokens: list[int], cuts: list[int], stop=(), end_ids=(), tokenizer=TOKENIZER):
    stream = TextStream(tokenizer, stop, end_ids)
    out, start = [], 0
    for cut in [*sorted({min(c, len(tokens)) for c in cuts}), len(tokens)]:
        out.append(stream.push(tokens[start:cut], [0.0] * (cut - start)))
        start = cut
    return [*out, stream.finish()], stream


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20), st.lists(st.integers(0, 60), max_size=6))
@example("naïve 😀 日本語", [1, 2, 7, 8, 9])
def test_pieces_are_whole_characters(text, cuts):
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    pieces, stream = pieces_of(tokens, cuts)
    assert "".join(pieces) == stream.text == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in p for p in pieces)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_any_tokens_give_the_text_of_one_decode(kind):
    """Bytes that are no UTF-8, special and added tokens, and ids that the tokenizer lacks."""
    tokenizer, rng = TOKENIZERS[kind], random.Random(0)
    for _ in range(300):
        tokens = [rng.randrange(len(tokenizer) + 3) for _ in range(rng.randrange(30))]
        if kind == "no backend":  # one that is written in Python knows its own ids only
            tokens = [token for token in tokens if token < len(tokenizer)]
        if "fallback" in kind:  # bytes of characters only; see below for others
            letters = [tokenizer.encode(c, add_special_tokens=False) for c in "aé日😀ÿ\n"]
            parts = [[t] if t > 256 else rng.choice(letters) for t in tokens]
            tokens = [token for part in parts for token in part]
        for size in (1, 7):
            pieces, _ = pieces_of(tokens, list(range(0, 30, size)), tokenizer=tokenizer)
            expected = tokenizer.decode(tokens, skip_special_tokens=True)
            assert "".join(pieces) == expected, tokens


def bytes_of(text: str | bytes) -> list[int]:
    """Byte tokens: <0x00> is token 1."""
    raw = text.encode() if isinstance(text, str) else text
    return [1 + byte for byte in raw]


def test_characters_of_byte_tokens_appear_when_they_are_whole():
    tokenizer = TOKENIZERS["byte fallback"]
    for tokens in (tokenizer.encode("a😀b", add_special_tokens=False), bytes_of("a😀b")):
        pieces, stream = pieces_of(tokens, list(range(6)), tokenizer=tokenizer)
        assert pieces == ["", "a", "", "", "", "😀", "b", ""] and stream.text == "a😀b"


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (bytes_of(b"\xff\x9f"), "\ufffd\ufffd"),
        ([260, *bytes_of(b"\xff"), *bytes_of("é"), 260], None),  # no UTF-8 from its first byte on
        ([260, *bytes_of("😀")[:3]], None),
        ([260, *bytes_of("\ufffd"), 260, *bytes_of("é"), *bytes_of("é")], None),
        # What was a character before stays one, other than when all is decoded at once.
        ([*bytes_of("é"), *bytes_of(b"\xff\xff"), 260, *bytes_of("é")], "é\ufffd\ufffd{}é"),
        ([*bytes_of("aé"), *bytes_of("😀")[:3]], "aé\ufffd\ufffd\ufffd"),
    ],
)
def test_bytes_that_are_no_character(tokens, text):
    tokenizer = TOKENIZERS["byte fallback"]
    pieces, _ = pieces_of(tokens, list(range(len(tokens))), tokenizer=tokenizer)
    word = tokenizer.decode([261, 260])[len(tokenizer.decode([261])) :]
    expected = tokenizer.decode(tokens) if text is None else text.format(word)
    assert "".join(pieces) == expected


def test_an_unfinished_character_at_the_end_is_shown():
    tokens = TOKENIZER.encode("a😀", add_special_tokens=False)[:-1]
    pieces, _ = pieces_of(tokens, [1, 2, 3])
    assert pieces[-1] == "\ufffd" and "".join(pieces) == TOKENIZER.decode(tokens)


class Counting:
    """Counts the tokens that its tokenizer decodes."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.count = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def decode(self, tokens: list[int], **options: Any) -> str:
        self.count += len(tokens)
        return self.tokenizer.decode(tokens, **options)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_work_grows_with_the_length_only(kind):
    """Ordinary text, and bytes that never become a character."""
    tokenizer = TOKENIZERS[kind]
    broken = "é" if kind == "byte level" else "ÿ"
    first = tokenizer.encode(broken, add_special_tokens=False)[:1]
    for tokens in (first * 600, tokenizer.encode("a b" * 200, add_special_tokens=False)):
        counting = Counting(tokenizer)
        pieces_of(tokens, list(range(len(tokens))), tokenizer=counting)
        assert counting.count < 20 * len(tokens)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(list(" .,'?!nmtsvera")), max_size=14))
@example(list("a n ' t"))
def test_spaces_before_punctuation_are_removed_as_in_one_decode(letters):
    from hmf_jax.text.detokenizer import _Cleaner

    tokenizer = TOKENIZERS["word piece"]
    cleaner = _Cleaner(tokenizer)
    pieces = [cleaner.push(letter, False) for letter in letters]
    whole = tokenizer.clean_up_tokenization("".join(letters))
    assert "".join(pieces) + cleaner.push("", True) == whole


# --- stop strings -----------------------------------------------------------------------------


def cut_at_stop(text: str, stops: list[str]) -> str:
    """Characters one by one; the first stop string to be completed ends the text before it."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=150, deadline=None)
@given(
    st.text("ab é", max_size=12),
    st.lists(st.text("ab é", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 16), max_size=5),
)
@example("xabcd", ["abcd", "bc"], [1, 2, 3])
@example("xabcd", ["abcd", "bc"], [])
@example("aab", ["ab"], [1, 2])
@example("b a", ["b a", " "], [])
def test_stop_strings_cut_exactly(text, stops, cuts):
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    pieces, stream = pieces_of(tokens, cuts, stops)
    expected = cut_at_stop(text, stops)
    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == (expected != text or any(text.endswith(s) for s in stops))
    shown = ""
    for piece in pieces:  # nothing shown is ever taken back
        shown += piece
        assert expected.startswith(shown)


def test_within_one_token_the_string_that_is_completed_first_wins():
    """ "b a" begins first, " " is completed first; here both are in one token."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = TOKENIZER.backend_tokenizer
    tokenizer = type(tokenizer).from_str(tokenizer.to_str())
    tokenizer.add_tokens(["b a"])
    wide = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    (token,) = wide.encode("b a")
    _, stream = pieces_of([token], [], ["b a", " "], tokenizer=wide)
    assert stream.text == "b" and stream.stopped


def test_a_stream_ends_at_the_token_that_completes_a_stop_string():
    tokens = TOKENIZER.encode("one\n\ntwo", add_special_tokens=False)
    _, stream = pieces_of(tokens, [], ["\n\n"])
    assert TOKENIZER.decode(stream.tokens) == "one\n\n" and stream.text == "one"
    assert len(stream.logprobs) == len(stream.tokens)


@pytest.mark.parametrize("cuts", [[], list(range(40))])
@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("<|im_start|>", "answer", "answer<|im_start|>"),  # a special token
        ("er<|im_start|>us", "answ", "answer<|im_start|>us"),  # with text around it
        ("<|im_start|><|im_start|>", "answeruser", None),  # twice: there is only one
        ("start", "answer", "answer<|im_start|>"),  # within its name
        ("useless", "answeruser", None),
    ],
)
def test_special_tokens_in_stop_strings(stop, text, tokens, cuts):
    ids = TOKENIZER.encode("answer<|im_start|>user", add_special_tokens=False)
    pieces, stream = pieces_of(ids, cuts, stop)
    assert "".join(pieces) == stream.text == text
    assert stream.stopped == (tokens is not None)
    if tokens is not None:
        assert TOKENIZER.decode(stream.tokens) == tokens


def test_end_tokens_have_no_text_but_may_be_in_stop_strings():
    letter = TOKENIZER.encode("z")[0]
    _, stream = pieces_of([letter, letter, END], [], end_ids=(letter,))
    assert stream.text == "" and len(stream.tokens) == 3
    ids = TOKENIZER.encode("yes\n<|im_end|>")
    _, stream = pieces_of(ids, [], "\n<|im_end|>", end_ids=(END,))
    assert stream.text == "yes" and stream.stopped


def test_what_a_stop_string_may_be():
    assert check_stop(None) == () and check_stop("ab") == ("ab",)
    assert check_stop(["a", "b", "a"]) == ("a", "b") == check_stop(("a", "b"))
    for stop in ("", ["a", ""], [None], b"a", 5, [b"a"], {"a": 1}):
        with pytest.raises(ValueError, match="stop"):
            check_stop(stop)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="has 1001 characters; at most 1000"):
        check_stop("a" * 1001)
