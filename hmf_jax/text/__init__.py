"""Text in, text out: tokenizers, text as it is written, stop strings, conversations, their parts.

`hmf_jax.engine`, which it is built on, knows tokens only.
"""

from hmf_jax.text.chat import ChatSession, ConversationFull
from hmf_jax.text.deltas import CallArguments, CallStart, Content, Reasoning, ReplyDeltas
from hmf_jax.text.detokenizer import TextStream, check_stop
from hmf_jax.text.generate import Reply, generate_text, stream_text
from hmf_jax.text.messages import api_messages, check_messages
from hmf_jax.text.parts import Piece
from hmf_jax.text.prompt import Rendered, check_template_kwargs, render_prompt
from hmf_jax.text.template import render
from hmf_jax.text.thinking import END_THINK, THINK, split_thinking
from hmf_jax.text.tokenizer import default_sampling, load_tokenizer, stop_ids, tag_ids

__all__ = [
    "END_THINK",
    "THINK",
    "CallArguments",
    "CallStart",
    "ChatSession",
    "Content",
    "ConversationFull",
    "Piece",
    "Reasoning",
    "Rendered",
    "Reply",
    "ReplyDeltas",
    "TextStream",
    "api_messages",
    "check_messages",
    "check_stop",
    "check_template_kwargs",
    "default_sampling",
    "generate_text",
    "load_tokenizer",
    "render",
    "render_prompt",
    "split_thinking",
    "stop_ids",
    "stream_text",
    "tag_ids",
]
