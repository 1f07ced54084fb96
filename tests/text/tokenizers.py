"""Small tokenizers of the kinds that models have: how their decoders put text together differs."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hmf_jax.demo import build_tokenizer

WORDS = ["hello", "world", "é", "日本", "a", "b", ",", ".", "'s", "n't", "'", "!", "\ufffd"]
SPECIAL = ["<s>", "</s>"]


def _finish(tokenizer: Tokenizer, **options: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<tag>", special=False, normalized=False)])
    options = {"clean_up_tokenization_spaces": False, **options}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options
    )


def byte_fallback(strip: bool = True) -> Any:
    """As those of Llama, Gemma and Mistral: spaces are "▁", unknown characters are byte tokens."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁"]
    pieces += [w for word in WORDS for w in (word, f"▁{word}")]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    return _finish(tokenizer, unk_token="<unk>")


def metaspace() -> Any:
    """As those of T5 and other Unigram models of SentencePiece: the first space is dropped."""
    pieces = ["<unk>", "▁", *WORDS, *(f"▁{word}" for word in WORDS)]
    tokenizer = Tokenizer(models.Unigram([(p, -1.0) for p in dict.fromkeys(pieces)], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _finish(tokenizer, unk_token="<unk>")


def word_piece(clean: bool = True) -> Any:
    """As those of BERT; `clean`: transformers removes spaces before punctuation, too."""
    pieces = ["[UNK]", *WORDS, *(f"##{word}" for word in WORDS), "n", "t", "m", "ve", "re", "?"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _finish(tokenizer, unk_token="[UNK]", clean_up_tokenization_spaces=clean)


def without_backend() -> Any:
    """One that is written in Python, and has no decoder of `tokenizers`."""
    from transformers import PreTrainedTokenizer

    class Slow(PreTrainedTokenizer):
        @property
        def vocab_size(self) -> int:
            return len(WORDS)

        def get_vocab(self) -> dict[str, int]:
            return {word: i for i, word in enumerate(WORDS)} | self.added_tokens_encoder

        def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
            return text.split()

        def _convert_token_to_id(self, token: str) -> int:
            return WORDS.index(token) if token in WORDS else 0

        def _convert_id_to_token(self, index: int) -> str:
            return WORDS[index]

    return Slow(bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False)


KINDS: dict[str, Any] = {
    "byte level": build_tokenizer,
    "byte fallback": byte_fallback,
    "byte fallback, spaces kept": lambda: byte_fallback(strip=False),
    "metaspace": metaspace,
    "word piece": word_piece,
    "no backend": without_backend,
}

# What a reasoning model's template does, in short: what was thought before the newest question is
# dropped, an empty block switches thinking off, and tools stand in the system message.
REASONING_TEMPLATE = """\
{%- set newest = namespace(user=0) -%}
{%- for message in messages if message.role == "user" -%}
{%- set newest.user = newest.user + 1 -%}
{%- endfor -%}
{%- if tools -%}
<|im_start|>system
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif -%}
{%- set asked = namespace(users=0) -%}
{%- for message in messages -%}
{%- if message.role == "user" -%}
{%- set asked.users = asked.users + 1 -%}
{%- endif -%}
{%- if message.role == "tool" -%}
<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response>
{%- else -%}
<|im_start|>{{ message.role }}
{% if message.reasoning_content and asked.users == newest.user -%}
<think>
{{ message.reasoning_content }}
</think>

{% endif -%}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
{{ "\\n" if message.content or not loop.first }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}
<think>

</think>

{% endif -%}
{%- endif -%}"""


def reasoning() -> Any:
    """The demo's tokenizer with the tags of tools and the template above."""
    tokenizer = build_tokenizer(310)
    tags = ("<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer.chat_template = REASONING_TEMPLATE
    return tokenizer
