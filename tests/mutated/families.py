"""Damage to what only some base families have: experts in files, and their keys of config.json."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.mutated.kinds import REFUSED, SAME, WEIGHTS, Change, garbage, kind
from tests.mutated.texts import config

EACH, STACKED = "qwen3_next", "qwen3_5_moe"  # one tensor per expert, and one for all
COUNTS = (
    "num_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size "
    "decoder_sparse_step linear_num_key_heads linear_num_value_heads linear_key_head_dim "
    "linear_conv_kernel_dim"
).split()
LLAMA3 = "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
YARN = "llama_4_scaling_beta mscale mscale_all_dim factor original_max_position_embeddings".split()


def tensors(change: Callable[[dict[str, np.ndarray], random.Random], Any]) -> Change:
    def apply(directory: Path, rng: random.Random) -> None:
        found = load_file(directory / WEIGHTS)
        change(found, rng)
        save_file(found, directory / WEIGHTS)

    apply.__name__ = change.__name__
    return apply


def an_expert(found: dict[str, np.ndarray], rng: random.Random) -> str:
    return rng.choice([name for name in sorted(found) if ".mlp.experts." in name])


@kind("experts", REFUSED, EACH)
@tensors
def expert_is_gone(found, rng):
    del found[an_expert(found, rng)]


@kind("experts", REFUSED, EACH)
@tensors
def expert_of_another_number(found, rng):
    name = an_expert(found, rng)
    before, after = name.split(".experts.")
    number, leaf = after.split(".", 1)
    new = rng.choice(["8", "-1", f"0{number}", f"{number} ", "", "x", "1e0", "9" * 30])
    found[f"{before}.experts.{new}.{leaf}"] = found[name]
    if rng.random() < 0.5:
        del found[name]


@kind("experts", REFUSED, EACH)
@tensors
def expert_of_another_shape(found, rng):
    name = an_expert(found, rng)
    x = found[name]
    found[name] = np.ascontiguousarray(rng.choice([x.T, x[:-1], x[None], np.concatenate([x, x])]))


@kind("experts", REFUSED, EACH)
@tensors
def experts_twice(found, rng):
    """In a tensor of their own, and in one of all."""
    layer = an_expert(found, rng).split(".experts.")[0]
    down = [found[f"{layer}.experts.{e}.down_proj.weight"] for e in range(8)]
    found[f"{layer}.experts.down_proj"] = np.stack(down)


@kind("experts", REFUSED, STACKED)
@tensors
def stack_of_another_shape(found, rng):
    name = an_expert(found, rng)
    x = found[name]
    changed = rng.choice([x[:-1], x.swapaxes(1, 2), x[0], x[:, :-1], np.concatenate([x, x[:1]])])
    found[name] = np.ascontiguousarray(changed)


@kind("experts", REFUSED, STACKED)
@tensors
def stack_of_another_name(found, rng):
    name = an_expert(found, rng)
    found[name + rng.choice([".weight", ".0", "s", ".bias"])] = found.pop(name)


@kind("experts", REFUSED, EACH)
@tensors
def router(found, rng):
    name = rng.choice([n for n in sorted(found) if n.endswith("gate.weight")])
    x = found.pop(name)
    if rng.random() < 0.7:
        found[name] = np.ascontiguousarray(rng.choice([x.T, x[:0], np.concatenate([x, x])]))


def wrong_value(rng: random.Random, *, fine: tuple[type, ...] = ()) -> Any:
    """No value that such a key may have; null may be the default."""
    while (value := garbage(rng)) is None or type(value) in fine:
        pass
    return value


@kind("config of a family", REFUSED, EACH)
@config
def family_count(found, rng):
    found[rng.choice(COUNTS)] = rng.choice([0, 1.5, 2**40, wrong_value(rng)])


@kind("config of a family", REFUSED, EACH)
@config
def family_flag(found, rng):
    key = rng.choice(["norm_topk_prob", "attention_bias", "tie_word_embeddings"])
    found[key] = wrong_value(rng, fine=(bool,))


@kind("config of a family", REFUSED, EACH)
@config
def family_numbers_that_disagree(found, rng):
    """Each is possible, with other tensors than these."""
    free = ("num_experts_per_tok", "decoder_sparse_step", "linear_conv_kernel_dim")
    found[rng.choice([key for key in COUNTS if key not in free])] *= 2
    if rng.random() < 0.3:
        found["mlp_only_layers"] = rng.choice([[0], [0, 1, 2], [2, 1]])


@kind("config of a family", REFUSED, EACH)
@config
def family_layers_without_experts(found, rng):
    found["mlp_only_layers"] = wrong_value(rng) or [10**9]


@kind("config of a family", SAME, EACH)
@config
def family_key_is_gone(found, rng):
    del found[rng.choice(sorted(found))]


@kind("config of a family", SAME, STACKED)
@config
def family_value(found, rng):
    found[rng.choice(sorted(found))] = garbage(rng)


@kind("config of a family", REFUSED, EACH)
@config
def model_type_of_another_family(found, rng):
    other = ["hybrid_llama", "hybrid_qwen3", "hybrid_qwen3_moe", "hybrid_ministral3", "mixtral"]
    found["model_type"] = rng.choice([*other, "hybrid_qwen2", "qwen3_next_hmf_text"])


@kind("config of a family", REFUSED, "llama")
@config
def llama3_rope(found, rng):
    rope = found["rope_parameters"]
    key = rng.choice(LLAMA3)
    if rng.random() < 0.3 and key in LLAMA3[:3]:  # the last has a default
        del rope[key]
    else:
        rope[key] = rng.choice([-0.5, 0, 1e30, wrong_value(rng, fine=(int, float))])


@kind("config of a family", REFUSED, "ministral3")
@config
def scaled_rope(found, rng):
    value = rng.choice([-0.5, 1e30, wrong_value(rng, fine=(int, float))])
    found["rope_parameters"][rng.choice(YARN)] = value


@kind("config of a family", REFUSED, EACH)
@config
def partial_rope(found, rng):
    """Stored in two places, of which one wins."""
    value = rng.choice([0, -1, 1.5, 0.01, 1e30, wrong_value(rng, fine=(int, float))])
    found["partial_rotary_factor"] = found["rope_parameters"]["partial_rotary_factor"] = value
