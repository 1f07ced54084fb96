"""The example of a conversation in docs/running.md runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import hmf_jax
from tests.text.conftest import SIZE
from tests.text.scripted import script
from tests.text.tokenizers import reasoning

TEXT = Path(__file__).parents[2] / "docs" / "running.md"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def test_the_example_of_a_conversation(model, monkeypatch, capsys):
    section = TEXT.read_text(encoding="utf-8").split("### Conversations")[1]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    tokenizer, make = reasoning(), hmf_jax.ChatSession
    replies = [f"Wait.\n{CALL}", "<think>\nrain\n</think>\n\nYes."]
    ends = [tokenizer.eos_token_id]
    script(monkeypatch, [tokenizer.encode(reply) + ends for reply in replies])
    monkeypatch.setattr(hmf_jax, "ChatSession", lambda m, **o: make(m, tokenizer, **o, **SIZE))
    names: dict[str, Any] = {"hmf_jax": hmf_jax, "model": model}
    exec(compile(code, str(TEXT), "exec"), names)
    assert (names["reply"].thinking, names["reply"].text) == ("rain", "Yes.")
    assert capsys.readouterr().out == "Wait." and len(names["chat"].messages) == 4
    assert names["chat"].messages[2]["content"] == "It rains in Paris."
