"""GGUF files, written here by llama.cpp's own package: numbers, settings, tokenizers, damage."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from typer.testing import CliRunner

from hmf_jax.cli import app
from hmf_jax.config import HybridConfig
from hmf_jax.convert import gguf_to_hf
from hmf_jax.convert.safetensors_io import Checkpoint
from hmf_jax.layers import rope_frequencies
from hmf_jax.loading import convert_directory, flat_params, from_pretrained
from hmf_jax.options import RopeConfig

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

D, F, HEADS, KV, DIM, LAYERS = 64, 96, 4, 2, 16, 2
TINY = HybridConfig.preset("tiny", head_dim=DIM)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*BYTES, "Ġt", "he", "Ġthe", "<|end|>", "<tool>"]
KEYS = {
    "block_count": LAYERS,
    "context_length": 512,
    "embedding_length": D,
    "feed_forward_length": F,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV,
    "attention.key_length": DIM,
    "attention.value_length": DIM,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 1e4,
    "rope.dimension_count": DIM,
}
TOKENIZER = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": TOKENS,
    "token_type": [1] * (len(TOKENS) - 2) + [3, 4],
    "merges": ["Ġ t", "h e", "Ġt he"],
    "bos_token_id": len(TOKENS) - 2,
    "eos_token_id": len(TOKENS) - 2,
    "add_bos_token": False,
}
# Rows of 64 and 96 numbers: blocks of 32. One type for each matrix of a layer.
TYPES = {"attn_q": "Q8_0", "attn_k": "F16", "attn_v": "Q4_0", "ffn_up": "Q4_1", "ffn_down": "BF16"}


def shapes(arch: str, bias: bool, tied: bool) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape."""
    V, q, k = len(TOKENS), HEADS * DIM, KV * DIM
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    matrices = {"q": (q, D), "k": (k, D), "v": (k, D), "o": (D, q)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for n, shape in matrices.items():
            out[f"{layer}.self_attn.{n}_proj.weight"] = shape
            if bias and (n != "o" or arch != "qwen2"):
                out[f"{layer}.self_attn.{n}_proj.bias"] = shape[:1]
            if arch == "qwen3" and n in "qk":
                out[f"{layer}.self_attn.{n}_norm.weight"] = (DIM,)
        for n, shape in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items():
            out[f"{layer}.mlp.{n}_proj.weight"] = shape
        for n in ("input", "post_attention"):
            out[f"{layer}.{n}_layernorm.weight"] = (D,)
    return out | {"model.norm.weight": (D,)} | ({} if tied else {"lm_head.weight": (V, D)})


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "self_attn.q_norm": "attn_q_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def stored_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    _, _, i, inner = module.split(".", 3)
    return f"blk.{i}.{NAMES[inner]}.{kind}"


def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in llama.cpp's order: channels that rotate together are neighbours."""
    order = np.arange(len(x)).reshape(heads, 2, -1).transpose(0, 2, 1).reshape(-1)
    return x[order]


def make(
    file,
    arch: str = "llama",
    *,
    bias: bool = False,
    tied: bool = True,
    keys=(),
    tokenizer=(),
    extra=(),
    change=lambda tensors: tensors,
    types=TYPES,
) -> dict[str, np.ndarray]:
    """Writes a random model; returns what it holds, under the names of a checkpoint, in float32."""
    writer, rng, out = gguf.GGUFWriter(file, arch), np.random.default_rng(0), {}
    put = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    put |= {str: writer.add_string, list: writer.add_array}
    values = {f"{arch}.{k}": v for k, v in (KEYS | dict(keys)).items()}
    values |= {f"tokenizer.ggml.{k}": v for k, v in (TOKENIZER | dict(tokenizer)).items()}
    for key, value in (values | {"tokenizer.chat_template": "{{ x }}"} | dict(extra)).items():
        if value is not None:
            put[type(value)](key, value)
    tensors = {}
    for name, shape in shapes(arch, bias, tied).items():
        x = rng.standard_normal(shape).astype(np.float32)
        stored = stored_name(name)
        for n, heads in (("attn_q.", HEADS), ("attn_k.", KV)):
            if arch == "llama" and n in stored:
                x = interleaved(x, heads)
        kind = types.get(stored.split(".")[-2], "F32") if x.ndim == 2 else "F32"
        kind = gguf.GGMLQuantizationType[kind]
        packed = gguf.quantize(x, kind)
        tensors[stored] = (packed, kind)
        x = gguf.dequantize(packed, kind)
        for n, heads in (("attn_q.", HEADS), ("attn_k.", KV)):
            if arch == "llama" and n in stored:
                x = x[np.argsort(interleaved(np.arange(len(x)), heads))]
        out[name] = x
    for name, (x, kind) in change(tensors).items():
        writer.add_tensor(name, x, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("arch", "bias", "tied"),
    [
        ("llama", False, True),
        ("llama", True, False),
        ("qwen2", True, False),
        ("qwen3", False, True),
    ],
)
def test_numbers_and_settings(tmp_path, arch, bias, tied):
    values = make(tmp_path / "a.gguf", arch, bias=bias, tied=tied)
    assert convert_directory(tmp_path / "a.gguf", tmp_path / "hf", progress=False) == "hf"
    checkpoint = Checkpoint(tmp_path / "hf")
    assert checkpoint.tensors.keys() == values.keys()
    for name, x in values.items():
        wanted = x.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(checkpoint.read(name), wanted, err_msg=name)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == arch and config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is tied and config["head_dim"] == DIM
    assert config.get("attention_bias", True) is bias
    model = from_pretrained(tmp_path / "hf", dtype=None, progress=False)
    assert model.config.is_stock and model.config.family == arch
    np.testing.assert_array_equal(
        flat_params(model)["layers.1.mlp.down_proj.kernel"],
        values["model.layers.1.mlp.down_proj.weight"].T.astype(ml_dtypes.bfloat16),
    )


def test_float32_is_exact_and_overwriting_is_asked_for(tmp_path):
    values = make(tmp_path / "a.gguf")
    convert_directory(tmp_path / "a.gguf", tmp_path / "hf", dtype="float32", progress=False)
    checkpoint = Checkpoint(tmp_path / "hf")
    assert all(checkpoint.read(n).tobytes() == x.tobytes() for n, x in values.items())
    with pytest.raises(FileExistsError, match="overwrite"):
        convert_directory(tmp_path / "a.gguf", tmp_path / "hf", progress=False)
    convert_directory(tmp_path / "a.gguf", tmp_path / "hf", overwrite=True, progress=False)
    assert set(Checkpoint(tmp_path / "hf").dtypes().values()) == {"BF16"}


ROPES = {
    "none": ({}, None),
    "linear": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
    ),
    "yarn": (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_scaling_of_rope(tmp_path, kind):
    keys, wanted = ROPES[kind]
    make(tmp_path / "a.gguf", keys=keys)
    config = gguf_to_hf.read(tmp_path / "a.gguf").config
    assert config["rope_scaling"] == wanted
    HybridConfig.from_dict(config)


def frequencies(factor: float) -> np.ndarray:
    """What llama.cpp keeps of Llama 3's RoPE: plain frequency / scaled frequency."""
    llama3: Any = dict(
        low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    plain, scaled = (
        np.asarray(rope_frequencies(dataclasses.replace(TINY, rope=rope))[0], np.float64)
        for rope in (RopeConfig(1e4), RopeConfig(1e4, "llama3", factor=factor, **llama3))
    )
    return (plain / scaled).astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_of_llama_3(tmp_path, factor):
    kind = gguf.GGMLQuantizationType.F32

    def change(tensors):
        return tensors | {"rope_freqs.weight": (frequencies(factor), kind)}

    make(tmp_path / "a.gguf", change=change)
    scaling = gguf_to_hf.read(tmp_path / "a.gguf").config["rope_scaling"]
    assert scaling["rope_type"] == "llama3" and scaling["factor"] == pytest.approx(factor)
    other = np.linspace(1, 8, DIM // 2, dtype=np.float32)
    make(tmp_path / "b.gguf", change=lambda t: t | {"rope_freqs.weight": (other, kind)})
    with pytest.raises(ValueError, match="rope_freqs.weight is not that of Llama 3"):
        gguf_to_hf.read(tmp_path / "b.gguf")


CUTS = {
    "gpt-2": ["It", "Ġ2025", "'s", "ĠĠ", "ĠA"],
    "smollm": ["It", "Ġ", "2", "0", "2", "5", "'s", "ĠĠ", "ĠA"],
    "llama-bpe": ["It", "Ġ", "202", "5", "'s", "ĠĠ", "ĠA"],
    "qwen2": ["It", "Ġ", "2", "0", "2", "5", "'s", "ĠĠ", "ĠA"],
}


@pytest.mark.parametrize("pre", CUTS)
def test_how_text_is_cut(tmp_path, pre):
    make(tmp_path / "a.gguf", tokenizer={"pre": pre})
    files = gguf_to_hf.read(tmp_path / "a.gguf").files
    tokenizer = Tokenizer.from_str(files["tokenizer.json"])
    cut = tokenizer.pre_tokenizer.pre_tokenize_str("It 2025's   A")
    assert [text for text, _ in cut] == CUTS[pre]
    text = "the the\u00e9 日本 \t\n <|end|>x<tool> 12"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert tokenizer.decode(encoded.ids) == text.replace("<|end|>", "")
    assert {"Ġthe", "<|end|>", "<tool>"} <= set(encoded.tokens)


def test_a_file_without_a_tokenizer(tmp_path):
    make(tmp_path / "a.gguf", tokenizer=dict.fromkeys(TOKENIZER))
    with pytest.warns(UserWarning, match="a.gguf holds no tokenizer"):
        files = gguf_to_hf.read(tmp_path / "a.gguf").files
    assert files.keys() == {"chat_template.jinja", "generation_config.json"}


def test_special_tokens_and_templates(tmp_path):
    end = TOKENIZER["eos_token_id"]
    tokenizer = {"add_bos_token": True, "add_eos_token": True, "eot_token_id": 3}
    make(
        tmp_path / "a.gguf",
        tokenizer=tokenizer,
        extra={"tokenizer.chat_template.rag": "{{ documents }}"},
    )
    convert_directory(tmp_path / "a.gguf", tmp_path / "hf", progress=False)
    tokens = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json")).encode("he").ids
    assert tokens == [end, TOKENS.index("he"), end]
    said = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert said == {"bos_token_id": end, "eos_token_id": [end, 3]}
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == "{{ x }}"
    assert (tmp_path / "hf/additional_chat_templates/rag.jinja").read_text() == "{{ documents }}"


REFUSED = {
    "architecture": (dict(arch="gemma"), "architecture 'gemma'; llama, qwen2, qwen3 can be"),
    "experts": (dict(keys={"expert_count": 8}), "llama.expert_count = 8 is not supported"),
    "a missing key": (dict(keys={"context_length": None}), "lacks the key llama.context_length"),
    "a key of another type": (dict(keys={"block_count": "2"}), "block_count is 2, must be one int"),
    "other widths": (dict(keys={"feed_forward_length": [F, 32]}), r"is \[96, 32\], must be one"),
    "partly rotated": (dict(keys={"rope.dimension_count": 8}), "rope.dimension_count = 8 is not"),
    "longrope": (dict(keys={"rope.scaling.type": "longrope"}), "scaling of the type longrope"),
    "heads": (dict(keys={"attention.head_count": 3}), "wrong shape: blk.0.attn_q.weight"),
    "layers": (dict(keys={"block_count": 1}), "unexpected: blk.1.attn_k.weight"),
    "a part": (dict(extra={"split.count": 2}), "is a part of a split model"),
    "sentencepiece": (dict(tokenizer={"model": "llama"}), "a tokenizer of the kind 'llama' is not"),
    "pre": (dict(tokenizer={"pre": "tekken"}), "tokenizer.ggml.pre is 'tekken'; known are gpt-2"),
    "no tokens": (dict(tokenizer={"tokens": None}), "tokenizer.ggml.tokens must be a list"),
    "merges": (dict(tokenizer={"merges": ["h x"]}), "the merge 'h x' is not of tokens"),
    "twice": (dict(tokenizer={"tokens": ["a", *TOKENS[1:-1], "a"]}), "holds a token twice"),
    "end": (dict(tokenizer={"eos_token_id": 999}), "eos_token_id is 999, must be one of 261 tok"),
    "epsilon": (dict(keys={"attention.layer_norm_rms_epsilon": math.nan}), "rms_norm_eps must be"),
    "template": (dict(extra={"tokenizer.chat_template./x": "y"}), "is no chat template"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_converted_is_refused(tmp_path, kind):
    options, message = REFUSED[kind]
    make(tmp_path / "a.gguf", **options)
    with pytest.raises(ValueError, match=message) as error:
        convert_directory(tmp_path / "a.gguf", tmp_path / "hf", progress=False)
    assert str(tmp_path / "a.gguf") in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_missing_and_damaged_tensors(tmp_path):
    kind = gguf.GGMLQuantizationType.F32

    def change(tensors):
        del tensors["blk.1.ffn_up.weight"]
        return tensors | {"blk.1.odd": (np.zeros(3, np.float32), kind)}

    make(tmp_path / "a.gguf", change=change)
    with pytest.raises(ValueError) as error:
        gguf_to_hf.read(tmp_path / "a.gguf")
    assert "missing: blk.1.ffn_up.weight [96, 64]" in str(error.value)
    assert "unexpected: blk.1.odd" in str(error.value)

    bad = np.full(D, np.nan, np.float32)
    make(tmp_path / "b.gguf", change=lambda t: t | {"blk.1.ffn_norm.weight": (bad, kind)})
    with pytest.raises(ValueError, match=r"b.gguf: blk.1.ffn_norm.weight holds NaN or infinity"):
        convert_directory(tmp_path / "b.gguf", tmp_path / "hf", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_damaged_files_are_one_line(tmp_path):
    make(tmp_path / "a.gguf")
    good = (tmp_path / "a.gguf").read_bytes()
    cut = [good[:n] for n in (0, 3, 4, 20, 30, 100, 1000, 8000, len(good) // 2, len(good) - 1)]
    huge = struct.pack("<Q", 1 << 60)
    changed = [
        b"GGML" + good[4:],
        good[:4] + struct.pack("<I", 1) + good[8:],
        good[:4] + struct.pack(">I", 3) + good[8:],
        good[:8] + huge + good[16:],
        good[:16] + huge + good[24:],
        good[:24] + huge + good[32:],
        good.replace(
            b"tokenizer.ggml.merges\x09\0\0\0\x08", b"tokenizer.ggml.merges\x09\0\0\0\x09"
        ),
        good.replace(b"llama.block_count\x04", b"llama.block_count\x63"),
        good.replace(b"llama.rope.dimension_count", b"llama.attention.key_length"),
        good.replace(b"blk.1.ffn_norm", b"blk.0.ffn_norm"),
        good.replace(b"context_length", b"context_len\xff\xff\xff"),
    ]
    file = tmp_path / "b.gguf"
    for raw in cut + changed:
        assert raw != good
        file.write_bytes(raw)
        with pytest.raises(ValueError) as error:
            gguf_to_hf.read(file)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
    at = good.index(b"blk.0.attn_norm.weight") + len("blk.0.attn_norm.weight") + 4
    for what in (struct.pack("<Q", 1 << 50), struct.pack("<Q", 64) + struct.pack("<IQ", 99, 0)):
        file.write_bytes(good[:at] + what + good[at + len(what) :])
        with pytest.raises(ValueError, match="b.gguf"):
            gguf_to_hf.read(file)


def test_the_command_and_where_it_is_named(tmp_path, monkeypatch):
    make(tmp_path / "a.gguf")
    source, target = str(tmp_path / "a.gguf"), str(tmp_path / "hf")
    run = CliRunner().invoke
    for options, message in (
        (["--to", "orbax"], "a GGUF file becomes a Hugging Face directory"),
        (["--max-shard-size", "x"], "max_shard_size 'x' is not a size"),
    ):
        result = run(app, ["convert", source, target, *options])
        assert result.exit_code == 1 and message in result.output
    result = run(app, ["convert", source, target, "--dtype", "float32", "--max-shard-size", "90KB"])
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    result = run(app, ["convert", target, str(tmp_path / "orbax"), "--dtype", "float32"])
    assert result.exit_code == 1 and "dtype is for GGUF files" in result.output
    result = run(app, ["convert", f"{tmp_path}/b.gguf", str(tmp_path / "b")])
    assert result.exit_code == 1 and "b.gguf is not a file" in result.output
    result = run(app, ["info", source])
    assert result.exit_code == 1 and "hmf-jax convert" in result.output
    for path in (source, str(tmp_path)):
        with pytest.raises(ValueError, match=f"`hmf-jax convert {source} DIR` makes a model"):
            from_pretrained(path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "hmf-jax\[gguf\]"'):
        gguf_to_hf.read(source)
