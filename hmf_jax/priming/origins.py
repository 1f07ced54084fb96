"""Where the parameters of a primed model come from: known before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal

from hmf_jax import table
from hmf_jax.config import HybridConfig
from hmf_jax.mixers import BASE, GATE, KINDS, same_parameters, split_symbol, start

How = Literal["copied", "initialised", "fresh"]
IN_LAYER = re.compile(r"layers\.(\d+)\.(mixer|teacher)\.(.+)")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a parameter comes from: `sources` are the paths of the base's parameters.

    "copied": it is that parameter (in the dtype of the new model), with `queries` only its queries,
    where attention makes a gate beside each; "initialised": computed from those parameters;
    "fresh": not from the base, but random, or constant (norms, biases).
    """

    how: How
    sources: tuple[str, ...] = ()
    queries: bool = False


def stage0_plan(base: HybridConfig, config: HybridConfig) -> dict[str, Origin]:
    """Parameter path of the new model -> where its values come from; from the configs alone.

    Raises ValueError where a layer cannot be made from the base's.
    """
    rules = _rules(base, config)
    stored = {e.path: e.parameter_shape for e in table.entries(base)}
    plan: dict[str, Origin] = {}
    wrong: dict[str, str] = {}
    for entry in table.entries(config):
        found = IN_LAYER.fullmatch(entry.path)
        if found is None:  # shared by all kinds
            plan[entry.path] = Origin("copied", (entry.path,))
            continue
        layer, part, rest = int(found[1]), found[2], found[3]
        rule = rules[layer] if part == "mixer" else None
        source = rest if rule is None else _source(rule, rest)
        prefix = f"layers.{layer}.mixer."
        if source == GATE:
            names = (f"{prefix}o_proj.kernel", f"{prefix}v_proj.kernel")
            plan[entry.path] = Origin("initialised", names)
        elif source is not None and prefix + source in stored:
            gated = config.output_gate and same_parameters(base.layer_kinds[layer], BASE)
            queries = rule is not None and gated and source.startswith("q_proj.")
            plan[entry.path] = Origin("copied", (prefix + source,), queries)
            shape = stored[prefix + source]
            shape = (*shape[:-1], shape[-1] // 2) if queries else shape
            if shape != entry.parameter_shape:
                text = f"{entry.path} is {entry.parameter_shape}, {prefix}{source} is {shape}"
                wrong.setdefault(_other_heads(base, config, layer) or text, text)
        else:
            plan[entry.path] = Origin("fresh")
    if wrong:
        raise ValueError("the base does not fit the new mixers:\n  " + "\n  ".join(wrong))
    return plan


def _rules(base: HybridConfig, config: HybridConfig) -> list[Mapping[str, str] | None]:
    """What the mixer of each layer starts from, see `Kind.starts`; None: it is a copy.

    Raises ValueError where there is no way.
    """
    problems = ["the base is a fused stage-1 model: unfuse it first"] if base.fused else []
    rules: list[Mapping[str, str] | None] = []
    for i, (old, symbol) in enumerate(zip(base.layer_kinds, config.layer_kinds, strict=True)):
        kind, teacher = split_symbol(symbol)
        alike = old in KINDS and same_parameters(old, kind)
        rules.append(None if alike or old not in KINDS else start(kind, old, config.sections))
        if rules[i] is None and not alike:
            problems.append(f"layer {i}: the base has {old!r} there, {kind!r} cannot start from it")
        goal = teacher or kind
        if symbol not in KINDS and goal != old:
            problems.append(
                f"layer {i}: the teacher of {symbol!r} is {goal!r}, but the base has {old!r}"
            )
    if problems:
        raise ValueError("cannot prime this base:\n  " + "\n  ".join(problems))
    return rules


def _other_heads(base: HybridConfig, config: HybridConfig, layer: int) -> str | None:
    """Why GKA and GDN do not fit the attention of a base that has heads of their own for them."""
    if config.linear is None or not same_parameters(base.layer_kinds[layer], BASE):
        return None
    linear, q, kv = config.linear_heads, base.num_attention_heads, base.num_key_value_heads
    return (
        f"layer {layer}: the base has attention there, {q} query and {kv} key/value heads of "
        f"{base.head_dim} channels; its GKA and GDN layers have {linear.q} query, {linear.k} key "
        f"and {linear.v} value heads of {linear.dim}, and can only start from GDN layers"
    )


def describe_plan(plan: Mapping[str, Origin], config: HybridConfig) -> str:
    """A text: how many parameters are copied, initialised and fresh, and which, by layer kind."""
    size = {e.path: math.prod(e.shape) for e in table.entries(config)}
    texts = {
        "copied": "copied from the base",
        "initialised": "initialised from W_O and W_V",
        "fresh": "fresh, random or constant",
    }
    lines = []
    for how, text in texts.items():
        chosen = [path for path, origin in plan.items() if origin.how == how]
        total = sum(size[path] for path in chosen)
        lines.append(f"{total:>15,} parameters in {len(chosen)} arrays: {text}")
        named: dict[str, dict[str, None]] = {}  # ordered sets
        for path in chosen:
            found = IN_LAYER.fullmatch(path)
            if found is not None and plan[path].sources != (path,):
                layer, part, rest = found.groups()
                if part == "mixer":
                    named.setdefault(config.layer_kinds[int(layer)], {})[rest] = None
        for symbol, parts in named.items():
            lines.append(f"{'':15} {symbol}: {', '.join(parts)}")
    return "\n".join(lines)


def _source(rule: Mapping[str, str], rest: str) -> str | None:
    """The base's name for the new mixer's parameter `rest`, `GATE`, or None."""
    for part, source in rule.items():
        if rest == part or rest.startswith(part + "."):
            return GATE if source == GATE else source + rest.removeprefix(part)
    return None
