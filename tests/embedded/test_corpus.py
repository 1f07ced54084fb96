"""The corpus: answers follow from facts and from nothing else; the tokenizer loads from files."""

import random
import re

import numpy as np
import pytest

from hmf_jax.embedded import corpus
from hmf_jax.text import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    corpus.build_tokenizer().save_pretrained(str(directory))
    return load_tokenizer(directory)


def test_tokens_are_bytes_and_any_text_comes_back(tokenizer):
    text = "Gove has 47.\n\t\x00 ü日本  " + "".join(map(chr, range(32, 256)))
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (corpus.END_ID, corpus.PAD_ID)


def test_a_conversation_is_written_like_the_training_rows(tokenizer):
    asked = corpus.questions(random.Random(0), 1, 128, 4, 32)
    facts, question = (tokenizer.decode(x[0]) for x in (asked.context, asked.question))
    ((name, answer),) = re.findall(r"^Q: (\w+)\?\nA: ([^<]*)<\|im_end\|>\n$", question)
    chat = [
        {"role": "system", "content": facts.removesuffix("\n")},
        {"role": "user", "content": f"{name}?"},
        {"role": "assistant", "content": answer},
    ]
    written = tokenizer.apply_chat_template(chat, tokenize=False)
    assert written == facts + question
    prompt = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert written.startswith(prompt) and prompt.endswith("A: ")


@pytest.mark.parametrize("level", range(7))
def test_rows_come_from_the_seed_alone(level):
    first, second, other = (corpus.rows(random.Random(s), 8, 64, level) for s in (0, 0, 1))
    assert first.tokens.shape == first.weights.shape == (8, 64)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.weights, second.weights)
    assert (first.tokens != other.tokens).any()


@pytest.mark.parametrize("level, gap", [(3, "=="), (4, " has "), (5, " has ")])
def test_values_for_bmojo_come_later_than_their_keys(level, gap):
    """A token that counts is a digit, of a number that stands after a gap behind its key."""
    rows = corpus.rows(random.Random(4), 50, 128, level)
    assert set(rows.weights.ravel()) == {np.float32(0.02), np.float32(1)}
    for tokens, weights in zip(rows.tokens, rows.weights, strict=True):
        text = "".join(map(chr, tokens))  # one character per token
        values = [i for m in re.finditer(f"(?<={gap})[0-9]+", text) for i in range(*m.span())]
        assert (weights == 1).any() and set(np.flatnonzero(weights == 1)) <= set(values)


@pytest.mark.parametrize("level", [2, 6])
def test_what_counts_in_a_row_was_said_before_in_it(tokenizer, level):
    """Every run of fully weighted tokens repeats text from earlier in its row."""
    rows = corpus.rows(random.Random(3), 200, 256, level)
    runs = 0
    for tokens, weights in zip(rows.tokens, rows.weights, strict=True):
        edges = np.flatnonzero(np.diff((weights == 1).astype(int), prepend=0, append=0))
        for start, end in edges.reshape(-1, 2):
            run = tokenizer.decode(tokens[start:end])
            assert run.split("|")[0] in tokenizer.decode(tokens[:start])
            runs += 1
    assert runs > 500


def test_questions_are_far_from_facts_and_answered_by_them(tokenizer):
    asked = corpus.questions(random.Random(1), 50, 256, 8, 80)
    for context, question in zip(asked.context, asked.question, strict=True):
        facts = dict(re.findall(r"([A-Z]\w{3}) has (\d\d)\.", tokenizer.decode(context[:-80])))
        assert len(facts) == 8 and not re.search("[A-Z]", tokenizer.decode(context[-80:]))
        (name,) = re.findall(r"Q: (\w+)\?", tokenizer.decode(question))
        assert tokenizer.decode(question[asked.answer]) == facts[name]


def test_questions_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="8 facts and a gap of 80 do not fit into 128"):
        corpus.questions(random.Random(0), 1, 128, 8, 80)
