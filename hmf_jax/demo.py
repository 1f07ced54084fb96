"""A complete tiny model in a directory: random weights, all six layer kinds, its own tokenizer."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from hmf_jax.chat import ChatSession, load_tokenizer
from hmf_jax.config import HybridConfig
from hmf_jax.generation import generate
from hmf_jax.loading import from_pretrained, save_orbax, save_pretrained
from hmf_jax.memory import describe, memory_table
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingParams

# The ChatML layout of Qwen models, with their thinking switch.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}
<think>

</think>

{% endif -%}
{%- endif -%}"""

_CORPUS = (
    "The quick brown fox jumps over the lazy dog. A hybrid model keeps some attention layers and "
    "gives the others a state of fixed size: the memory of what they read does not grow.\n"
)


def build_tokenizer(vocab_size: int = 320) -> Any:
    """A byte-level BPE tokenizer with at most `vocab_size` tokens, a chat template, end tokens.

    Any text encodes and decodes exactly. <|im_end|> ends a turn; <think> and </think> are ordinary
    text when decoding, like in Qwen3.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    thinking = [AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special) - len(thinking),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(thinking)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def write_checkpoint(
    directory: str | Path, *, dtype: Any = jnp.bfloat16, seed: int = 0, **overrides: Any
) -> None:
    """Write the tiny model as a Hugging Face directory: weights, configs, tokenizer.

    Args:
      directory: must not hold a model yet.
      dtype: dtype of the weights.
      seed: of the random weights.
      overrides: fields of its `HybridConfig`, for example layer_kinds=("*", "GKA").

    Raises:
      FileExistsError: the directory is not empty.
    """
    tokenizer = build_tokenizer()
    values = {
        "initializer_range": 0.125,  # keeps activations and logits near 1
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **overrides,
    }
    model = HybridLM(HybridConfig.preset("tiny", **values), dtype=dtype, rngs=nnx.Rngs(seed))
    save_pretrained(model, directory, progress=False)
    tokenizer.save_pretrained(directory)
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    (Path(directory) / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))


def run_demo(directory: str | Path, say: Callable[[str], None]) -> bool:
    """Build, convert, verify and run the tiny model in `directory`; `say` gets each line of report.

    Returns:
      Whether every check passed.
    """
    root = Path(directory)
    say("1. A tiny hybrid model with random weights, as a Hugging Face directory")
    write_checkpoint(root / "hf")
    config = HybridConfig.from_json(root / "hf")
    say(_indent(describe(config)))

    say("\n2. Hugging Face -> Orbax -> Hugging Face")
    save_orbax(from_pretrained(root / "hf", dtype=None, progress=False), root / "orbax")
    back = from_pretrained(root / "orbax", dtype=None, progress=False)
    save_pretrained(back, root / "back", progress=False)
    count, different = _compare(root / "hf", root / "back")
    verdict = f"{', '.join(different)} DIFFER" if different else "all bit-identical"
    say(f"   {count} tensors: {verdict}")

    say("\n3. Prefill and step-by-step decoding against one forward pass (float32)")
    model = from_pretrained(root / "orbax", dtype=jnp.float32, progress=False)
    assert config.swa is not None
    tokens = load_tokenizer(root / "orbax").encode(_CORPUS)[:60]
    settings: dict[str, Any] = dict(capacity=512)
    start = time.perf_counter()
    (out,) = generate(
        model, [tokens], max_new_tokens=3 * config.swa.window_size, logprobs=True, **settings
    )
    compiling = time.perf_counter() - start
    whole = jnp.array([tokens + out.tokens[:-1]])
    forward = jax.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)[0], -1))
    expected = np.asarray(forward(model, whole))[0, len(tokens) - 1 :]
    expected = expected[np.arange(len(out.tokens)), out.tokens]
    error = float(np.linalg.norm(np.array(out.logprobs) - expected) / np.linalg.norm(expected))
    fine = error < 1e-4
    say(
        f"   {len(tokens)} tokens read, {len(out.tokens)} generated: relative error of their "
        f"log-probabilities {error:.1e} ({'ok' if fine else 'FAIL'}, at most 1e-4)"
    )

    say("\n4. Chat (random weights, so expect noise)")
    sampling = SamplingParams(temperature=0.8, seed=1)
    chat = ChatSession(model, sampling=sampling, max_new_tokens=48, **settings)
    question = "What is a hybrid model?"
    say(f"   you:   {question}\n   model: {chat.send(question).text!r}")
    start = time.perf_counter()
    (long,) = generate(model, [tokens], max_new_tokens=384, eos_ids=(), **settings)
    seconds = time.perf_counter() - start
    device = jax.devices()[0].device_kind
    say(
        f"   {len(long.tokens) / seconds:.0f} tokens/s on {device} (batch 1, prefill included; "
        f"the first run took {compiling:.1f} s, mostly compiling)"
    )

    say("\n5. Memory of one sequence in bfloat16, Qwen3-8B shapes, half of the layers GKA")
    say(_indent(memory_table(HybridConfig.preset("8b"))))
    say("\n   the same for this tiny model")
    say(_indent(memory_table(config)))
    passed = fine and not different
    say(f"\n{'All checks passed.' if passed else 'SOME CHECKS FAILED.'}")
    return passed


def _compare(a: Path, b: Path) -> tuple[int, list[str]]:
    """Number of tensors in two single-file checkpoints, and the names of those that differ."""
    tensors = [load_file(d / "model.safetensors") for d in (a, b)]
    names = sorted(set(tensors[0]) | set(tensors[1]))
    raw = [{n: (x.dtype, x.shape, x.tobytes()) for n, x in t.items()} for t in tensors]
    return len(names), [n for n in names if raw[0].get(n) != raw[1].get(n)]


def _indent(text: str) -> str:
    return "\n".join("   " + line for line in text.splitlines())
