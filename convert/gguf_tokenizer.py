"""The tokenizer in a GGUF file as the files that transformers reads.

Byte-level BPE (`tokenizer.ggml.model` is "gpt2"): the vocabulary and merges are in the file; how
text is cut before them is only named (`tokenizer.ggml.pre`).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hmf_jax.convert.reading import printable

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens that are found before the text is cut
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _cut(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return [{**split, "invert": False}, {**_BYTES, "use_regex": False}]


_GPT2 = {**_BYTES, "use_regex": True}
# How text is cut, by name.
_PRE_TOKENIZERS = {
    "gpt-2": [_GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
    "llama-bpe": _cut(_WORDS % "{1,3}"),
    "qwen2": _cut(_WORDS % ""),
}


def special_tokens(file: Path, values: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The special tokens as config.json says them; all that end an answer are `eos_token_id`."""
    found = {
        n: _token(file, values, n, vocab_size) for n in ("bos", "eos", "eot", "eom", "padding")
    }
    ends = [found[n] for n in ("eos", "eot", "eom") if found[n] is not None]
    ends = list(dict.fromkeys(ends))
    end = ends[0] if len(ends) == 1 else ends or None
    out = {"bos_token_id": found["bos"], "eos_token_id": end, "pad_token_id": found["padding"]}
    return {n: out[n] for n in SPECIAL if out[n] is not None}


def files(file: Path, values: Mapping[str, Any], vocab_size: int) -> dict[str, str]:
    """Name -> content, of tokenizer.json, tokenizer_config.json and the chat templates.

    Warns if there is no tokenizer in the file.

    Raises ValueError, one line that names the file, for tokenizers of other kinds, for keys that
    are missing or contradict each other, and for more tokens than the model has.
    """
    model, pre = (values.get(f"tokenizer.ggml.{n}") for n in ("model", "pre"))
    if model in (None, "no_vocab") and "tokenizer.ggml.tokens" not in values:
        warnings.warn(f"{file} holds no tokenizer, so none is written", stacklevel=2)
        return _templates(file, values)
    if model != "gpt2":
        raise ValueError(
            f"{file}: a tokenizer of the kind {printable(repr(model))} is not read, only "
            "byte-level BPE ('gpt2') is; convert the repository that the model was made from"
        )
    if pre not in list(_PRE_TOKENIZERS):
        raise ValueError(
            f"{file}: tokenizer.ggml.pre is {printable(repr(pre))}; known are "
            f"{', '.join(_PRE_TOKENIZERS)}"
        )
    tokens, kinds = _tokens(file, values, vocab_size)
    out = {"tokenizer.json": _json(_tokenizer(file, values, str(pre), tokens, kinds))}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for key, name in names.items():
        if (token := _token(file, values, key, len(tokens))) is not None:
            settings[f"{name}_token"] = tokens[token]
    length = values.get(f"{values.get('general.architecture')}.context_length")
    if length is not None:
        settings["model_max_length"] = length
    out["tokenizer_config.json"] = _json(settings)
    return out | _templates(file, values)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _token(file: Path, values: Mapping[str, Any], name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = values.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < count):
        raise ValueError(f"{file}: {key} is {printable(value)}, must be one of {count:,} tokens")
    return value


def _texts(file: Path, values: Mapping[str, Any], name: str) -> list[str]:
    found = values.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{file}: tokenizer.ggml.{name} must be a list of texts")
    return found


def _tokens(file: Path, values: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The vocabulary, and the type of each token."""
    tokens = _texts(file, values, "tokens")
    kinds = values.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ValueError(f"{file}: tokenizer.ggml.token_type must give each token a type")
    if len(tokens) > vocab_size:
        raise ValueError(f"{file}: {len(tokens):,} tokens for a model of {vocab_size:,}")
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"{file}: tokenizer.ggml.tokens holds a token twice")
    return tokens, kinds


def _tokenizer(
    file: Path, values: Mapping[str, Any], pre: str, tokens: list[str], kinds: list[int]
) -> dict[str, Any]:
    """The object of tokenizer.json."""
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [text.split(" ") for text in _texts(file, values, "merges")]
    for merge in merges:
        if len(merge) != 2 or not vocab.keys() >= {*merge, "".join(merge)}:
            text = printable(repr(" ".join(merge)))
            raise ValueError(f"{file}: the merge {text} is not of tokens of the vocabulary")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": kind == _CONTROL}
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
        "post_processor": _ends(file, values, pre, tokens),
        "decoder": {**_BYTES, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": vocab,
            "merges": merges,
        },
    }


def _ends(
    file: Path, values: Mapping[str, Any], pre: str, tokens: list[str]
) -> dict[str, Any] | None:
    """The tokens that are put in front of every text and behind it."""
    default = {"bos": pre == "llama-bpe", "eos": False}
    found = {}
    for name, usual in default.items():
        wanted = values.get(f"tokenizer.ggml.add_{name}_token", usual)
        token = _token(file, values, name, len(tokens))
        if wanted and token is not None:
            found[name] = {"id": tokens[token], "ids": [token], "tokens": [tokens[token]]}
    if not found:
        return None

    def around(kind: str, type_id: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": kind, "type_id": type_id}}
        special = {
            n: {"SpecialToken": {"id": t["id"], "type_id": type_id}} for n, t in found.items()
        }
        return [x for x in (special.get("bos"), text, special.get("eos")) if x is not None]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {t["id"]: t for t in found.values()},
    }


def _templates(file: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """The chat template, and those with a name."""
    out = {}
    for key, text in values.items():
        found = re.fullmatch(r"tokenizer\.chat_template(?:\.(.*))?", key, re.DOTALL)
        if found is None:
            continue
        name = found[1]
        if not isinstance(text, str) or (name and not re.fullmatch(r"[\w-]{1,100}", name)):
            raise ValueError(f"{file}: {printable(key)} is no chat template")
        out[f"additional_chat_templates/{name}.jinja" if name else "chat_template.jinja"] = text
    return out
