"""Training data: targets of chats, packing, bad rows, sharding, exact resume."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmf_jax.demo import build_tokenizer
from hmf_jax.training import Batches, Documents, encode_chat, encode_text, sources

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


def test_damaged_lines_are_named(tmp_path):
    """A byte order mark and line ends of Windows are no damage."""
    file, good = tmp_path / "a.jsonl", b'{"text": "x"}'
    lines = {
        b"\xef\xbb\xbf" + good + b"\r": "",
        b'{"text": "\xff"}': "no UTF-8: byte 0xff at 10",
        b"[" * 100000: "no JSON: nested too deeply",
        b'{"text": "x", "n": NaN}': "no JSON: NaN is not a finite number",
        b'{"text": "x", "n": 1e999}': "no JSON: 1e999 is not a finite number",
        b'{"text": "x", "text": "y"}': "no JSON: the key 'text' is there twice",
        b'{"text": "x\0"}': "no JSON: Invalid control character",
        b'{"text": "\\u0000"}': "text holds a NUL",
        b'{"text": "\\ud800"}': "text holds half of a surrogate pair",
        b'{"\x1b[31m": 1}': "no JSON: Invalid control character",
        b'{"\\u001b[31m": 1}': "no column .* there are '.x1b",
        b'{"text": "' + b"q" * 300 + b'"}': "too long: 313 bytes, max_row_bytes is 200",
        good[:-1]: "no JSON: ",
        b"null": "a row must be an object with columns: this is null",
    }
    file.write_bytes(b"\n".join(lines))
    documents = Documents(file, TOKENIZER, max_row_bytes=200_000)
    assert documents[len(lines) - 3].bad is None
    documents = Documents(file, TOKENIZER, max_row_bytes=200)
    for i, why in enumerate(lines.values()):
        why = "too long" if i == 2 else why
        assert (documents[i].bad is None) == (why == ""), i
        assert re.search(why, documents[i].why) and documents[i].where == f"{file}:{i + 1}"
        assert documents[i].why.isprintable()
    said = documents.describe()
    assert f"{file}: 14 rows of format 'text'" in said
    assert (
        "of 14 rows looked at, 13 are left out: 6 no JSON, " in said and f"{file}:2: no UTF" in said
    )
    file.write_bytes(good.decode().encode("utf-16"))
    with pytest.raises(ValueError, match="a.jsonl is UTF-16"):
        Documents(file, TOKENIZER)


def test_lists_and_packed_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_FREE", 1 << 20)
    rows = [{"text": "one"}, {"text": "two"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    write_lines(tmp_path / "lines.json", *rows)
    for name in ("list.json", "lines.json"):
        packed = gzip.compress((tmp_path / name).read_bytes())
        (tmp_path / f"{name}.gz").write_bytes(packed)
        for file in (tmp_path / name, tmp_path / f"{name}.gz"):
            documents = Documents(file, TOKENIZER)
            assert [text_of(documents[i]) for i in (0, 1)] == ["one", "two"]
    (tmp_path / "damaged.jsonl.gz").write_bytes(packed[:-9])
    (tmp_path / "not.jsonl.gz").write_text("{}")
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(bytes(1 << 22)))
    (tmp_path / "bad.json").write_text('[{"text": "a"},\n{"text": }]')
    for name, why in {
        "damaged.jsonl.gz": "is damaged or not gzipped",
        "not.jsonl.gz": "is damaged or not gzipped",
        "bomb.jsonl.gz": "unpacks to more than 200 times its size",
        "bad.json": "bad.json: no JSON: .*line 2",
    }.items():
        with pytest.raises(ValueError, match=why):
            Documents(tmp_path / name, TOKENIZER)


def test_directories_and_patterns(tmp_path):
    for name in ("b", "a", ".hidden"):
        write_lines(tmp_path / f"{name}.jsonl", {"text": name})
    (tmp_path / "odd").mkdir()
    odd = write_lines(tmp_path / "odd" / "\x1b[31m.jsonl", {"text": 1})
    assert "\x1b" not in Documents(odd, TOKENIZER)[0].where + Documents(odd, TOKENIZER).describe()
    (tmp_path / "README.md").write_text("")
    for source in (tmp_path, str(tmp_path / "?.jsonl"), [tmp_path / "a*", tmp_path / "b.jsonl"]):
        documents = Documents(source, TOKENIZER)
        assert [text_of(documents[i]) for i in range(len(documents))] == ["a", "b"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    for source, error, why in (
        (tmp_path / "*.parquet", FileNotFoundError, "matches no file"),
        (tmp_path / "empty", FileNotFoundError, "holds no .jsonl"),
        (tmp_path / "saved", ValueError, "written by save_to_disk: pass datasets.load_from_disk"),
    ):
        with pytest.raises(error, match=why):
            Documents(source, TOKENIZER)


def test_parquet_files(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    talk = [TALK[1], {"role": "assistant", "tool_calls": [call]}]
    rows = [{"messages": TALK, "id": 1}, {"messages": None, "id": 2}, {"messages": [], "id": 3}]
    rows.append({"messages": talk, "id": 4})
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    documents = Documents(path, TOKENIZER)
    assert [documents[i].bad for i in range(4)] == [None, "empty", "empty", None]
    assert documents[0].tokens.tolist() == encode_chat(TOKENIZER, TALK)[0]
    assert documents[3].tokens.tolist() == encode_chat(TOKENIZER, talk)[0]
    assert documents[2].where == f"{path}:3" and "not used: 'id'" in documents.describe()
    assert "nothing in column 'id2': there are " in Documents(path, TOKENIZER, "id2")[2].why
    monkeypatch.setattr(sources, "_FREE", 1 << 20)
    bomb = arrow.table({"text": ["q" * 1000] * 4000})
    parquet.write_table(bomb, path, compression="zstd")
    with pytest.raises(ValueError, match="a.parquet unpacks to more than 200 times its size"):
        Documents(path, TOKENIZER)
    path.write_text("no table")
    with pytest.raises(ValueError, match="a.parquet is not a Parquet file"):
        Documents(path, TOKENIZER)


class Frame:
    """Has a length and is indexed by columns, as a table of pandas."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, name: str) -> Any:
        raise KeyError(name)


