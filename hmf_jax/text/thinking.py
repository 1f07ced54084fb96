"""What a reasoning model thinks before it answers: the text between <think> and </think>."""

from __future__ import annotations

from hmf_jax.text.parts import END_THINK, THINK, ReplyParts

__all__ = ["END_THINK", "THINK", "split_thinking"]


def split_thinking(text: str, open_thinking: bool = False) -> tuple[str | None, str]:
    """(thinking, answer) of a reply of which only the text is known; thinking None: there is none.

    Args:
      text: of the reply.
      open_thinking: the prompt already ended with <think>. Otherwise thinking begins with a <think>
        that is alone in the first line: elsewhere it is part of the answer, and so is any </think>
        that closes nothing.
    """
    parts = ReplyParts({}, opened=open_thinking)
    parts.push(text)
    parts.finish()
    return parts.thinking, parts.text
