"""Training data: targets of chats, packing, bad rows, sharding, exact resume."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmf_jax.demo import build_tokenizer
from hmf_jax.training import Batches, Documents, encode_chat, encode_text

needs_grain = pytest.mark.skipif(
    importlib.util.find_spec("grain") is None,
    reason="needs grain: pip install 'hmf-jax[train]'",
)
TOKENIZER: Any = build_tokenizer()
END = TOKENIZER.eos_token_id

# Like Qwen3's: thinking in the newest turn only, where there is an empty block if there is none.
NEWEST_THINKS = """\
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last -%}
<think>
{{ m.reasoning_content or '' }}
</think>

{% endif -%}
{{ m.content.lstrip('\n') if loop.last else m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}
<think>

</think>

{% endif -%}
{%- endif -%}"""
ALWAYS_PROMPTS_THINKING = NEWEST_THINKS.replace(
    "<|im_start|>assistant\n{% if enable", "<|im_start|>assistant\n<think>\n{% if enable"
)
# Thinking in all turns since the last question, as in a loop of tool calls.
THINKS_SINCE_USER = """\
{%- set last = namespace(user=0) -%}
{%- for m in messages if m.role == 'user' %}{% set last.question = m %}{% endfor -%}
{%- for m in messages -%}
{%- if m == last.question %}{% set last.user = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.index0 > last.user -%}
<think>
{{ m.reasoning_content or '' }}
</think>

{% endif -%}
{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""
NO_HEADER = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
GENERATION_BLOCK = """\
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' -%}
{%- generation -%}{{ m.content }}<|im_end|>{%- endgeneration -%}
{%- else -%}{{ m.content }}<|im_end|>{%- endif %}
{% endfor -%}"""


def texts(count: int, longest: int = 30) -> list[dict[str, str]]:
    """Texts of 2 to `longest` + 1 tokens with their end token; the first tokens tell them apart."""
    rng = np.random.default_rng(0)
    return [{"text": f"{i:03d}" + "q" * rng.integers(0, longest - 2)} for i in range(count)]


def batches(source: Any, **changes: Any) -> Batches:
    options = {"length": 32, "batch_size": 2, "process_index": 0, "process_count": 1, **changes}
    return Batches(source, TOKENIZER, **options)


def documents_of(all_batches: Any) -> list[tuple[int, ...]]:
    """The documents of batches, row by row; checks what holds for any batch."""
    out = []
    for batch in all_batches:
        tokens, segments, mask = (batch[k] for k in ("tokens", "segment_ids", "loss_mask"))
        assert tokens.dtype == segments.dtype == np.int32 and mask.dtype == bool
        assert tokens.shape == segments.shape == mask.shape
        assert (
            not mask[segments == 0].any()
            and (tokens[segments == 0] == TOKENIZER.pad_token_id).all()
        )
        for row, ids, targets in zip(tokens, segments, mask, strict=True):
            used = ids[ids > 0]
            assert (np.diff(used) >= 0).all() and set(used) == set(
                range(1, used.max(initial=0) + 1)
            )
            for s in range(1, used.max(initial=0) + 1):
                here = np.flatnonzero(ids == s)
                assert (np.diff(here) == 1).all() and not targets[here[0]]
                out.append(tuple(row[here].tolist()))
    return out


def same(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in (*x, *y)
    )


# --- tokens and targets -------------------------------------------------------------------------


def test_a_text_ends_with_the_end_token():
    tokens, targets = encode_text(TOKENIZER, "naïve fox")
    assert TOKENIZER.decode(tokens) == "naïve fox<|im_end|>"
    assert targets == [False] + [True] * (len(tokens) - 1)
    assert encode_text(TOKENIZER, "fox<|im_end|>")[0].count(END) == 1


def marked(messages: list[dict[str, str]], **options: Any) -> tuple[str, list[str]]:
    """The whole conversation and its runs of targets, decoded."""
    tokens, targets = encode_chat(TOKENIZER, messages, **options)
    runs, previous = [], False
    for token, target in zip(tokens, targets, strict=True):
        if target:
            runs = [*runs[:-1], [*runs[-1], token]] if previous else [*runs, [token]]
        previous = target
    return TOKENIZER.decode(tokens), [TOKENIZER.decode(r) for r in runs]


def chat(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(turns)
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]


TALK = chat("Say ok", "ok", "Again", "ok", system="Be short.")
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "options", "expected"),
    [
        (None, {}, ["ok<|im_end|>", "ok<|im_end|>"]),
        (NEWEST_THINKS, {}, ["ok<|im_end|>", EMPTY + "ok<|im_end|>"]),
        (NEWEST_THINKS, {"enable_thinking": False}, ["ok<|im_end|>", "ok<|im_end|>"]),
        (ALWAYS_PROMPTS_THINKING, {}, ["ok<|im_end|>", "\n</think>\n\nok<|im_end|>"]),
        (NO_HEADER, {}, [" ok<|im_end|>", " ok<|im_end|>"]),
        (GENERATION_BLOCK, {}, ["ok<|im_end|>", "ok<|im_end|>"]),
    ],
)
def test_only_the_assistant_is_learnt(monkeypatch, template, options, expected):
    if template:
        monkeypatch.setattr(TOKENIZER, "chat_template", template)
    messages = TALK[1:] if template == NO_HEADER else TALK
    whole, runs = marked(messages, **options)
    assert whole == TOKENIZER.apply_chat_template(messages, tokenize=False, **options)
    assert runs == expected


