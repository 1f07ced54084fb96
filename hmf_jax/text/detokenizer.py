"""Tokens become text piece by piece, and stop strings end it."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

LONGEST_STOP = 1000  # characters
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token of a byte-fallback tokenizer
_REPLACEMENT = "\ufffd"


class Place(NamedTuple):
    """Where a token that was watched for is in the text: [start, end), empty if it has no text."""

    token: int
    start: int
    end: int


class TextStream:
    """Turns the tokens of one row into text, piece by piece.

    The pieces do not depend on how the tokens were grouped. Together they are `text`, which is what
    `tokenizer.decode(tokens, skip_special_tokens=not special)` makes of all tokens at once, cut at
    the stop string. A character whose bytes are spread over several tokens appears once it is
    complete, and text that may be the beginning of a stop string is held back until that is
    decided.

    Args:
      tokenizer: a Hugging Face tokenizer.
      stop: generation ends before the first of these strings to be completed. They may be or hold
        special tokens, which have no text otherwise.
      end_ids: tokens that have no text.
      watch: tokens whose places in the text are wanted, and their text.
      special: special tokens have a text, too.
      keep_stop: the text ends with the stop string instead of before it.

    Attributes:
      text: all pieces so far.
      tokens, logprobs: all that was pushed, up to the token that completed a stop string.
      stop: the stop string that was completed, else None.
      places: of the tokens that were watched for, in order; they may lie beyond `text` as yet.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: str | Sequence[str] | None = (),
        end_ids: Sequence[int] = (),
        watch: Mapping[int, str] | None = None,
        *,
        special: bool = False,
        keep_stop: bool = False,
    ):
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.stop: str | None = None
        self.places: list[Place] = []
        self._tokenizer, self._watch = tokenizer, dict(watch or {})
        self._stop, self._keep_stop = check_stop(stop), keep_stop
        self._silent = set(end_ids) if special else _special_ids(tokenizer) | set(end_ids)
        self._decoder = _Decoder(tokenizer, special)
        self._cleaner = _Cleaner(tokenizer) if _cleans_up(tokenizer) else None
        self._length = 0  # characters that have left the decoder and the cleaner
        self._held = ""  # of them, and of tokens without text: perhaps the start of a stop string
        self._shown: list[bool] = []  # for each character of `_held`, whether it is text

    @property
    def stopped(self) -> bool:
        """Whether a stop string was completed."""
        return self.stop is not None

    @property
    def decoded(self) -> int | None:
        """Characters so far, with those that are held back; None inside of a character."""
        return None if self._decoder.waits else self._length

    def push(self, tokens: Sequence[int], logprobs: Sequence[float]) -> str:
        """Add tokens; the text that is certain now. What follows a stop string is ignored."""
        out = ""
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.stopped:
                break
            self.tokens.append(token)
            self.logprobs.append(logprob)
            out += self._add(token)
        self.text += out
        return out

    def finish(self) -> str:
        """The rest of the text, once no more tokens will come."""
        if self.stopped:
            return ""
        rest = self._scan(self._clean(self._decoder.finish(), last=True))
        rest += "".join(itertools.compress(self._held, self._shown))
        self._held, self._shown = "", []
        self.text += rest
        return rest

    def _add(self, token: int) -> str:
        watched = self._watch.get(token)
        if token not in self._silent:
            new = self._clean(self._decoder.push(token), last=watched is not None)
            if watched is not None:
                start = self._length - (len(watched) if new.endswith(watched) else len(new))
                self.places.append(Place(token, start, self._length))
            return self._scan(new)
        out = self._scan(self._clean("", last=True)) if watched is not None else ""
        if watched is not None:
            self.places.append(Place(token, self._length, self._length))
        if self._stop and not self.stopped:
            hidden = self._tokenizer.decode([token], skip_special_tokens=False)
            out += self._scan(hidden, shown=False)
        return out

    def _clean(self, new: str, last: bool = False) -> str:
        if self._cleaner is not None:
            new = self._cleaner.push(new, last)
        self._length += len(new)
        return new

    def _scan(self, piece: str, shown: bool = True) -> str:
        if not self._stop:
            return piece if shown else ""
        self._held += piece
        self._shown += [shown] * len(piece)
        found = [(i + len(s), i, s) for s in self._stop if (i := self._held.find(s)) >= 0]
        if found:
            end, start, self.stop = min(found)
            cut = end if self._keep_stop else start
        else:
            cut = len(self._held) - max(beginning(self._held, s) for s in self._stop)
        out = "".join(itertools.compress(self._held[:cut], self._shown))
        self._held, self._shown = self._held[cut:], self._shown[cut:]
        return out


