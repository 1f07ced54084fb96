"""Adapters on disk, in PEFT's files: adapter_config.json and adapter_model.safetensors.

What the config's keys mean is PEFT's: patterns are regular expressions for the end of a module's
name, the scale is alpha / r, or alpha / sqrt(r) with `use_rslora`. A key that would make the
adapters compute something else than W + scale A B is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from hmf_jax.convert.directories import printable, read_json
from hmf_jax.convert.safetensors_io import DTYPES, Checkpoint

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

# Keys that choose another computation, or other trained parameters, when they are set.
_VARIANTS = (
    "use_dora use_qalora use_bdlora lora_bias modules_to_save trainable_token_indices "
    "layer_replication alora_invocation_tokens alora_invocation_string "
    "fan_in_fan_out megatron_config arrow_config kasa_config monteclora_config"
).split()
# Keys that say how adapters were trained, or by whom; they are plain LoRA whatever these hold.
_HARMLESS = (
    "peft_type task_type revision inference_mode auto_mapping lora_dropout "
    " megatron_core runtime_config qalora_group_size loftq_config eva_config "
    "corda_config lora_ga_config velora_config ensure_weight_tying"
).split()
# Initial values that leave the base weights alone. The others (pissa, olora, corda, loftq, lora_ga)
# subtract something from them, so that their adapters belong to weights that no file holds.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# The version from which on PEFT takes stacked weights as [E, out, in]; before, as [E, in, out].
STACKS_SINCE = 0, 19, 0


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The keys of adapter_config.json that say what plain LoRA adapters compute.

    Attributes:
      file: where they stand.
      r, lora_alpha: rank, and the numerator of the scale.
      rank_pattern, alpha_pattern: other values, by a regular expression for the end of a module's
        name that begins after a dot; the first that matches counts.
      use_rslora: the scale is alpha / sqrt(r).
      target_modules: names, or ends of names, of the modules with adapters; or a regular expression
        for the whole name, or "all-linear"; None: not said.
      target_parameters: full names, or ends of names after a dot, of stacked weights of experts
        [E, out, in]. Their adapters are lora_A [E r, in], one expert below the other, and lora_B
        [out, r E], the columns of all experts side by side for each of the r.
      exclude_modules, layers_to_transform, layers_pattern: which of them have none.
      base_model_name_or_path: what they were trained on.
      peft_version: says how the adapters of experts are laid out.
    """

    file: Path
    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    target_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    base_model_name_or_path: str | None = None
    peft_version: str | None = None

    @classmethod
    def read(cls, file: Path) -> Self:
        """Reads the file.

        Raises:
          FileNotFoundError: there is none.
          ValueError: no JSON, another method than LoRA, a variant of LoRA, values of a wrong type
            or out of range; all in one line that names the file.
        """
        values = read_json(file)
        if values.get("peft_type") != "LORA":
            raise ValueError(f"{file}: peft_type is {_shown(values.get('peft_type'))}, not LORA")
        odd = [f"{name}={_shown(values[name])}" for name in _VARIANTS if values.get(name)]
        if (bias := values.get("bias", "none")) != "none":
            odd.append(f"bias={_shown(bias)}")
        if (
            (start := values.get("init_lora_weights")) not in _STARTS
            or start in (0, 1)
            and not (isinstance(start, bool))
        ):
            odd.append(f"init_lora_weights={_shown(start)} (it changes the base weights)")
        fields = {f.name for f in dataclasses.fields(cls)} - {"file"}
        known = {*fields, *_VARIANTS, *_HARMLESS, "bias", "init_lora_weights"}
        unknown = [
            name for name in values if name not in known and values[name] not in (None, False)
        ]
        # Variants are switched on by true, or by a config of their own.
        odd += [f"{printable(n)}={_shown(values[n])}" for n in unknown if _is_switch(values[n])]
        if odd:
            raise ValueError(f"{file}: only plain LoRA can be loaded, not {', '.join(odd)}")
        if ignored := [printable(n) for n in unknown if not _is_switch(values[n])]:
            warnings.warn(f"{file}: unknown keys {', '.join(ignored)}", stacklevel=4)
        given = {n: values[n] for n in fields if values.get(n) is not None}
        if missing := [n for n in ("r", "lora_alpha") if n not in given]:
            raise ValueError(f"{file}: {' and '.join(missing)} must be there")
        _check_values(file, given)
        return cls(file=file, **given)

    def rank(self, module: str) -> int:
        """The rank of a module's adapter."""
        return self.rank_pattern.get(_key(self.rank_pattern, module), self.r)

    def alpha(self, module: str) -> float:
        """The scale of a module's adapter times its rank."""
        alpha = self.alpha_pattern.get(_key(self.alpha_pattern, module), self.lora_alpha)
        return alpha * math.sqrt(self.rank(module)) if self.use_rslora else alpha

    def targets(self, module: str) -> bool:
        """Whether a module has an adapter, as far as this config says."""
        excluded, wanted = self.exclude_modules, self.target_modules
        if excluded and _matches(excluded, module):
            return False
        if wanted is None or wanted == "all-linear":
            return True
        if isinstance(wanted, str) or module in wanted or not _matches(wanted, module):
            return _matches(wanted, module)
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        patterns = self.layers_pattern or r"[^.]*"
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if found := re.match(rf".*?\.{pattern}\.(\d+)\.", module):
                return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
        return False

    def check_base(self, source: str | None) -> None:
        """Warns if the adapters were trained on a model of another name than `source`."""
        base = self.base_model_name_or_path
        if source and base and _model_name(base)[-1:] != _model_name(source)[-1:]:
            one, other = (printable("/".join(_model_name(path))) for path in (base, source))
            warnings.warn(
                f"{self.file}: trained on {one}, and this model is {other}; their shapes agree",
                stacklevel=3,
            )

    def names(self, module: str) -> bool:
        """Whether this config says itself that a module, or a stacked weight, has an adapter."""
        named = self.target_modules not in (None, "all-linear") and self.targets(module)
        return named or self.names_parameter(module)

    def names_parameter(self, name: str) -> bool:
        """Whether a stacked weight has adapters."""
        return _matches(self.target_parameters or [], name)

    def check_modules(self, modules: Iterable[str], parameters: Iterable[str] = ()) -> None:
        """Raises ValueError if nothing of the model is meant; warns of patterns in vain.

        Args:
          modules: names of its projections. parameters: of its stacked weights.
        """
        modules, parameters = list(modules), list(parameters)
        wanted = self.target_parameters or []
        if vain := [n for n in wanted if not any(_matches([n], p) for p in parameters)]:
            raise ValueError(f"{self.file}: target_parameters={_shown(vain)}: no such experts")
        if not wanted and not any(map(self.targets, modules)):
            raise ValueError(
                f"{self.file}: target_modules={_shown(self.target_modules)} means no projection of "
                "this model"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            keys = getattr(self, name)
            used = {_key(keys, meant) for meant in (*modules, *parameters)}
            if vain := [printable(key) for key in keys if key not in used]:
                warnings.warn(f"{self.file}: {name} {', '.join(vain)} match nothing", stacklevel=3)


def read_adapters(file: Path) -> tuple[Callable[[str], np.ndarray], dict[str, tuple], list[str]]:
    """A function that reads a tensor, the shapes of all, and the paths that `save_lora` noted.

    The names have no "base_model.model." in front.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a damaged file, or dtypes other than floats.
    """
    stored = Checkpoint(file)
    names = {name.removeprefix(PREFIX): name for name in stored.tensors}
    shapes = {name: stored.tensors[full].shape for name, full in names.items()}
    for name, full in names.items():
        if (dtype := stored.tensors[full].dtype) not in DTYPES:
            raise ValueError(f"{file}: {printable(name)} is {dtype}, adapters are {list(DTYPES)}")
    with file.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    saved = (header.get("__metadata__") or {}).get("modules", "[]")
    try:
        saved = [str(path) for path in json.loads(saved)]
    except (ValueError, TypeError) as e:
        raise ValueError(f"{file}: the metadata 'modules' are no list of names") from e
    return lambda name: stored.read(names[name]), shapes, saved


def wrappers(parameters: Iterable[str]) -> dict[str, str]:
    """Stacked weight -> module that its adapters are stored under.

    PEFT wraps a module once for each of its weights that has adapters, the last one outermost.

    Args:
      parameters: those that have adapters, each module's in the order in which it has them.
    """
    of: dict[str, list[str]] = {}
    for name in parameters:
        of.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: module + ".base_layer" * (len(names) - 1 - i)
        for module, names in of.items()
        for i, name in enumerate(names)
    }


