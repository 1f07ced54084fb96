"""What a model's directory recommends for generation: generation_config.json, read with checks."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hmf_jax.config import HybridConfig
from hmf_jax.convert.directories import printable, read_json
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingParams

FILE = "generation_config.json"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Keys that ask for nothing: about the file itself, or about how transformers computes.
_SILENT = (
    "transformers_version", "_from_model_config", "_commit_hash", "bos_token_id", "pad_token_id",
    "decoder_start_token_id", "use_cache", "cache_implementation", "cache_config", "output_scores",
    "output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate",
    "return_legacy_cache", "remove_invalid_values", "low_memory", "prefill_chunk_size",
    "compile_config", "disable_compile", "chat_format", "max_window_size",
)  # fmt: skip
# Ways of decoding that there are not here, and the values with which they change nothing.
_OFF: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "num_return_sequences": (1,), "typical_p": (1.0,),
    "encoder_repetition_penalty": (1.0,), "length_penalty": (1.0,), "guidance_scale": (1.0,),
    "early_stopping": (False,), "renormalize_logits": (False,),
    "exponential_decay_length_penalty": (), "token_healing": (False,),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What is used where the caller of `generate` says nothing.

    Attributes:
      settings: how to choose tokens, by name, as `SamplingParams.of` takes them.
      eos_ids: end tokens of the file and of the config together.
      max_new_tokens: most new tokens; None: not given.
      max_length: most tokens, prompt included, where max_new_tokens is not given; or None.
    """

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()
    max_new_tokens: int | None = None
    max_length: int | None = None

    @property
    def sampling(self) -> SamplingParams:
        """The settings; greedy unless the file says do_sample."""
        return SamplingParams.of({}, self.settings)

    def limit(self, prompt: int, otherwise: int) -> int:
        """Most new tokens after a prompt of so many tokens; `otherwise` if nothing is given.

        Raises ValueError if max_length leaves no room for any.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return otherwise
        if prompt >= self.max_length:
            raise ValueError(
                f"{FILE} says max_length={self.max_length}, and the prompt has {prompt} tokens; "
                "pass max_new_tokens"
            )
        return self.max_length - prompt


def generation_defaults(
    model: HybridLM | HybridConfig | None, directory: str | Path | None = None
) -> GenerationDefaults:
    """The recommendations for a model.

    Args:
      model: the model, or its config; None: only the file counts, and ids are not compared with
        the vocabulary.
      directory: where generation_config.json is, if anywhere; default: where the model is from.

    Raises:
      ValueError: one line that names the file and the key: not JSON, a value of a wrong type or
        out of range, end tokens outside the vocabulary.

    Settings that are not supported (beams and others) and unknown keys are warned of.
    """
    config = model.config if isinstance(model, HybridLM) else model
    if directory is None and isinstance(model, HybridLM):
        directory = model.source
    file = None if directory is None else Path(directory) / FILE
    stored = {} if file is None or not file.exists() else read_json(file)
    stored = {key: value for key, value in stored.items() if value is not None}
    where = str(file)
    _warn_of_others(stored, where)
    ends = [] if config is None else _ids(config.eos_token_id)
    vocab_size = None if config is None else config.vocab_size
    own = _end_ids(stored, where, vocab_size)
    return GenerationDefaults(
        _settings(stored, where),
        tuple(dict.fromkeys([*own, *ends])),
        _whole(stored, "max_new_tokens", where, 1),
        _whole(stored, "max_length", where, 1),
    )


def _settings(stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings; they are checked also where they are not used."""
    sample = stored.get("do_sample", False)
    if not isinstance(sample, bool):
        raise _wrong(where, "do_sample", sample, "true or false")
    _whole(stored, "top_k", where, 0)
    values = {key: stored[key] for key in _SAMPLING if key in stored}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(where, key, value, "a number")
    try:
        SamplingParams(**values)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None
    return {"do_sample": sample, **values}


def _end_ids(stored: Mapping[str, Any], where: str, vocab_size: int | None) -> list[int]:
    value = stored.get("eos_token_id")
    for id in _ids(value):
        whole = isinstance(id, int) and not isinstance(id, bool) and id >= 0
        if not whole or (vocab_size is not None and id >= vocab_size):
            size = "" if vocab_size is None else f" below the vocabulary size {vocab_size}"
            raise _wrong(where, "eos_token_id", value, f"a token id, or a list of them,{size}")
    return _ids(value)


def _ids(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _whole(stored: Mapping[str, Any], key: str, where: str, least: int) -> int | None:
    value = stored.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise _wrong(where, key, value, f"a whole number >= {least}")
    return value


def _wrong(where: str, key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{where}: {key}={printable(repr(value))} must be {allowed.rstrip(', ')}")


def _warn_of_others(stored: Mapping[str, Any], where: str) -> None:
    """Warns of what the file asks for and does not get."""
    used = {*_SAMPLING, *_SILENT, "do_sample", "eos_token_id", "max_new_tokens", "max_length"}
    others = [
        f"{printable(key)}={printable(repr(value), 60)}"
        for key, value in stored.items()
        if key not in used and value not in _OFF.get(key, (0, False)) and value not in ([], {})
    ]
    if others:
        warnings.warn(
            f"{where}: {', '.join(others)} is not supported and has no effect", stacklevel=3
        )
