"""What a server serves: a model and its names, and what is known of it."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from hmf_jax import __version__
from hmf_jax.config import HybridConfig
from hmf_jax.generation_config import GenerationDefaults, generation_defaults
from hmf_jax.memory import EnginePlan
from hmf_jax.model import HybridLM
from hmf_jax.serving.config import EngineConfig, ServeConfig
from hmf_jax.serving.engines import cache_config
from hmf_jax.serving.errors import ApiError, invalid
from hmf_jax.text import stop_ids

_HEAD = 1 << 20  # bytes of a file of weights that stand for it: the list of tensors, some of them


@dataclasses.dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
      config: of the model.
      tokenizer: its Hugging Face tokenizer.
      settings: of the server.
      defaults: what the model's directory says about generation.
      ends: end tokens.
      names: of the model; the first one is its own, the others are for clients.
      length: most tokens of a prompt and its answer together.
      fingerprint: of all that decides about the bits of an answer, but for the request's num_iter.
      since: when it was loaded, in unix seconds.
      seeds: where requests without one get theirs.
      cache: how memory is shared out, as labels of a metric.
    """

    config: HybridConfig
    tokenizer: Any
    settings: ServeConfig
    defaults: GenerationDefaults
    ends: tuple[int, ...]
    names: tuple[str, ...]
    length: int
    fingerprint: str
    since: int
    seeds: random.Random = dataclasses.field(default_factory=random.SystemRandom)
    cache: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def alias(self, name: str | None) -> Mapping[str, int]:
        """The settings that come with a name of the model.

        Raises ApiError: there is no such name.
        """
        if name is None or name in self.names:
            return {}
        if name in self.settings.aliases:
            return self.settings.aliases[name]
        known = ", ".join([*self.names, *self.settings.aliases])
        message = f"there is no model {name[:200]!r}; this server has {known}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises ApiError for token ids outside the vocabulary."""
        if ids and not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.config.vocab_size)
            raise invalid(
                f"{param}: there is no token {wrong}; the vocabulary has {self.config.vocab_size}",
                param,
            )


def describe(
    model: HybridLM,
    tokenizer: Any,
    directory: Path | None,
    settings: ServeConfig,
    options: EngineConfig,
    plan: EnginePlan,
) -> Served:
    """What is served.

    Args:
      model: the model.
      tokenizer: its Hugging Face tokenizer.
      directory: where both are from; None: from nowhere.
      settings: of the server.
      options: how the engines were made.
      plan: what memory they have.
    """
    settings = dataclasses.replace(
        settings,
        model_names=settings.model_names or (directory.resolve().name if directory else "model",),
        slots=plan.slots * options.dp,
        max_model_len=plan.capacity,
        prefill_chunk=options.prefill_chunk,
        prefix_cache=options.prefix_cache,
    )
    return Served(
        config=model.config,
        tokenizer=tokenizer,
        settings=settings,
        defaults=generation_defaults(model.config, directory),
        ends=stop_ids(model.config, tokenizer, directory),
        names=settings.model_names,
        length=plan.capacity,
        fingerprint=_fingerprint(model, directory, options, plan),
        since=int(time.time()),
        seeds=random.SystemRandom() if settings.seed is None else random.Random(settings.seed),
        cache=cache_config(plan, options),
    )


def _fingerprint(
    model: HybridLM, directory: Path | None, options: EngineConfig, plan: EnginePlan
) -> str:
    """Of everything that the bits of an answer depend on, as far as files and settings tell."""
    told = hashlib.blake2b(digest_size=8)
    for file in sorted(directory.rglob("*")) if directory else ():
        if file.suffix in (".json", ".safetensors"):
            told.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as content:
                told.update(content.read(_HEAD))
    told.update(repr((model.config, model.dtype)).encode())
    told.update(repr((options.tp, options.prefill_chunk, options.prefix_cache)).encode())
    told.update(repr((plan.slots, plan.capacity, plan.page_size)).encode())
    told.update(f"{jax.devices()[0].device_kind} {jax.__version__} {__version__}".encode())
    return f"hmf-{told.hexdigest()}"
