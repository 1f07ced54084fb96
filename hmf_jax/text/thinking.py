"""What a reasoning model thinks before it answers: the text between <think> and </think>."""

from __future__ import annotations

THINK, END_THINK = "<think>", "</think>"


def split_thinking(text: str, open_thinking: bool = False) -> tuple[str | None, str]:
    """(thinking, answer) of a reply; `open_thinking` if the prompt already ended with <think>."""
    before, end, after = text.partition(END_THINK)
    if end:
        return before.strip().removeprefix(THINK).strip(), after.lstrip("\n")
    if open_thinking or text.lstrip().startswith(THINK):
        return text.strip().removeprefix(THINK).strip(), ""
    return None, text
