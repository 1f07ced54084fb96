"""What a model's directory says about generation: generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hmf_jax.config import HybridConfig
from hmf_jax.sampling import SamplingParams

_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def of_directory(
    config: HybridConfig, directory: str | Path | None, more_ends: int | Iterable[int] | None = None
) -> dict[str, Any]:
    """What holds for generation where the caller says nothing.

    Args:
      config: the model's.
      directory: where generation_config.json is; None, or without one: greedy.
      more_ends: end tokens of a tokenizer.

    Returns:
      The sampling settings of the file by name (for `SamplingParams.of`), and eos_ids: the end
      tokens of the file, of the config and `more_ends` together. Its other keys are not read.

    Raises:
      ValueError: a file that is damaged or has values out of range.
    """
    path = None if directory is None else Path(directory) / "generation_config.json"
    stored = {} if path is None or not path.is_file() else _read(path)
    found: list[int] = []
    for ids in (stored.get("eos_token_id"), config.eos_token_id, more_ends):
        found += [] if ids is None else [ids] if isinstance(ids, int) else ids
    settings = {name: stored[name] for name in _SAMPLING if stored.get(name) is not None}
    return {**settings, "eos_ids": tuple(dict.fromkeys(found))}


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON ({e}); download it again or remove it.") from e
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is not a JSON object; download it again or remove it.")
    ids = stored.get("eos_token_id")
    for id in ids if isinstance(ids, list) else [] if ids is None else [ids]:
        if isinstance(id, bool) or not isinstance(id, int) or id < 0:
            raise ValueError(f"{path}: eos_token_id={ids!r} must be a token id, or a list of them.")
    settings = {name: stored[name] for name in _SAMPLING if stored.get(name) is not None}
    if not isinstance(settings.pop("do_sample", False), bool):
        raise ValueError(f"{path}: do_sample={stored['do_sample']!r} must be true or false.")
    try:
        SamplingParams(**settings)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return stored
