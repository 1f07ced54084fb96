"""A complete tiny model in a directory: random weights, all six layer kinds, its own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hmf_jax.config import HybridConfig
from hmf_jax.loading import save_pretrained
from hmf_jax.model import HybridLM

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


def build_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most `vocab_size` tokens, a chat template, end tokens.

    Any text encodes and decodes exactly. <|im_end|> ends a turn; <think> and </think> are ordinary
    text when decoding, like in Qwen3.
    """
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


def write_checkpoint(directory: str | Path, *, dtype=jnp.bfloat16, seed: int = 0) -> None:
    """Write the tiny model as a Hugging Face directory: weights, configs, tokenizer.

    Raises:
      FileExistsError: the directory is not empty.
    """
    tokenizer = build_tokenizer()
    config = HybridConfig.preset(
        "tiny", eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    save_pretrained(HybridLM.init(config, dtype=dtype, seed=seed), directory, progress=False)
    tokenizer.save_pretrained(directory)
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    (Path(directory) / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
