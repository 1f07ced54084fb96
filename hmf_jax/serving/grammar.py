"""Structured output: grammars that replies keep to. The only module that imports llguidance."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llguidance
import numpy as np

from hmf_jax.text.parts import CALL, END_CALL, END_THINK, TAGS
from hmf_jax.text.template import one_line
from hmf_jax.text.tokenizer import tag_ids

SECONDS = 10.0  # that compiling a grammar may take
KEPT = 256  # compiled grammars
LONGEST = 1 << 20  # characters of a grammar
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
# Between the parts of JSON: a model that does not know what to write could write blanks for ever.
_BLANKS = " "
_NOTHING = "there is nothing that satisfies it"
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_NO_ARGUMENTS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


def structured_output(
    *,
    response_format: Mapping[str, Any] | None = None,
    structured_outputs: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool = False,
) -> dict[str, Any] | None:
    """What `Grammars.compile` takes, out of the fields of a request; None: no grammar is asked for.

    Args:
      response_format: {"type": "text" | "json_object"}, or {"type": "json_schema", "json_schema":
        {"schema": ..., "strict": bool}}. Of a schema that is not strict, keywords that are not
        supported are left out.
      structured_outputs: exactly one of json (a schema, or its JSON text), regex, choice (a list of
        texts), grammar (in Lark's notation), json_object (true).
      tools: that the model may call.
      tool_choice: "required": it has to call one; {"name": ...} or {"function": {"name": ...}}: it
        has to call this one. With "auto" it may call one instead of what the others ask for.
      parallel_tool_calls: it may call several in one reply. Only if the request says so: a model
        that has to call a tool, and does not know when to stop, would call on until its limit.

    Raises:
      ValueError: names the field: of contradictory or unknown values.
    """
    found = _of_outputs(structured_outputs) if structured_outputs is not None else None
    if response_format is not None and response_format.get("type", "text") != "text":
        if found is not None:
            raise ValueError("structured_outputs and response_format: give one of them")
        found = _of_format(response_format)
    named = _name_of(tool_choice)
    if tool_choice == "required" or named is not None:
        if found is not None:
            raise ValueError(
                "tool_choice asks for a call of a tool, so response_format and structured_outputs "
                "cannot be kept to"
            )
        if not tools:
            raise ValueError("tool_choice asks for a call of a tool, but there are no tools")
        chosen = [tool for tool in tools if named in (None, _function(tool)["name"])]
        if not chosen:
            raise ValueError(f"tool_choice names {named!r}, which is not one of the tools")
        parallel = parallel_tool_calls and named is None
        return {"tools": [_function(tool) for tool in chosen], "parallel": parallel}
    if found is not None and tools and tool_choice != "none":
        functions = [_function(tool) for tool in tools]
        found |= {"tools": functions, "parallel": parallel_tool_calls}
    return found


def _of_outputs(outputs: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in outputs.items() if value is not None}
    if given.get("json_object") is False:
        del given["json_object"]
    if len(given) != 1 or not set(given) <= set(_KINDS):
        names = ", ".join(_KINDS)
        raise ValueError(f"structured_outputs must hold exactly one of {names}")
    return given


def _of_format(response_format: Mapping[str, Any]) -> dict[str, Any]:
    kind = response_format["type"]
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        raise ValueError(f"response_format.type={kind!r} must be text, json_object or json_schema")
    described = response_format.get("json_schema")
    if not isinstance(described, Mapping) or described.get("schema") is None:
        raise ValueError("response_format.json_schema.schema is missing")
    return {"json": described["schema"], "strict": described.get("strict") is True}


def _name_of(tool_choice: str | Mapping[str, Any] | None) -> str | None:
    if not isinstance(tool_choice, Mapping):
        return None
    return tool_choice.get("function", tool_choice).get("name")


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    return tool.get("function", tool)


class Grammars:
    """Compiles grammars for a tokenizer, and keeps the newest ones.

    Args:
      tokenizer: a fast Hugging Face tokenizer that works on bytes (most do).
      vocab_size: of the model; ids that the tokenizer does not have are never allowed.
      eos_ids: tokens that end a reply; they are allowed where the grammar is satisfied. None: that
        of the tokenizer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Sequence[int] | None = None):
        own = tokenizer.eos_token_id
        ends = ([] if own is None else [own]) if eos_ids is None else eos_ids
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, list(ends)
        self._tokens = _Tokens(tokenizer, vocab_size, self._ends)
        self._library: llguidance.LLTokenizer | None = None
        self._building = threading.Lock()
        self._kept: OrderedDict[bytes, llguidance.LLMatcher] = OrderedDict()
        # Its own threads: a grammar that hangs takes none of those that others need.
        self._pool = ThreadPoolExecutor(4, "grammar")

    async def compile(
        self, structured: Mapping[str, Any], *, thinking: bool = False
    ) -> Callable[[], Constraint]:
        """What makes a constraint for each reply that has to keep to the grammar.

        Args:
          structured: see `structured_output`.
          thinking: the prompt ends within a block of thinking: the grammar holds after it.

        Raises:
          ValueError: the grammar is wrong (with the library's message), has keywords that are not
            supported, does not suit the tokenizer, or takes more than 10 seconds.
        """
        text = json.dumps(structured)
        if len(text) > LONGEST:
            raise ValueError(f"the grammar has more than {LONGEST:,} characters")
        key = hashlib.blake2b(text.encode()).digest()
        if key not in self._kept:
            run = asyncio.get_running_loop().run_in_executor
            await run(self._pool, self._built)
            try:
                work = run(self._pool, self._compiled, structured)
                self._kept[key] = await asyncio.wait_for(work, SECONDS)
            except TimeoutError:
                raise ValueError(
                    f"compiling the grammar takes more than {SECONDS:.0f} seconds"
                ) from None
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        matcher = self._kept[key]
        return lambda: Constraint(self._tokens, matcher.deep_copy(), thinking)

    def close(self) -> None:
        """Ends the threads, as far as they are idle."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compiled(self, structured: Mapping[str, Any]) -> llguidance.LLMatcher:
        library = self._built()
        source = json.dumps({"grammars": self._source(structured)})
        wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(source, library)
        if wrong:
            raise ValueError(f"the grammar is refused: {_message(messages[0])}")
        matcher = llguidance.LLMatcher(library, source, log_level=0)
        for _ in range(2):  # the first mask takes longest, and may use up what the second needs
            trial = matcher.deep_copy()
            trial.compute_bitmask()
            if trial.is_stopped() and not trial.is_accepting():
                why = _message(trial.get_error())
                known = why and not why.startswith("NoExtension")
                raise ValueError(f"the grammar is refused: {why if known else _NOTHING}")
        return matcher

    def _built(self) -> llguidance.LLTokenizer:
        """The library's own tokenizer, which takes a second to make."""
        with self._building:
            if self._library is None:
                import llguidance.hf  # brings transformers, which takes seconds

                size = max(self._vocab_size, len(self._tokenizer))
                try:
                    self._library = llguidance.hf.from_tokenizer(
                        self._tokenizer, n_vocab=size, eos_token=self._ends or None
                    )
                except Exception as e:
                    raise ValueError(
                        f"structured output does not work with this tokenizer: {one_line(e)}"
                    ) from e
            return self._library

    def _source(self, structured: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Grammars of the library, the first of which is that of a reply."""
        strict = structured.get("strict", True)
        rules, parts = [], []
        for kind in _KINDS:
            if kind in structured:
                rules.append("@body")
                parts.append({"name": "body", **_body(kind, structured[kind], strict)})
        if tools := structured.get("tools"):
            begin, end = (self._tag(tag) for tag in (CALL, END_CALL))
            heads = [
                _quoted(f'{{"name": {_quoted(tool["name"])}, "arguments": ') + f" @tool{i}"
                for i, tool in enumerate(tools)
            ]
            more = '("\\n" call)*' if structured.get("parallel", True) else ""
            rules.append(f"call {more}")
            call = f'\ncall: {begin} "\\n" ({" | ".join(heads)}) "}}\\n" {end}'
            parts += [_parameters(i, tool) for i, tool in enumerate(tools)]
        else:
            call = ""
        return [{"name": "reply", "lark_grammar": f"start: {' | '.join(rules)}{call}"}, *parts]

    def _tag(self, tag: str) -> str:
        """A tag in Lark's notation: as a token, if the library does not take it for text."""
        token = self._tokens.tags.get(tag)
        special = token is not None and self._built().is_special_token(token)
        return f"<[{token}]>" if special else _quoted(tag)


class Constraint:
    """Which tokens a reply may go on with; see `hmf_jax.engine.request.Constraint`.

    While the model thinks everything is allowed but to end the reply or to call a tool. Line ends
    after the thinking are no part of what the grammar describes.

    Attributes:
      error: why the grammar cannot be kept to any longer: the reply can only end then.
    """

    def __init__(self, tokens: _Tokens, matcher: llguidance.LLMatcher, thinking: bool):
        self.error: str | None = None
        self._tokens, self._matcher, self._thinking = tokens, matcher, thinking
        self._thought = ""  # the end of it, where its end tag is no token
        self._lines = 2 if thinking else 0  # so many tokens of line ends may come

    def mask(self) -> np.ndarray:
        """Allowed tokens as bits, uint32 [ceil(vocab_size / 32)], at least one."""
        tokens = self._tokens
        if self._thinking:
            return tokens.thinking
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        words = words[: tokens.all.size] & tokens.all
        if self._lines:
            words |= tokens.lines
        if self._matcher.is_error():
            self._fail()
        return words if self.error is None and words.any() else tokens.ends

    def accept(self, tokens: Sequence[int]) -> None:
        """These tokens were chosen, in this order."""
        for token in tokens:
            if self._thinking:
                self._thinking = not self._ends_thinking(token)
            elif self._lines and token in self._tokens.line_ids and not self._follows(token):
                self._lines -= 1
            else:
                self._lines = 0
                if self.error is None and not self._matcher.consume_token(token):
                    self._fail()

    def _follows(self, token: int) -> bool:
        return self._matcher.validate_tokens([token]) == 1

    def _ends_thinking(self, token: int) -> bool:
        end = self._tokens.tags.get(END_THINK)
        if end is not None:
            return token == end
        self._thought += self._tokens.tokenizer.decode([token], skip_special_tokens=False)
        if END_THINK in self._thought:
            return True
        self._thought = self._thought[-len(END_THINK) :]
        return False

    def _fail(self) -> None:
        if self.error is None:
            self.error = _message(self._matcher.get_error())


class _Tokens:
    """What constraints know of a vocabulary; sets of tokens are bits, uint32 [ceil(size / 32)].

    Attributes:
      all: what the tokenizer has: a model may have more.
      ends: what ends a reply; all, if nothing does.
      thinking: what may come while the model thinks.
      lines, line_ids: one or two line ends.
    """

    def __init__(self, tokenizer: Any, size: int, ends: Sequence[int]):
        self.tokenizer, self.tags = tokenizer, tag_ids(tokenizer, TAGS)
        self.all = _bits(size, range(min(size, len(tokenizer))))
        self.ends = _bits(size, ends) if ends else self.all
        never = [*ends, *(self.tags[tag] for tag in (CALL,) if tag in self.tags)]
        self.thinking = self.all & ~_bits(size, never)
        found = (tokenizer.encode(text, add_special_tokens=False) for text in ("\n", "\n\n"))
        self.line_ids = [tokens[0] for tokens in found if len(tokens) == 1]
        self.lines = _bits(size, self.line_ids) & self.all


def _body(kind: str, value: Any, strict: bool) -> dict[str, Any]:
    """A grammar of the library; ValueError if it is none."""
    if kind == "json_object":
        return {"json_schema": _schema(_ANY_OBJECT, "json_object", True)}
    if kind == "json":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as e:
                raise ValueError(f"the schema is no JSON: {e}") from None
        return {"json_schema": _schema(value, "the schema", strict)}
    if kind == "choice":
        if not value or not all(isinstance(one, str) and one for one in value):
            raise ValueError("choice must be a list of texts, none of which is empty")
        value = "|".join("".join(_escaped(c) for c in one) for one in value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{kind} must be a text that is not empty")
    if kind == "grammar":
        return {"lark_grammar": value}
    made = json.loads(llguidance.LLMatcher.grammar_from_regex(value))["grammars"][0]
    return {"lark_grammar": made["lark_grammar"]}


def _parameters(i: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    """The grammar of the arguments of a tool."""
    schema = tool.get("parameters") or _NO_ARGUMENTS
    where = f"tools[{i}].function.parameters"
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise ValueError(f"{where} must be the schema of an object")
    schema = {"type": "object", **schema}
    return {"name": f"tool{i}", "json_schema": _schema(schema, where, tool.get("strict") is True)}


def _schema(schema: Any, where: str, strict: bool) -> dict[str, Any]:
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where} must be an object")
    options = {
        "lenient": not strict,
        "coerce_one_of": not strict,
        "whitespace_pattern": _BLANKS,
    }
    return {**schema, "x-guidance": options}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(character: str) -> str:
    """A character in a regular expression."""
    return character if character.isalnum() else f"\\x{{{ord(character):X}}}"


def _bits(size: int, tokens: Iterable[int]) -> np.ndarray:
    """These tokens as bits; those that are not below `size` are left out."""
    bits = np.zeros(-(-size // 32) * 32, np.uint8)
    bits[[token for token in tokens if token < size]] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def _message(error: str) -> str:
    """What the library says, without the state of its parser."""
    return one_line(ValueError(error.split("\n<state>")[0]))