def _check_values(file: Path, given: dict[str, Any]) -> None:
    """Raises ValueError, which names file and key, for a value of a wrong type or out of range."""

    def need(good: bool, key: str, what: str, value: Any) -> None:
        if not good:
            raise ValueError(f"{file}: {key} must be {what}, is {_shown(value)}")

    def is_rank(value: Any) -> bool:
        return type(value) is int and 0 < value < 1 << 31

    def is_alpha(value: Any) -> bool:
        return type(value) in (int, float) and 0 < value < 1e9

    need(is_rank(given["r"]), "r", "an integer of at least 1", given["r"])
    need(is_alpha(given["lora_alpha"]), "lora_alpha", "a positive number", given["lora_alpha"])
    rslora = given.get("use_rslora", False)
    need(isinstance(rslora, bool), "use_rslora", "true or false", rslora)
    for key, good, what in (
        ("rank_pattern", is_rank, "ranks (integers of at least 1) by name"),
        ("alpha_pattern", is_alpha, "positive numbers by name"),
    ):
        values = given.get(key, {})
        need(isinstance(values, dict), key, what, values)
        need(all(map(good, values.values())), key, what, values)
        for pattern in values:
            _check_pattern(file, key, pattern)
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = given.get(key, "all-linear")
        names = [value] if isinstance(value, str) else value
        text = isinstance(names, list) and all(isinstance(name, str) for name in names)
        need(text, key, "a name or a list of names", value)
        if isinstance(value, str) or key == "layers_pattern":
            for name in names:
                _check_pattern(file, key, name)
    for key in ("base_model_name_or_path", "peft_version"):
        need(isinstance(given.get(key, ""), str), key, "a text", given.get(key))
    stacked = given.get("target_parameters", [])
    good = isinstance(stacked, list) and all(isinstance(name, str) for name in stacked)
    need(good, "target_parameters", "a list of names", stacked)
    if stacked:
        version = given.get("peft_version", "")
        numbers = re.match(r"(\d{1,9})\.(\d{1,9})", version)
        late = numbers is not None and tuple(map(int, numbers.groups())) >= STACKS_SINCE[:2]
        least = ".".join(map(str, STACKS_SINCE))
        need(late, "peft_version", f"at least {least} beside target_parameters", version)
    layers = given.get("layers_to_transform", 0)
    numbers = layers if isinstance(layers, list) else [layers]
    good = all(type(n) is int and n >= 0 for n in numbers)
    need(good, "layers_to_transform", "layer numbers", layers)


def _check_pattern(file: Path, key: str, pattern: str) -> None:
    """A regular expression from a file must be one, and must not take for ever."""
    try:
        if len(pattern) > 10_000:
            raise re.error("too long")
        if re.search(r"[*+}]\)*\)[*+{]", pattern):
            raise re.error("nested repetition")
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise ValueError(f"{file}: {key} {_shown(pattern)} is no usable pattern: {e}") from None


def _key(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that matches the end of a module's name; the name itself if none does."""
    found = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
    return next(found, module)


def _matches(wanted: str | list[str], module: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return module in wanted or any(module.endswith(f".{name}") for name in wanted)


def _model_name(path: str) -> list[str]:
    """The last parts of a path, or of a repository's name, also where it is in the hub's cache."""
    found = re.search(r"models--(.+)--(.+?)/snapshots/", path)
    return list(found.groups()) if found else [p for p in re.split(r"[/\\]", path) if p][-2:]


def _is_switch(value: Any) -> bool:
    return value is True or (isinstance(value, dict | list) and bool(value))


def _shown(value: Any) -> str:
    return printable(repr(value), 60)
