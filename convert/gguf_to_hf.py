"""GGUF files -> Hugging Face directories, for the architectures Llama, Qwen2 and Qwen3.

A GGUF file holds the same matrices as the checkpoint that it was made from, under other names and
often quantised; the rows of Llama's q and k lie in another order. Its keys say what config.json,
generation_config.json and the tokenizer's files say.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hmf_jax.convert import gguf_tokenizer
from hmf_jax.convert.directories import replacing
from hmf_jax.convert.gguf_io import GGUF
from hmf_jax.convert.jax_to_hf import write_config
from hmf_jax.convert.reading import printable, summary
from hmf_jax.convert.safetensors_io import DTYPES, Pending, dtype_name, parse_size, write

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What llama.cpp writes of the RoPE of Llama 3: numbers of each frequency, made from these settings.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_ROPE_FREQS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class Converted:
    """A model as a Hugging Face directory holds it, its tensors not read yet.

    Attributes:
      config: the object of config.json.
      tensors: what is to be written.
      files: name -> content, of generation_config.json and the tokenizer.
    """

    config: dict[str, Any]
    tensors: list[Pending]
    files: dict[str, str]


def read(file: str | Path, dtype: Any = DTYPES["BF16"]) -> Converted:
    """A GGUF file as a model of this floating dtype.

    Raises:
      ImportError: the package `gguf` is not installed.
      FileNotFoundError: there is no such file.
      ValueError: a damaged file, keys or tensors that are missing, or an architecture, tokenizer
        or scaling that is not supported; each names the file.
    """
    name, gguf = dtype_name(dtype), GGUF(file)
    if "split.count" in gguf.values and gguf.values["split.count"] != 1:
        raise ValueError(
            f"{gguf.file} is a part of a split model; join the parts first (llama.cpp: "
            "llama-gguf-split --merge)"
        )
    keys = _Keys(gguf)
    config = _config(gguf, keys)
    pending, problems, left = [], [], set(gguf.tensors) - {_ROPE_FREQS}
    for stored, target, shape, heads in _tensors(config):
        left.discard(stored)
        found = gguf.tensors.get(stored)
        if found is None:
            problems.append(f"missing: {stored} {list(shape)}")
        elif found.shape != shape:
            problems.append(f"wrong shape: {stored} is {list(found.shape)}, must be {list(shape)}")
        make = functools.partial(_make, gguf, stored, DTYPES[name], heads)
        pending.append(Pending(target, name, shape, make))
    problems += [f"unexpected: {printable(n)}" for n in sorted(left)]
    if problems:
        raise ValueError(summary(f"{gguf.file}: tensors do not fit its keys:", problems))
    files = gguf_tokenizer.files(gguf.file, gguf.values, config["vocab_size"])
    tokens = {n: config[n] for n in gguf_tokenizer.SPECIAL if n in config}
    files["generation_config.json"] = json.dumps(tokens, indent=2) + "\n"
    return Converted(config, pending, files)


def save(
    converted: Converted,
    directory: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    model_types: Collection[str] | None = None,
    progress: bool = True,
) -> None:
    """Writes the directory, all of it or nothing; arguments and errors as in `jax_to_hf.save`."""
    parse_size(max_shard_size)
    tensors = converted.tensors
    total = sum(t.nbytes for t in tensors)
    with replacing(directory, overwrite, model_types=model_types, space=total) as tmp:
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="writing weights", disable=not progress
        ) as bar:
            write(tmp, tensors, max_shard_size, bar.update)
        write_config(tmp, converted.config, tensors[0].dtype)
        for name, text in converted.files.items():
            (tmp / name).parent.mkdir(exist_ok=True)
            (tmp / name).write_text(text, encoding="utf-8")


class _Keys:
    """The keys of one architecture, each of its type or an error."""

    def __init__(self, gguf: GGUF):
        self.file, self.values = gguf.file, gguf.values
        name = self.values.get("general.architecture")
        if name not in list(_ARCHITECTURES):
            raise ValueError(
                f"{self.file} is of the architecture {printable(repr(name))}; "
                f"{', '.join(_ARCHITECTURES)} can be converted"
            )
        self.architecture = str(name)

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """A value; a list of equal ones (of the layers) counts as one of them."""
        value: Any = self.values.get(f"{self.architecture}.{name}", default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if value is None:
            raise ValueError(f"{self.file} lacks the key {self.architecture}.{name}")
        if type(value) is not kind:
            raise ValueError(
                f"{self.file}: {self.architecture}.{name} is {printable(value)}, must be one "
                f"{kind.__name__}"
            )
        # The shortest number that float32 stores so: 1e-05, not 9.999999747378752e-06.
        return float(str(np.asarray(value, np.float32))) if kind is float else value

    def refuse(self, name: str, neutral: Any) -> None:
        """Raises ValueError if a key is there that would change what the model computes."""
        value = self.values.get(f"{self.architecture}.{name}", neutral)
        if value != neutral:
            raise ValueError(
                f"{self.file}: {self.architecture}.{name} = {printable(value)} is not supported"
            )


def _config(gguf: GGUF, keys: _Keys) -> dict[str, Any]:
    """config.json of a base model."""
    arch, tensors = keys.architecture, gguf.tensors
    for name in ("expert_count", "attention.sliding_window", "attention.clamp_kqv", "logit_scale"):
        keys.refuse(name, 0)
    d, heads = keys.get("embedding_length", int), keys.get("attention.head_count", int)
    dim = keys.get("attention.key_length", int, d // max(1, heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        keys.refuse(name, dim)
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{gguf.file} lacks the tensor token_embd.weight")
    config = {
        "architectures": [_ARCHITECTURES[arch]],
        "model_type": arch,
        "hidden_act": "silu",
        "vocab_size": embedding.shape[0],
        "hidden_size": d,
        "intermediate_size": keys.get("feed_forward_length", int),
        "num_hidden_layers": keys.get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", int, heads),
        "head_dim": dim,
        "max_position_embeddings": keys.get("context_length", int),
        "rms_norm_eps": keys.get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": keys.get("rope.freq_base", float, 10000.0),
        "rope_scaling": _rope_scaling(gguf, keys, dim),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    limits = {"num_hidden_layers": 512, "num_attention_heads": 1 << 20, "head_dim": 1 << 20}
    for name, most in limits.items():
        if not 0 < config[name] <= most:
            raise ValueError(f"{gguf.file}: {name} is {config[name]:,}")
    if arch != "qwen2":  # which has the biases of q, k and v always
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if arch == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    else:
        config["use_sliding_window"] = False
    return config | gguf_tokenizer.special_tokens(gguf.file, gguf.values, embedding.shape[0])


def _rope_scaling(gguf: GGUF, keys: _Keys, dim: int) -> dict[str, Any] | None:
    """The scaling of RoPE as config.json says it; None if there is none."""
    if _ROPE_FREQS in gguf.tensors:
        return _llama3(gguf, keys.get("rope.freq_base", float, 10000.0), dim)
    kind = keys.get("rope.scaling.type", str, "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{gguf.file}: RoPE scaling of the type {printable(kind)} is not read")
    scaling = {"rope_type": kind, "factor": keys.get("rope.scaling.factor", float)}
    if kind == "yarn":
        for name, neutral in (("attn_factor", 1.0), ("yarn_log_multiplier", 0.0)):
            keys.refuse(f"rope.scaling.{name}", neutral)
        original = keys.get("rope.scaling.original_context_length", int)
        scaling["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if f"{keys.architecture}.rope.scaling.yarn_{name}" in gguf.values:
                scaling[name] = keys.get(f"rope.scaling.yarn_{name}", float)
    return scaling


def _llama3(gguf: GGUF, theta: float, dim: int) -> dict[str, Any]:
    """The settings that give the numbers by which the file divides the frequencies of RoPE."""
    stored = gguf.read(_ROPE_FREQS, np.dtype(np.float32)).astype(np.float64).reshape(-1)
    factor = float(str(np.float32(stored.max())))
    if len(stored) == dim // 2 and theta >= 1 and factor >= 1:
        low, high, original = _LLAMA3.values()
        turns = original * theta ** (-np.arange(0, dim, 2) / dim) / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if np.allclose(stored, expected, rtol=1e-4, atol=0):
            return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    raise ValueError(
        f"{gguf.file}: {_ROPE_FREQS} is not that of Llama 3 ({_LLAMA3}); other scalings by "
        "frequency are not read"
    )


def _tensors(
    config: Mapping[str, Any],
) -> Iterator[tuple[str, str, tuple[int, ...], int | None]]:
    """Every tensor: name in the file, name in the checkpoint, shape, heads whose rows are mixed."""
    V, d, F = (config[n] for n in ("vocab_size", "hidden_size", "intermediate_size"))
    heads, kv, dim = (config[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    arch = config["model_type"]
    bias = config.get("attention_bias", True)  # Qwen2 does not say
    o_bias, mlp_bias = bias and arch != "qwen2", config.get("mlp_bias", False)
    mixed = arch == "llama"
    yield "token_embd.weight", "model.embed_tokens.weight", (V, d), None
    projections = (
        ("attn_q", "self_attn.q_proj", (heads * dim, d), bias, heads if mixed else None),
        ("attn_k", "self_attn.k_proj", (kv * dim, d), bias, kv if mixed else None),
        ("attn_v", "self_attn.v_proj", (kv * dim, d), bias, None),
        ("attn_output", "self_attn.o_proj", (d, heads * dim), o_bias, None),
        ("ffn_gate", "mlp.gate_proj", (F, d), mlp_bias, None),
        ("ffn_up", "mlp.up_proj", (F, d), mlp_bias, None),
        ("ffn_down", "mlp.down_proj", (d, F), mlp_bias, None),
    )
    norms = [("attn_norm", "input_layernorm", d), ("ffn_norm", "post_attention_layernorm", d)]
    if arch == "qwen3":
        norms += [
            ("attn_q_norm", "self_attn.q_norm", dim),
            ("attn_k_norm", "self_attn.k_norm", dim),
        ]
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{i}", f"blk.{i}"
        for stored, name, shape, has_bias, order in projections:
            yield f"{theirs}.{stored}.weight", f"{ours}.{name}.weight", shape, order
            if has_bias:
                yield f"{theirs}.{stored}.bias", f"{ours}.{name}.bias", shape[:1], order
        for stored, name, size in norms:
            yield f"{theirs}.{stored}.weight", f"{ours}.{name}.weight", (size,), None
    yield "output_norm.weight", "model.norm.weight", (d,), None
    if not config["tie_word_embeddings"]:
        yield "output.weight", "lm_head.weight", (V, d), None


def _make(gguf: GGUF, name: str, dtype: np.dtype, heads: int | None) -> np.ndarray:
    """A tensor in the order of the checkpoint.

    llama.cpp rotates neighbouring channels of a head, the checkpoint channels that are half a head
    apart; so the rows of q and k of Llama are stored in pairs.
    """
    x = gguf.read(name, dtype)
    if heads is None:
        return x
    pairs = x.reshape(heads, -1, 2, *x.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(x.shape)