def test_thinking_is_learnt_where_the_template_shows_it(monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", NEWEST_THINKS)
    messages = chat("a", "\n\none", "b", "two")
    for i in (1, 3):
        messages[i]["reasoning_content"] = f"because {i}"
    _, runs = marked(messages)
    assert runs == ["\n\none<|im_end|>", "<think>\nbecause 3\n</think>\n\ntwo<|im_end|>"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab é\n<", min_size=1, max_size=5), min_size=2, max_size=6))
def test_replies_decode_to_what_the_assistant_said(turns):
    turns = turns[: len(turns) // 2 * 2]
    whole, runs = marked(chat(*turns))
    assert whole == TOKENIZER.apply_chat_template(chat(*turns), tokenize=False)
    assert runs == [t + "<|im_end|>" for t in turns[1::2]]


def test_a_user_may_quote_the_assistant(monkeypatch):
    quote = "Say\n<|im_start|>assistant\nok<|im_end|>"
    for template, reply in ((TOKENIZER.chat_template, ""), (NEWEST_THINKS, EMPTY)):
        monkeypatch.setattr(TOKENIZER, "chat_template", template)
        tokens, targets = encode_chat(TOKENIZER, chat(quote, "ok"))
        learnt = TOKENIZER.encode(reply + "ok<|im_end|>")
        newline = TOKENIZER.encode("\n")
        assert tokens[-len(learnt + newline) :] == learnt + newline
        assert np.flatnonzero(targets).tolist() == [
            len(tokens) - len(learnt + newline) + i for i in range(len(learnt))
        ]


def test_turns_whose_beginning_is_rewritten_later(monkeypatch):
    """The second call was made with the first one's thinking in view, which then went."""
    monkeypatch.setattr(TOKENIZER, "chat_template", THINKS_SINCE_USER)
    call, result = {"role": "assistant", "content": "call()"}, {"role": "tool", "content": "1"}
    messages = [*chat("a"), {**call, "reasoning_content": "hm"}, result, call, result]
    ended = ["call()<|im_end|>"] * 2
    assert marked([*messages, *chat("b", "c")])[1] == [*ended, EMPTY + "c<|im_end|>"]
    shown = ["<think>\nhm\n</think>\n\n" + ended[0], EMPTY + ended[0]]
    assert marked(messages)[1] == shown


def test_a_space_before_a_reply_is_not_learnt_from_trimmed_offsets():
    """Llama-like tokenizers leave spaces out of a token's offsets."""
    from tokenizers import processors

    tokenizer: Any = build_tokenizer()
    trimming = processors.ByteLevel(trim_offsets=True, add_prefix_space=False)
    tokenizer.backend_tokenizer.post_processor = trimming
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert tokenizer(" <think>", return_offsets_mapping=True)["offset_mapping"] == [(1, 1), (1, 8)]
    tokens, targets = encode_chat(tokenizer, chat("a", "<think> <think> b"))
    assert tokenizer.decode(np.asarray(tokens)[targets]) == "<think> <think> b<|im_end|>"


def test_a_template_that_rewrites_replies_is_an_error(monkeypatch):
    shouting = (
        "{% for m in messages %}{{ m.content if loop.last else m.content|upper }};{% endfor %}"
    )
    monkeypatch.setattr(TOKENIZER, "chat_template", shouting)
    with pytest.raises(ValueError, match="differently in the middle.*generation"):
        encode_chat(TOKENIZER, TALK)


@pytest.mark.parametrize(
    ("row", "bad", "why"),
    [
        ({"text": "fine"}, None, ""),
        ({"messages": TALK}, None, ""),
        ({"messages": [{**TALK[1], "name": None}, TALK[2]]}, None, ""),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            None,
            "",
        ),
        ({"text": " \n"}, "empty", "empty text"),
        ({"text": None}, "empty", "nothing in column messages or conversations or text"),
        ({"messages": []}, "empty", "no messages"),
        ({"text": 3}, "malformed", "holds int"),
        ({"text": "\ud800"}, "malformed", ""),
        ({"messages": None, "text": "fine"}, None, ""),
        (
            {"body": "x"},
            "malformed",
            "nothing in column messages or conversations or text; there are body",
        ),
        ({"messages": "[]x"}, None, ""),  # a text, whatever the column is called
        ({"messages": [3]}, "malformed", ""),
        ({"messages": chat("a")}, "malformed", "no message of the assistant"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "malformed", "not a chat message"),
        ({"messages": [{"role": "user", "content": [1]}]}, "malformed", "not a chat message"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "malformed", "not a chat message"),
        (["text"], "malformed", "not list"),
    ],
)
def test_rows(row, bad, why):
    document = Documents([row], TOKENIZER)[0]
    assert document.bad == bad and why in document.why
    assert bool(len(document.tokens)) == (bad is None) and document.where == "row 0"
    assert document.tokens.dtype == np.int32 and document.targets.dtype == bool


def test_system_and_tools_columns(monkeypatch):
    row = {"messages": chat("a", "b"), "system": "Be kind.", "tools": [{"name": "f"}]}
    template = "{{ tools | tojson }}" + TOKENIZER.chat_template
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    document = Documents([row], TOKENIZER)[0]
    assert TOKENIZER.decode(document.tokens).startswith(
        '[{"name": "f"}]<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user'
    )
    assert TOKENIZER.decode(document.tokens[document.targets]) == "b<|im_end|>"


# --- files --------------------------------------------------------------------------------------


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def text_of(document: Any) -> str:
    return TOKENIZER.decode(document.tokens, skip_special_tokens=True)


def test_jsonl_files(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", {"text": "one é"}, "", {"text": "two"}, '{"text": ', "")
    b = write_lines(tmp_path / "b.jsonl", {"text": "three"})  # no newline at the end
    (tmp_path / "none.jsonl").write_text("")
    documents = Documents([a, tmp_path / "none.jsonl", str(b)], TOKENIZER)
    found = [documents[i] for i in range(len(documents))]
    assert [d.bad for d in found] == [None, "empty", None, "malformed", None]
    assert [text_of(d) for d in found if d.bad is None] == ["one é", "two", "three"]
    assert [d.where for d in found] == [f"{a}:{i}" for i in range(1, 5)] + [f"{b}:1"]
    b.write_bytes(b'{"text": "\xff"}\r\n' + b'{"text": "x"}\r\n' + b"[" * 100000)
    documents = Documents(b, TOKENIZER)
    assert [documents[i].bad for i in range(3)] == ["malformed", None, "malformed"]


def test_parquet_files(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    rows = [{"messages": TALK, "id": 1}, {"messages": None, "id": 2}, {"messages": [], "id": 3}]
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    documents = Documents(path, TOKENIZER)
    assert [documents[i].bad for i in range(3)] == [None, "empty", "empty"]
    assert documents[0].tokens.tolist() == encode_chat(TOKENIZER, TALK)[0]
    assert "nothing in column id2; there are " in Documents(path, TOKENIZER, "id2")[2].why
    assert documents[2].where == f"{path}:3"
    path.write_text("no table")
    with pytest.raises(ValueError, match="a.parquet is not a Parquet file"):
        Documents(path, TOKENIZER)


def test_sources_that_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        Documents(tmp_path / "nowhere.jsonl", TOKENIZER)
    with pytest.raises(ValueError, match="a.csv: training data are .jsonl or .parquet"):
        Documents([tmp_path / "a.csv"], TOKENIZER)
    for nothing in ([], write_lines(tmp_path / "a.jsonl")):
        with pytest.raises(ValueError, match="no rows in"):
            Documents(nothing, TOKENIZER)


# --- packing ------------------------------------------------------------------------------------


@needs_grain
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    length=st.integers(3, 24),
    batch_size=st.integers(1, 3),
    packing=st.sampled_from(["first_fit", "sequential", "none"]),
    overlong=st.sampled_from(["cut", "split", "skip"]),
    side=st.sampled_from(["left", "right"]),
    window=st.integers(1, 6),
)
def test_every_document_is_packed_once(
    lengths, length, batch_size, packing, overlong, side, window
):
    source = [{"text": "q" * n} for n in lengths]
    whole = [tuple(encode_text(TOKENIZER, row["text"])[0]) for row in source]
    expected, kept = [], 0
    for d in whole:
        cuts = range(0, len(d) if overlong == "split" else length, length)
        pieces = [
            p for a in cuts if len(p := d[a : a + length]) > 1
        ]  # a single token has no target
        pieces = [] if overlong == "skip" and len(d) > length else pieces
        expected, kept = expected + pieces, kept + bool(pieces)
    options = dict(length=length, batch_size=batch_size, packing=packing, overlong=overlong)
    options |= dict(padding_side=side, window=window, shuffle=False, epochs=1, threads=0)
    if not kept:
        with pytest.raises(ValueError, match=f"not one of {len(lengths)} rows is usable"):
            list(batches(source, **options))
        return
    found = list(iterator := batches(source, **options))
    documents = documents_of(found)
    assert (sorted(documents) if packing == "first_fit" else documents) == (
        sorted(expected) if packing == "first_fit" else expected
    )
    segments = np.concatenate([b["segment_ids"] for b in found])
    assert len(segments) % batch_size == 0 and segments.shape[1] == length
    assert segments[:-batch_size].any(1).all()  # empty rows in the last batch only
    edge = segments[:, -1 if side == "left" else 0]
    assert (edge[segments.any(1)] > 0).all()
    if packing == "none":
        assert segments.max() == 1 and (segments.any(1).sum() == len(expected))
    counts = iterator.counts
    assert counts["rows"] == len(lengths) and counts["documents"] == kept
    assert counts["overlong"] == sum(len(d) > length for d in whole)
    assert counts["tokens"] == (segments > 0).sum()
    assert counts["targets"] == sum(b["loss_mask"].sum() for b in found)


@needs_grain
def test_first_fit_fills_rows():
    source = texts(400, longest=20)
    used = {}
    for packing in ("first_fit", "sequential", "none"):
        segments = [b["segment_ids"] > 0 for b in batches(source, packing=packing, epochs=1)]
        used[packing] = np.mean(segments)
    assert used["first_fit"] > 0.93 > used["sequential"] > 0.7 > used["none"]


# --- bad rows -----------------------------------------------------------------------------------


@needs_grain
def test_bad_rows_are_counted_or_errors_that_name_file_and_line(tmp_path):
    good = {"text": "good"}
    lines = [
        good,
        "{",
        good,
        {"text": ""},
        {"text": "q" * 99},
        good,
        {"messages": chat("q" * 99, "a")},
    ]
    path = write_lines(tmp_path / "a.jsonl", *lines)
    options: dict[str, Any] = dict(shuffle=False, epochs=1)

    iterator = batches(path, **options)
    documents = documents_of(iterator)
    assert [len(d) for d in documents].count(32) == 1 and len(documents) == 4
    expected = {"rows": 7, "documents": 4, "empty": 1, "malformed": 1, "overlong": 2}
    assert iterator.counts == {**iterator.counts, **expected}
    assert [p.split(":")[1] for p in iterator.problems] == ["2", "4", "7"]
    assert "a.jsonl:7: overlong row: " in iterator.problems[2]
    iterator = batches(path, overlong="skip", **options)
    assert len(documents_of(iterator)) == iterator.counts["documents"] == 3

    with pytest.raises(ValueError, match="a.jsonl:2: malformed row: "):
        list(iterator := batches(path, on_bad="error", **options))
    with pytest.raises(ValueError, match="a.jsonl:2: malformed row: "):
        next(iterator)  # again: what came before that row is not lost
    assert iterator.counts["rows"] == 0
    with pytest.raises(ValueError, match=r"a.jsonl:5: overlong row: \d+ tokens, 32 fit"):
        list(batches(path, overlong="error", **options))
    write_lines(path, good, {"text": ""})
    with pytest.raises(ValueError, match="a.jsonl:2: empty row: empty text"):
        list(batches(path, on_bad="error", **options))


@needs_grain
def test_endless_data_without_a_good_row_is_an_error():
    with pytest.raises(ValueError, match="not one of 5 rows is usable; row .: empty row"):
        next(batches([{"text": ""}] * 5))


@needs_grain
def test_arguments_out_of_range():
    for wrong in (
        {"packing": "best"},
        {"overlong": "keep"},
        {"on_bad": "warn"},
        {"padding_side": "up"},
        {"length": 1},
        {"batch_size": 0},
        {"window": 0},
        {"epochs": 0},
        {"process_index": 1},
        {"process_count": 9},
    ):
        with pytest.raises(ValueError, match="|".join([*wrong, "process"])):
            batches(texts(8), **wrong)


# --- order, shards, state -----------------------------------------------------------------------


@needs_grain
def test_the_same_arguments_give_the_same_batches():
    source = texts(60)
    a = list(batches(source, epochs=2, seed=1))
    assert same(a, list(batches(source, epochs=2, seed=1, threads=0)))
    assert not same(a, list(batches(source, epochs=2, seed=2)))


@needs_grain
def test_each_epoch_has_every_document_in_another_order():
    source = texts(50)
    order = documents_of(batches(source, epochs=3, packing="none"))
    everything = sorted(tuple(encode_text(TOKENIZER, r["text"])[0]) for r in source)
    first, second, third = order[:50], order[50:100], order[100:]
    assert sorted(first) == sorted(second) == sorted(third) == everything
    assert first != second != third != first and first != everything
    in_order = documents_of(batches(source, epochs=1, packing="none", shuffle=False))
    assert in_order == everything


@needs_grain
@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_every_document(processes):
    source = texts(50)
    parts = [
        documents_of(batches(source, epochs=2, process_index=i, process_count=processes))
        for i in range(processes)
    ]
    everything = sorted(tuple(encode_text(TOKENIZER, r["text"])[0]) for r in source)
    assert sorted(sum(parts, [])) == sorted(2 * everything)
    assert {len(p) for p in parts} <= {2 * (50 // processes), 2 * math.ceil(50 / processes)}


@needs_grain
@pytest.mark.parametrize("overlong", ["cut", "split"])
@pytest.mark.parametrize("packing", ["first_fit", "sequential", "none"])
def test_resumed_equals_uninterrupted(packing, overlong):
    """From every batch, through JSON, in a new iterator and in one that was elsewhere."""
    rows = texts(40, longest=70)
    rows[3] = rows[20] = {"text": ""}
    options = dict(packing=packing, overlong=overlong, window=6, epochs=2, threads=0)
    iterator, states, counts = batches(rows, **options), [], []
    whole = []
    states.append(json.dumps(iterator.get_state()))
    counts.append(iterator.counts)
    for batch in iterator:
        whole.append(batch)
        states.append(json.dumps(iterator.get_state()))
        counts.append(iterator.counts)
    elsewhere = batches(rows, **options)
    for start, state in enumerate(states):
        resumed = elsewhere if start % 2 else batches(rows, **options)
        resumed.set_state(json.loads(state))
        assert resumed.counts == counts[start]
        if start % 5 == 0 or start >= len(states) - 2:
            assert same(list(resumed), whole[start:])
            assert resumed.counts == iterator.counts
        else:
            assert same([next(resumed)], whole[start : start + 1])


@needs_grain
def test_a_state_of_other_settings_is_refused():
    state = batches(texts(40), seed=1).get_state()
    for change in ({"length": 64}, {"batch_size": 1}, {"seed": 2}, {"process_count": 2}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} .* -> "):
            batches(texts(40), **{"seed": 1, **change}).set_state(state)
    with pytest.raises(ValueError, match="rows 40 -> 41"):
        batches(texts(41), seed=1).set_state(state)
    batches(texts(40), seed=1, epochs=3, on_bad="error").set_state(state)
