"""The tokenizer of a model directory, and what the directory says about generation."""

from __future__ import annotations

import functools
import os
import re
import warnings
from pathlib import Path
from typing import Any

from hmf_jax.config import HybridConfig
from hmf_jax.convert.directories import read_json
from hmf_jax.generation_config import generation_defaults
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingParams
from hmf_jax.text.parts import TAGS
from hmf_jax.text.template import one_line, texts

_FILES = ("tokenizer.json", "tokenizer_config.json")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_LONGEST_TEMPLATE = 1 << 18  # characters


def load_tokenizer(directory: str | Path) -> Any:
    """The Hugging Face tokenizer of a model directory.

    Nothing is downloaded, and no program that is in the directory runs.

    Raises:
      FileNotFoundError: there is none.
      ValueError: one of its files is damaged, or it needs a program that comes with the model.
    """
    path = Path(directory)
    if not any((path / name).is_file() for name in _FILES):
        raise FileNotFoundError(
            f"{path} has no tokenizer (tokenizer.json, tokenizer_config.json); copy these files "
            "from the original model, or pass tokenizer=load_tokenizer(other_directory)."
        )
    for name in _SETTINGS:
        if (path / name).exists():
            read_json(path / name)
    # Imported where text is needed, since it takes seconds; it need not advise to install PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer, PreTrainedConfig

    try:
        # A blank config: transformers would refuse the model's own, whose type it does not know.
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), config=PreTrainedConfig(), trust_remote_code=False, local_files_only=True
        )
        # Some damage is noticed only when it is used: a setting of a wrong type, for example.
        tokenizer.decode(tokenizer("Try é.\n")["input_ids"])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # also what the Rust library panics with
        raise ValueError(f"the tokenizer in {path} cannot be loaded: {one_line(e)}") from e
    _check_template(tokenizer.chat_template, path)
    return tokenizer


def _check_template(template: Any, path: Path) -> None:
    found = list(texts(template))
    if (template is not None and not found) or any(len(t) > _LONGEST_TEMPLATE for t in found):
        raise ValueError(
            f"the chat template in {path} must be text of at most {_LONGEST_TEMPLATE:,} characters"
        )


def stop_ids(config: HybridConfig, tokenizer: Any, directory: str | Path | None) -> tuple[int, ...]:
    """End tokens: those of generation_config.json, of the config and of the tokenizer together."""
    own = tokenizer.eos_token_id
    found = [*generation_defaults(config, directory).eos_ids, *([] if own is None else [own])]
    return tuple(dict.fromkeys(found))


def default_sampling(directory: str | Path | None) -> SamplingParams:
    """The settings that generation_config.json recommends; greedy if it has none."""
    return generation_defaults(None, directory).sampling


def tokenizer_of(model: HybridLM, tokenizer: Any = None) -> Any:
    """This tokenizer, or, if it is None, that of the directory the model was loaded from.

    Raises:
      ValueError: the model was not loaded from a directory, or has fewer tokens than the
        tokenizer's vocabulary. (Of more *added* tokens it is warned: a model may do without them.)
      FileNotFoundError: the directory has no tokenizer.
    """
    if tokenizer is None:
        if model.source is None:
            raise ValueError(
                "This model was not loaded from a directory, so its tokenizer is unknown; pass "
                "tokenizer=load_tokenizer(directory)."
            )
        tokenizer = load_tokenizer(model.source)
    size = model.config.vocab_size
    if tokenizer.vocab_size > size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model {size}; does the "
            "tokenizer belong to this model?"
        )
    if len(tokenizer) > size:
        warnings.warn(
            f"The tokenizer has {len(tokenizer)} tokens with those that were added, and the model "
            f"{size}; texts that contain the others are refused.",
            stacklevel=3,
        )
    return tokenizer


def tag_ids(tokenizer: Any, tags: tuple[str, ...] = TAGS) -> dict[str, int]:
    """The token of each of these tags, of thinking and of calls of tools, that is one."""
    found = {tag: tokenizer.convert_tokens_to_ids(tag) for tag in tags}
    return {
        tag: id
        for tag, id in found.items()
        if isinstance(id, int) and tokenizer.convert_ids_to_tokens(id) == tag
    }


def directory_of(model: HybridLM, tokenizer: Any) -> str | None:
    """Where generation_config.json is: with the model, else with the tokenizer."""
    return model.source or getattr(tokenizer, "name_or_path", None) or None


@functools.lru_cache(maxsize=1 << 16)
def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token by itself, special tokens included; bytes that are no character are
    U+FFFD."""
    return tokenizer.decode([token], skip_special_tokens=False)


@functools.lru_cache(maxsize=1 << 16)
def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes of one token, which need not be whole characters."""
    text = token_text(tokenizer, token)
    if "\ufffd" not in text:
        return text.encode()
    written = tokenizer.convert_ids_to_tokens(token)
    if re.fullmatch(r"<0x[0-9A-F]{2}>", written):
        return bytes([int(written[1:-1], 16)])
    alphabet = _byte_alphabet()
    if all(letter in alphabet for letter in written):
        return bytes(alphabet[letter] for letter in written)
    return text.encode()


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with: those that can be printed stand for
    themselves, the others are numbered from U+0100."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}
