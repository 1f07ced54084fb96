"""The tokenizer of a model directory, and what the directory says about generation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hmf_jax.config import HybridConfig
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingParams

_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def load_tokenizer(directory: str | Path) -> Any:
    """The Hugging Face tokenizer of a model directory.

    Raises:
      FileNotFoundError: there is none.
    """
    path = Path(directory)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise FileNotFoundError(
            f"{path} has no tokenizer (tokenizer.json, tokenizer_config.json); copy these files "
            "from the original model, or pass tokenizer=load_tokenizer(other_directory)."
        )
    # Imported where text is needed, since it takes seconds; it need not advise to install PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer, PreTrainedConfig

    # A blank config: transformers would refuse the model's own, whose type it does not know.
    return AutoTokenizer.from_pretrained(str(path), config=PreTrainedConfig())


def stop_ids(config: HybridConfig, tokenizer: Any, directory: str | Path | None) -> tuple[int, ...]:
    """End tokens: those of generation_config.json, of the config and of the tokenizer together."""
    found: list[int] = []
    stored = _generation_config(directory).get("eos_token_id")
    for ids in (stored, config.eos_token_id, tokenizer.eos_token_id):
        found += [] if ids is None else [ids] if isinstance(ids, int) else ids
    return tuple(dict.fromkeys(found))


def default_sampling(directory: str | Path | None) -> SamplingParams:
    """The settings that generation_config.json recommends; greedy if it has none."""
    stored = _generation_config(directory)
    if not stored.get("do_sample"):
        return SamplingParams()
    values = {k: stored[k] for k in _SAMPLING_KEYS if stored.get(k) is not None}
    return SamplingParams(**{"temperature": 1.0, **values})


def tokenizer_of(model: HybridLM, tokenizer: Any = None) -> Any:
    """This tokenizer, or, if it is None, that of the directory the model was loaded from.

    Raises:
      ValueError: the model was not loaded from a directory.
      FileNotFoundError: the directory has no tokenizer.
    """
    if tokenizer is not None:
        return tokenizer
    if model.source is None:
        raise ValueError(
            "This model was not loaded from a directory, so its tokenizer is unknown; pass "
            "tokenizer=load_tokenizer(directory)."
        )
    return load_tokenizer(model.source)


def directory_of(model: HybridLM, tokenizer: Any) -> str | None:
    """Where generation_config.json is: with the model, else with the tokenizer."""
    return model.source or getattr(tokenizer, "name_or_path", None) or None


def _generation_config(directory: str | Path | None) -> dict[str, Any]:
    path = None if directory is None else Path(directory) / "generation_config.json"
    if path is None or not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON ({e}); download it again or remove it.") from e