class _Decoder:
    """Text of tokens that come one by one.

    A few tokens are decoded again with every new one, since a decoder may treat the first token
    differently (a leading space is dropped), or join the bytes of several.

    `tokenizer.decode` takes byte tokens in a row together: if they are no UTF-8, every one of them
    becomes a replacement character. Here characters of the row that were complete before stay.
    """

    def __init__(self, tokenizer: Any, special: bool = False):
        self._tokenizer, self._special = tokenizer, special
        self.waits = False  # for the rest of a character
        self._window: list[int] = []  # the newest tokens; decoding needs one or more before them
        self._sent = 0  # characters of the decoded window that were given
        self._row = _ByteRow()
        # What is behind a tokenizer decodes some times quicker, and the same, unless the tokenizer
        # has its own way to decode.
        own = getattr(getattr(type(tokenizer), "_decode", None), "__module__", "")
        plain = own.startswith("transformers.tokenization_utils")
        self._backend = getattr(tokenizer, "backend_tokenizer", None) if plain else None
        self._strings: dict[int, str | None] = {}

    def push(self, token: int) -> str:
        string = self._string(token)
        if string is None:  # beyond the vocabulary of the tokenizer: decoders leave it out
            return ""
        self._window.append(token)
        self.waits = True
        if _BYTE.fullmatch(string):
            if self._row.push(int(string[1:-1], 16)):
                self.waits = False
                return self._give(self._row.width)
            if self._row.broken:
                self._leave_characters()
            return ""
        self._row = _ByteRow()
        text = self._decode(self._window)
        # What ends with an unfinished character decodes to one replacement character there.
        certain = text.removesuffix(_REPLACEMENT)
        if certain == text:
            self.waits = False
            return self._give(1, text)
        new, self._sent = certain[self._sent :], max(self._sent, len(certain))
        if len(self._window) > 8:  # an unfinished character is in the last three tokens
            self._window = self._window[-4:]
            self._sent = len(self._decode(self._window).removesuffix(_REPLACEMENT))
        return new

    def finish(self) -> str:
        if self._row.waits:
            self._leave_characters()
        rest = self._decode(self._window)[self._sent :] if self._window else ""
        self._window, self._sent, self._row, self.waits = [], 0, _ByteRow(), False
        return rest

    def _give(self, keep: int, text: str | None = None) -> str:
        """All that was not given; the last tokens stay as what the next ones are decoded with."""
        text = self._decode(self._window) if text is None else text
        new, self._window = text[self._sent :], self._window[-keep:]
        self._sent = len(self._decode(self._window))
        return new

    def _leave_characters(self) -> None:
        """Bytes that are no character must not be decoded together with those of one."""
        if self._row.width:
            self._window, self._sent = self._window[self._row.width :], 0
            self._row.width = 0

    def _decode(self, tokens: list[int]) -> str:
        if self._backend is not None:
            return self._backend.decode(tokens, skip_special_tokens=not self._special)
        return self._tokenizer.decode(
            tokens, skip_special_tokens=not self._special, clean_up_tokenization_spaces=False
        )

    def _string(self, token: int) -> str | None:
        if token not in self._strings:
            try:
                self._strings[token] = self._tokenizer.convert_ids_to_tokens(token)
            except (IndexError, KeyError):  # of tokenizers that are written in Python
                self._strings[token] = None
        return self._strings[token]


class _ByteRow:
    """Bytes one after the other.

    Attributes:
      width: bytes of the newest character.
      waits: bytes after it that are none as yet.
      broken: they never will be.
    """

    def __init__(self) -> None:
        self.width = self.waits = 0
        self.broken = False
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def push(self, byte: int) -> bool:
        """Whether this byte completes a character."""
        self.waits += 1
        try:
            complete = not self.broken and bool(self._decoder.decode(bytes([byte])))
        except UnicodeDecodeError:
            self.broken, complete = True, False
        if complete:
            self.width, self.waits = self.waits, 0
        return complete


class _Cleaner:
    """`clean_up_tokenization` of a text that comes in pieces.

    What it replaces begins with a space and has at most four characters, so a text may be cut where
    none of the three characters before is a space.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._held = tokenizer, ""

    def push(self, piece: str, last: bool) -> str:
        self._held += piece
        held = self._held
        ends = (n for n in range(len(held), 2, -1) if " " not in held[n - 3 : n])
        cut = len(held) if last else next(ends, 0)
        self._held = held[cut:]
        return self._tokenizer.clean_up_tokenization(held[:cut])


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple; ValueError if one is empty, too long, or no string."""
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple | set | frozenset):
        raise ValueError(f"stop={stop!r}: give a string, or a list of strings.")
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"stop={stop!r}: stop strings must be non-empty strings.")
    for s in stops:
        if len(s) > LONGEST_STOP:
            raise ValueError(
                f"a stop string has {len(s)} characters; at most {LONGEST_STOP} are allowed."
            )
    return tuple(dict.fromkeys(stops))


def beginning(text: str, whole: str) -> int:
    """How many characters at the end of the text begin another one, which is longer."""
    most = min(len(text), len(whole) - 1)
    return next((n for n in range(most, 0, -1) if whole.startswith(text[-n:])), 0)


def _special_ids(tokenizer: Any) -> set[int]:
    """Tokens that decoding skips when it is asked to skip special tokens."""
    if getattr(tokenizer, "is_fast", False):
        added = tokenizer.added_tokens_decoder
        return {id for id, token in added.items() if token.special}
    return set(getattr(tokenizer, "all_special_ids", ()))


def _cleans_up(tokenizer: Any) -> bool:
    """Whether `tokenizer.decode` removes spaces before punctuation, if it is not told."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    if getattr(tokenizer, "is_fast", False):  # it would damage the text of BPE tokenizers
        bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
        forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        return not bpe or bool(getattr(tokenizer, forced, False))
    return True