def test_sources_that_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        Documents(tmp_path / "nowhere.jsonl", TOKENIZER)
    for nothing in ([], write_lines(tmp_path / "a.jsonl")):
        with pytest.raises(ValueError, match="no rows in"):
            Documents(nothing, TOKENIZER)
    for source, why in (
        ([tmp_path / "a.csv"], "a.csv: training data are .jsonl, .jsonl.gz"),
        (tmp_path / "a.txt", "a.txt: training data are .jsonl"),
        ({"train": []}, r"dict of splits \(train\)"),
        ([tmp_path / "a.jsonl", {"text": "a"}], "of files or a list of rows, not of both"),
        (Frame(), "Frame gives no rows by number .KeyError"),
        (iter([{"text": "a"}]), "gives no rows by number: `Batches` streams it"),
        (3, "int gives no rows"),
    ):
        with pytest.raises(ValueError, match=why):
            Documents(source, TOKENIZER)
    for row in ({"text": "é" * 99}, {"messages": TALK, "tools": [{"name": "f" * 150}]}):
        assert "too long: " in Documents([row], TOKENIZER, max_row_bytes=150)[0].why
    with pytest.raises(ValueError, match="max_row_bytes must be an integer >= 1, got 0"):
        Documents([{"text": "a"}], TOKENIZER, max_row_bytes=0)


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
        {"text": ["q"]},
    ]
    path = write_lines(tmp_path / "a.jsonl", *lines)
    options: dict[str, Any] = dict(shuffle=False, epochs=1)

    iterator = batches(path, **options)
    documents = documents_of(iterator)
    assert [len(d) for d in documents].count(32) == 1 and len(documents) == 4
    cut = len(encode_text(TOKENIZER, "q" * 99)[0]) - 32
    expected = {"rows": 7, "documents": 4, "empty": 1, "malformed": 2, "overlong": 1, "cut": cut}
    assert iterator.counts == {**iterator.counts, **expected}
    assert iterator.reasons == {"no JSON": 1, "empty text": 1, "text must be a text": 1}
    assert [p.split(":")[1] for p in iterator.problems] == ["2", "4", "7"]
    assert "a.jsonl:7: malformed row: text must be a text: this is a list" in iterator.problems[2]
    said = iterator.describe()
    assert f"{path}: 7 rows of format 'text'\nleft out of 7 rows: 1 empty text, 1 no JSON, " in said
    assert "a.jsonl:2: malformed row: no JSON" in said
    assert f"{cut} tokens beyond length 32 are left out" in said
    iterator = batches(path, overlong="skip", **options)
    assert "of 7 rows looked at, 3 are left out: 1 no JSON, " in iterator.describe()
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
        {"length": math.nan},
        {"batch_size": 2.0},
        {"epochs": -1},
        {"seed": -1},
        {"seed": 1 << 32},
        {"shuffle": "no"},
        {"threads": -1},
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


