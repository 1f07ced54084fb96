"""What `make demo` shows; and a tiny model with random weights and all six layer kinds."""

from __future__ import annotations

import json
import os
import random
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hmf_jax import embedded
from hmf_jax.config import HybridConfig
from hmf_jax.embedded import corpus
from hmf_jax.embedded.plan import NUM_ITER
from hmf_jax.embedded.recall import accuracy
from hmf_jax.engine import generate
from hmf_jax.loading import from_pretrained, save_pretrained
from hmf_jax.memory import describe, memory_table
from hmf_jax.model import HybridLM

# The ChatML layout of Qwen models, with their thinking switch, and tools as JSON.
CHAT_TEMPLATE = """\
{%- if tools -%}
<|im_start|>system
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor -%}
</tools><|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
{{ "\\n" if message.content or not loop.first }}<tool_call>
{{ call.function | tojson }}
</tool_call>
{%- endfor %}<|im_end|>
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


def run_demo(say: Callable[[str], None], name: str = "gka", seed: int = 0) -> bool:
    """Let an embedded hybrid read facts and answer questions; `say` gets each line of report.

    Args:
      say: prints.
      name: of `hmf_jax.embedded.HYBRIDS`.
      seed: of the facts.

    Returns:
      Whether it remembered at least half of the facts, and forgot them without its states.

    Raises:
      ValueError: no such model.
    """
    if name not in embedded.HYBRIDS:
        raise ValueError(f"no embedded hybrid {name!r}; choose {' or '.join(embedded.HYBRIDS)}")
    model = from_pretrained(embedded.directory(name), dtype=jnp.float32, progress=False)
    rng = random.Random(seed)
    say("A tiny hybrid that was really trained (hmf_jax/embedded/train.py); its tokens are bytes")
    say(_indent(describe(model.config)))
    text = _show_questions(say, model, rng)
    remembers = _show_recall(say, model, rng)
    _show_speed_and_memory(say, model, text)
    say(f"\n{'It remembers.' if remembers else 'IT DOES NOT REMEMBER.'}")
    return remembers


def _show_questions(say: Callable[[str], None], model: HybridLM, rng: random.Random) -> str:
    """The model reads a text and answers four questions about it; returns the text."""
    assert model.config.swa is not None
    text, facts = corpus.context(rng, 256, 8, 80)
    say(f"\n1. It reads {len(text) + 1} tokens: {len(facts)} facts, then something else")
    say(_indent(textwrap.fill(text, 92)))
    window = model.config.swa.window_size
    say(f"\n2. Questions. Its windows hold {window} tokens; what is older is in its states only")
    asked = rng.sample(facts, 4)
    prompts = [corpus.encode(f"{text}\n{corpus.ask(fact)[0]}") for fact in asked]
    for fact, answer in zip(asked, generate(model, prompts, max_new_tokens=16), strict=True):
        said = f"{fact[0]} {corpus.decode(answer.tokens)}"  # the prompt ends with the name
        right = said == f"{' '.join(fact)}."
        say(f"   you: {fact[0]}?   model: {said}{'' if right else f'  (no: {fact[2]})'}")
    return text


def _show_recall(say: Callable[[str], None], model: HybridLM, rng: random.Random) -> bool:
    """Right answers with more and fewer solver iterations, and without states; whether all is well:
    at least half are right, hardly any without states."""
    assert model.config.gka is not None
    count, length = 64, 256
    asked = corpus.questions(rng, count, length, length // 32, length // 3)
    say(f"\n3. {count} other contexts of {length} tokens: right answers by Chebyshev iterations")
    found = {n: accuracy(model, asked, num_iter=n) for n in NUM_ITER}
    zeroed = accuracy(model, asked, forgetful=True)
    for n, right in found.items():
        say(f"   num_iter {n:2d}: {right:4.0%}  {'#' * round(40 * right)}")
    say(f"   states zeroed before the question: {zeroed:.0%} (guessing: 1%)")
    return found[model.config.gka.num_iter] >= 0.5 and zeroed < 0.1


def _show_speed_and_memory(say: Callable[[str], None], model: HybridLM, text: str) -> None:
    """Tokens per second of a reply to the text; state sizes of this model and of a large one."""
    say("\n4. Speed and memory")
    settings: dict[str, Any] = dict(max_new_tokens=256, eos_ids=(), capacity=512)
    prompt = corpus.encode(text[:200])
    generate(model, [prompt], **settings)
    start = time.perf_counter()
    (out,) = generate(model, [prompt], **settings)
    speed = len(out.tokens) / (time.perf_counter() - start)
    say(f"   {speed:.0f} tokens/s on {jax.devices()[0].device_kind} (float32, batch 1)")
    say(
        "   State of one sequence in bfloat16: this model, and Qwen3-8B with half of its layers GKA"
    )
    say(_indent(memory_table(model.config, (256, 4096, 131072))))
    say(_indent(memory_table(HybridConfig.preset("8b"), (4096, 131072))))


def _indent(text: str) -> str:
    return textwrap.indent(text, "   ")
