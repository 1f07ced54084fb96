"""The names of `hmf_jax.text`, which was this one file."""

from hmf_jax.moved import moved
from hmf_jax.text import (
    END_THINK,
    THINK,
    ChatSession,
    Reply,
    TextStream,
    check_stop,
    default_sampling,
    generate_text,
    load_tokenizer,
    split_thinking,
    stop_ids,
    stream_text,
)

__all__ = [
    "END_THINK",
    "THINK",
    "ChatSession",
    "Reply",
    "TextStream",
    "check_stop",
    "default_sampling",
    "generate_text",
    "load_tokenizer",
    "split_thinking",
    "stop_ids",
    "stream_text",
]

__getattr__ = moved(__name__, {"run": "is gone; see hmf_jax.text.generate.run"})
