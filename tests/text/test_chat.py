"""Generated text, conversations and what they keep, what a directory says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hmf_jax.config import HybridConfig
from hmf_jax.engine import Engine, generate
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingParams
from hmf_jax.text import (
    ChatSession,
    ConversationFull,
    default_sampling,
    generate_text,
    load_tokenizer,
    stop_ids,
    stream_text,
)
from tests.text.conftest import SIZE, TOKENIZER
from tests.text.scripted import script

END = TOKENIZER.eos_token_id
HOT = SamplingParams(temperature=1.0, seed=3)


def prompt_of(chat: ChatSession, messages: int) -> list[int]:
    """What the template makes of the first messages, with the beginning of a reply."""
    text = TOKENIZER.apply_chat_template(
        chat.messages[:messages], tokenize=False, add_generation_prompt=True
    )
    return TOKENIZER.encode(text)


# --- generated text ---------------------------------------------------------------------------


def test_generate_text_is_generate_between_two_codecs(model):
    prompts = ["The quick", "A hybrid model keeps"]
    replies = generate_text(model, prompts, TOKENIZER, max_new_tokens=20)
    tokens = generate(model, [TOKENIZER.encode(p) for p in prompts], max_new_tokens=20)
    assert [r.tokens for r in replies] == [g.tokens for g in tokens]
    assert [r.text for r in replies] == [TOKENIZER.decode(g.tokens) for g in tokens]
    streamed = "".join(stream_text(model, prompts[0], TOKENIZER, max_new_tokens=20))
    assert str(replies[0]) == streamed
    assert len(replies[0].logprobs) == len(replies[0].tokens)


def test_stop_string_ends_one_row_only(model):
    free = generate_text(model, ["One", "Two"], TOKENIZER, sampling=HOT, max_new_tokens=40)
    stop = next(
        free[0].text[i : i + 2]
        for i in range(3, 20)
        if free[0].text.find(free[0].text[i : i + 2]) == i
        and free[0].text[i : i + 2] not in free[1].text
    )
    a, b = generate_text(
        model, ["One", "Two"], TOKENIZER, sampling=HOT, max_new_tokens=40, stop=stop
    )
    assert a.text == free[0].text[: free[0].text.index(stop)] and a.finish_reason == "stop"
    assert a.tokens == free[0].tokens[: len(a.tokens)]
    assert b == free[1]


def test_bad_text_input(model):
    with pytest.raises(ValueError, match="Prompt 0 is empty"):
        generate_text(model, "", TOKENIZER)
    with pytest.raises(ValueError, match="non-empty strings"):
        generate_text(model, "hi", TOKENIZER, stop=["a", ""])
    with pytest.raises(ValueError, match="num_iter=-1"):
        generate_text(model, "hi", TOKENIZER, num_iter=-1)
    with pytest.raises(ValueError, match="pass tokenizer="):
        generate_text(model, "hi")


# --- conversations ----------------------------------------------------------------------------


def test_conversation(session):
    chat = session(system="Be brief.", max_new_tokens=12, stop=())
    first = chat.send("Hi é!")
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi é!"},
        {"role": "assistant", "content": first.text},
    ]
    assert first.prefilled == len(prompt_of(chat, 2))
    assert chat.last is first and len(first.tokens) == 12


def reply_tokens(text: str, end: bool = True) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False) + [END] * end


@pytest.mark.parametrize("ended", [True, False])
def test_second_turn_reads_only_what_is_new(monkeypatch, ended, session):
    first = reply_tokens("A fox, é.", ended)
    script(monkeypatch, [first, reply_tokens("A dog.")])
    chat = session()
    assert chat.send("Who?").text == "A fox, é."
    engine = chat._engine
    second = chat.send("And then?")
    assert second.text == "A dog." and chat._engine is engine
    # The newest token of a reply has not been read.
    held = len(prompt_of(chat, 1)) + len(first) - 1
    assert second.prefilled == len(prompt_of(chat, 3)) - held
    chat.reset()
    assert chat.messages == [] and chat._engine is None


def test_what_was_kept_gives_the_reply_of_a_fresh_session(monkeypatch, session):
    with monkeypatch.context() as patch:
        script(patch, [reply_tokens("A fox.")])
        chat = session()
        chat.send("Who?")
    cached = chat.send("And then?")
    fresh = session()
    fresh.messages = [dict(m) for m in chat.messages[:2]]
    again = fresh.send("And then?")
    assert again == cached and cached.prefilled < again.prefilled == len(prompt_of(chat, 3))


def test_changed_history_is_read_again(monkeypatch, session):
    script(monkeypatch, [reply_tokens("A fox."), reply_tokens("A dog.")])
    chat = session()
    chat.send("Who?")
    chat.messages[0]["content"] = "What?"
    read, whole = chat.send("And then?").prefilled, len(prompt_of(chat, 3))
    assert whole - 10 < read <= whole  # the template begins alike


def test_stream_is_send_and_may_be_closed(session):
    sent = session().send("Hello").text
    chat = session()
    pieces = list(chat.stream("Hello"))
    assert "".join(pieces) == sent and len(pieces) > 1
    chat.reset()
    stream = chat.stream("Hello")
    first = next(stream)
    stream.close()
    assert chat.last is not None and chat.last.finish_reason == "stop"
    assert chat.messages[-1]["role"] == "assistant"
    assert chat.messages[-1]["content"].startswith(first) and sent.startswith(chat.last.text)
    more = chat.send("Go on")
    assert more.text and more.prefilled < len(prompt_of(chat, 3)) - 5  # the question was kept


def test_interrupt_drops_the_engine_but_not_the_conversation(monkeypatch, session):
    chat = session()

    def interrupt(self, steps=0):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            chat.send("Hello")
    assert chat._engine is None and len(chat.messages) == 2
    assert chat.send("Again").tokens


def test_a_full_conversation(session):
    chat = session(max_new_tokens=500)
    assert chat.send("x" * 930).finish_reason in ("capacity", "eos")
    before = [dict(m) for m in chat.messages]
    with pytest.raises(ConversationFull, match=r"no room for a reply in a capacity of 1024.*reset"):
        chat.send("x" * 90)
    assert chat.messages == before
    assert chat.forget_oldest() and chat.messages == [] and not chat.forget_oldest()
    assert chat.send("x").tokens
    with pytest.raises(ConversationFull, match="capacity of 4096"):
        session(capacity=None).send("z" * 5000)


def test_more_room_reads_nothing_again(session):
    """A conversation that outgrows its engine goes on, as it would in a larger one."""
    growing, roomy = session(capacity=None, max_new_tokens=1), session(max_new_tokens=1)
    for text, capacity in (("y" * 300, 512), ("z" * 300, 1024)):
        said, expected = growing.send(text), roomy.send(text)
        assert said.tokens == expected.tokens and said.prefilled == expected.prefilled < 400
        assert growing._engine is not None and growing._engine.capacity == capacity


def test_the_oldest_turn_is_forgotten(session, monkeypatch):
    script(monkeypatch, [reply_tokens(f"{i}") for i in range(3)])
    chat = session(system="Be brief.")
    for i in range(3):
        chat.send(f"Question {i}")
    said = [m["content"] for m in chat.messages]
    assert said == ["Be brief.", "Question 0", "0", "Question 1", "1", "Question 2", "2"]
    assert chat.forget_oldest()
    assert [m["content"] for m in chat.messages] == [said[0], *said[3:]]
    chat.reset()
    assert [m["content"] for m in chat.messages] == ["Be brief."] and chat.system == "Be brief."


# --- directories ------------------------------------------------------------------------------


def write_dir(path: Path, model: HybridLM | None = None, generation: dict | None = None) -> Path:
    TOKENIZER.save_pretrained(path)
    if model is not None:  # transformers does not know this model type
        (path / "config.json").write_text(json.dumps(model.config.to_dict()))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_load_tokenizer_next_to_an_unknown_model(tmp_path, model):
    path = write_dir(tmp_path, model)
    stored = json.loads((path / "tokenizer_config.json").read_text())
    for name in ("TokenizersBackend", "PreTrainedTokenizerFast", "Qwen2Tokenizer", None):
        stored["tokenizer_class"] = name
        (path / "tokenizer_config.json").write_text(json.dumps(stored))
        tokenizer = load_tokenizer(path)
        assert tokenizer.chat_template == TOKENIZER.chat_template
        assert tokenizer.encode("fox é") == TOKENIZER.encode("fox é")


def test_missing_tokenizer_and_template(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    path = write_dir(tmp_path)
    (path / "chat_template.jinja").unlink()
    bare = load_tokenizer(path)
    with pytest.raises(ValueError, match="no chat template.*generate_text"):
        ChatSession(model, bare)
    assert all(reply.tokens for reply in generate_text(model, ["plain", "text"], bare))


def test_end_tokens_from_all_sources(tmp_path, model):
    path = write_dir(tmp_path, generation={"eos_token_id": [5, END]})
    assert stop_ids(model.config, TOKENIZER, path) == (5, END)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert stop_ids(model.config, TOKENIZER, path) == (7, END)
    assert stop_ids(HybridConfig.preset("tiny"), TOKENIZER, None) == (END,)


def test_sampling_from_generation_config(tmp_path):
    path = write_dir(tmp_path, generation={"temperature": 0.6, "top_k": 20})
    assert default_sampling(path) == SamplingParams()
    stored = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    (path / "generation_config.json").write_text(json.dumps(stored))
    assert default_sampling(path) == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    (path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        default_sampling(path)


def test_session_finds_everything_in_the_models_directory(tmp_path, model):
    import jax

    leaves, tree = jax.tree.flatten(model)
    loaded = jax.tree.unflatten(tree, leaves)
    loaded.source = str(write_dir(tmp_path, model, {"eos_token_id": [5], "do_sample": True}))
    chat = ChatSession(loaded, max_new_tokens=1, **SIZE)
    assert chat.stop_ids == (5, END) and chat.sampling == SamplingParams(temperature=1.0)
    assert len(chat.send("Hello").tokens) == 1