class Streaming:
    """A streaming dataset: rows one after another, as often as one asks."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


@needs_grain
@pytest.mark.parametrize("shuffle", [False, True])
def test_streams(shuffle):
    rows = [*texts(30), {"text": ""}]
    options = dict(shuffle=shuffle, epochs=2, threads=0)
    stream = batches(Streaming(rows), **options)
    whole, states = [], []
    for batch in stream:
        whole.append(batch)
        states.append(json.dumps(stream.get_state()))
    everything = sorted(tuple(encode_text(TOKENIZER, r["text"])[0]) for r in rows[:-1])
    assert sorted(documents_of(whole)) == sorted(2 * everything)
    assert stream.counts["empty"] == 2 and stream.problems[0].startswith("row 30: empty row")
    if not shuffle:
        assert same(whole, list(batches(rows, **options)))
    for at in (0, len(states) // 2, len(states) - 1):
        resumed = batches(Streaming(rows), **options)
        resumed.set_state(json.loads(states[at]))
        assert same(list(resumed), whole[at + 1 :]) and resumed.counts == stream.counts
    parts = [
        documents_of(batches(Streaming(rows), process_index=i, process_count=3, **options))
        for i in range(3)
    ]
    assert sorted(sum(parts, [])) == sorted(2 * everything)


@needs_grain
def test_the_next_window_is_filled_while_one_is_trained_on():
    """In the background, with the batches, counts, states and errors of the foreground."""
    asked = threading.Semaphore(0)

    class Rows(Streaming):
        def __iter__(self) -> Any:
            for row in self.rows:
                asked.release()
                yield row

    rows = [*texts(12), {"text": ""}, *texts(3)]
    options = dict(shuffle=False, epochs=1, window=2, batch_size=2)
    plain, ahead = (batches(Rows(rows), threads=n, **options) for n in (0, 1))
    first = next(plain)
    while asked.acquire(blocking=False):
        pass
    assert same([next(ahead)], [first]) and ahead.counts == plain.counts
    needed = plain.counts["rows"] + 1  # the one that found no room
    for _ in range(needed + 1):
        assert asked.acquire(timeout=10)  # nobody has asked for a second batch
    for expected in plain:
        assert same([next(ahead)], [expected])
        assert ahead.counts == plain.counts and ahead.get_state() == plain.get_state()
    assert next(ahead, None) is None and ahead.reasons == plain.reasons != {}
    strict = batches(Rows(rows), on_bad="error", threads=1, **options)
    for _ in range(2):  # the error comes where the window does, and comes again
        with pytest.raises(ValueError, match="row 12: empty row"):
            list(strict)


@needs_grain
def test_streams_that_cannot_be():
    once = documents_of(batches((r for r in texts(9)), epochs=1))
    assert len(once) == 9
    with pytest.raises(ValueError, match="generator can be read only once: pass epochs=1"):
        list(batches((r for r in texts(9)), epochs=2))
    with pytest.raises(ValueError, match="no rows in Streaming"):
        next(batches(Streaming([])))
    with pytest.raises(ValueError, match="row 0: column 'kto_tag': preference data"):
        next(batches(Streaming([{"instruction": "a", "output": "b", "kto_tag": True}])))
    with pytest.raises(ValueError, match="row 1: refused row: another format than row 0"):
        next(batches(Streaming([{"text": "a"}, {"messages": TALK}]), shuffle=False))
    with pytest.raises(ValueError, match="are files or rows, not int"):
        batches(3)


@needs_grain
def test_a_state_of_other_settings_is_refused():
    state = batches(texts(40), seed=1).get_state()
    for change in ({"length": 64}, {"batch_size": 1}, {"seed": 2}, {"process_count": 2}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} .* -> "):
            batches(texts(40), **{"seed": 1, **change}).set_state(state)
    with pytest.raises(ValueError, match="rows 40 -> 41"):
        batches(texts(41), seed=1).set_state(state)
    for source, more in ((texts(40)[::-1], {}), (texts(40), {"template_options": {"a": 1}})):
        with pytest.raises(ValueError, match="fingerprint .* -> "):
            batches(source, seed=1, **more).set_state(state)
    damaged_states: list[Any] = [{}, [], {**state, "settings": {}}]
    for damaged in damaged_states:
        with pytest.raises(ValueError, match="no state|settings"):
            batches(texts(40), seed=1).set_state(damaged)
    batches(texts(40), seed=1, epochs=3, on_bad="error").set_state(state)
