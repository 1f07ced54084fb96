"""What a request may ask for, rows that fail, and engines that cannot go on."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax import engine as of_requests
from hmf_jax.engine import Engine, Finished, Request, programs, stream
from hmf_jax.engine.batch import Batch
from hmf_jax.engine.failure import first_bad_layer
from hmf_jax.model import HybridLM
from hmf_jax.packed import PackedModel
from hmf_jax.sampling import SamplingParams
from tests.util import random_model, tiny_config

V = 64
generate: Any = of_requests.generate  # fields of outputs may be None; here they were asked for
ONE, TWO = [5, 6, 7], [9, 3, 3, 1, 8]
SMALL: dict[str, Any] = dict(capacity=64, eos_ids=())
HOT = SamplingParams(temperature=1.0, seed=4)


@pytest.fixture(scope="module")
def model() -> HybridLM:
    return random_model(tiny_config(("*",)), jnp.float32)


def forbid(logits, context):
    """No token twice in a row, and none of the first ones in the first two steps."""
    tokens = jnp.arange(V)
    again = tokens == context.token[:, None]
    early = (context.step[:, None] < 2) & (tokens < 32)
    return jnp.where(again | early, -jnp.inf, logits)


# One row asks for everything, so that all tests below share one program.
ALL = SamplingParams(
    temperature=0.7, presence_penalty=1.5, frequency_penalty=0.5, logit_bias={63: -np.inf, 40: 2.0}
)


def run(model: HybridLM, first: SamplingParams, **settings: Any):
    """`first` beside a row that asks for everything."""
    options = {**SMALL, "max_new_tokens": 12, "logprobs": 4, "processor": forbid, **settings}
    options["min_new_tokens"] = [options.pop("least", 0), 1]
    return generate(model, [ONE, TWO], sampling=[first, ALL], **options)


@pytest.fixture(scope="module")
def plain(model) -> list[Any]:
    return generate(model, [ONE, TWO], max_new_tokens=12, sampling=HOT, logprobs=True, **SMALL)


def test_a_smaller_limit_gives_a_prefix(model, plain):
    """Random bits belong to positions, whatever the limits, and whoever is in the batch."""
    some = generate(model, [ONE, TWO], max_new_tokens=[4, 7], sampling=HOT, **SMALL)
    assert [g.tokens for g in some] == [plain[0].tokens[:4], plain[1].tokens[:7]]
    other = generate(model, [TWO, TWO], max_new_tokens=12, sampling=HOT, **SMALL)
    assert [g.tokens for g in other] == [plain[1].tokens] * 2


def test_stream_yields_the_tokens_of_generate(model, plain):
    options: dict[str, Any] = dict(tokens_per_dispatch=6, sampling=HOT, **SMALL)
    steps = list(stream(model, [ONE, TWO], max_new_tokens=[12, 4], **options))
    found = [[token for step in steps for token in step[i]] for i in range(2)]
    assert found == [plain[0].tokens, plain[1].tokens[:4]]
    # With the token after its prompt, a row may decode at once.
    assert all(0 < max(map(len, step)) <= 7 for step in steps)


def test_everything_at_once(model):
    """Each row does what it was asked for, and does not notice the other one."""
    greedy, everything = run(model, SamplingParams())
    assert 63 not in everything.tokens and everything.logprobs is not None
    for g in (greedy, everything):
        assert all(a != b for a, b in zip(g.tokens, g.tokens[1:], strict=False))
        assert min(g.tokens[:2]) >= 32 and len(g.tokens) == 12
        assert [list(top.values()) for top in g.top_logprobs] == [
            sorted(top.values(), reverse=True) for top in g.top_logprobs
        ]
        for token, logprob, top in zip(g.tokens, g.logprobs, g.top_logprobs, strict=True):
            assert len(top) == 4 and logprob == pytest.approx(top.get(token, logprob), abs=1e-6)
    beside, again = run(
        model, dataclasses.replace(HOT, logit_bias={7: 50.0}), max_new_tokens=[3, 12]
    )
    assert again == everything and beside.tokens != greedy.tokens[:3]


def test_a_large_bias_decides(model):
    """Where the processor, which comes after it, allows it: at every second token."""
    tokens = run(model, SamplingParams(logit_bias={50: 1000.0}))[0].tokens
    assert tokens[::2] == [50] * 6 and 50 not in tokens[1::2]


def test_no_end_token_before(model):
    free = run(model, SamplingParams())[0].tokens
    end = next(t for t in free[1:] if t != free[0])
    assert run(model, SamplingParams(), eos_ids=[[end], []])[0].tokens[-1] == end
    late = run(model, SamplingParams(), eos_ids=[[end], []], least=9)[0]
    assert end not in late.tokens[:9] and len(late.tokens) >= 9


def test_log_probabilities_of_prompts(model, plain):
    """What was generated, read as a prompt, has the log-probabilities it was generated with."""
    rows = [ONE + plain[0].tokens, TWO + plain[1].tokens]
    found = generate(model, rows, max_new_tokens=1, prompt_logprobs=3, **SMALL)
    for prompt, row, before, g in zip((ONE, TWO), rows, plain, found, strict=True):
        assert len(g.prompt_logprobs) == len(g.prompt_top_logprobs) == len(row)
        assert g.prompt_logprobs[0] is None and g.prompt_top_logprobs[0] is None
        np.testing.assert_allclose(g.prompt_logprobs[len(prompt) :], before.logprobs, atol=1e-5)
        places = zip(row, g.prompt_logprobs, g.prompt_top_logprobs, strict=True)
        for token, value, top in list(places)[1:]:
            assert len(top) == 3 and value == pytest.approx(top.get(token, value), abs=1e-6)
            assert value <= max(top.values()) + 1e-6
        assert g.logprobs is None and g.top_logprobs is None


def test_arrays_of_prompts(model):
    tokens = np.array([[5, 6, 7], [1, 2, 3]])
    expected = generate(model, tokens.tolist(), max_new_tokens=3, **SMALL)
    assert generate(model, tokens, max_new_tokens=np.array([3, 3]), **SMALL) == expected
    assert generate(model, jnp.array(tokens), max_new_tokens=jnp.array(3), **SMALL) == expected


def test_settings_by_name(model, plain):
    for settings in ({"temperature": 1.0, "seed": 4}, {"do_sample": True, "seed": 4}):
        assert (
            generate(model, [ONE, TWO], max_new_tokens=12, logprobs=True, **settings, **SMALL)
            == plain
        )
        assert (
            generate(
                model, [ONE, TWO], max_new_tokens=12, logprobs=True, sampling=settings, **SMALL
            )
            == plain
        )


def test_generation_config(model, plain, tmp_path):
    """The file's settings hold where the caller says nothing; end tokens add to the config's."""
    end = plain[0].tokens[5]
    stored = {
        "do_sample": True,
        "temperature": 0.5,
        "eos_token_id": [end],
        "max_new_tokens": 6,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    leaves, tree = jax.tree.flatten(model)
    loaded = jax.tree.unflatten(tree, leaves)
    loaded.source = str(tmp_path)
    options: dict[str, Any] = dict(max_new_tokens=12, capacity=64)
    got = generate(loaded, [ONE, TWO], temperature=1.0, seed=4, **options)
    assert got[0].tokens == plain[0].tokens[: plain[0].tokens.index(end) + 1]
    got = generate(loaded, [ONE, TWO], seed=4, eos_ids=(), **options)
    expected = generate(model, [ONE, TWO], temperature=0.5, seed=4, eos_ids=(), **options)
    assert got == expected
    greedy = generate(model, [ONE, TWO], eos_ids=(), **options)
    short = generate(loaded, [ONE, TWO], eos_ids=(), capacity=64)
    assert [len(g.tokens) for g in short] == [6, 6]
    for off in ({"sampling": SamplingParams()}, {"do_sample": False}, {"temperature": 0}):
        assert generate(loaded, [ONE, TWO], eos_ids=(), **off, **options) == greedy
    for text, message in [
        ("{", "generation_config.json"),
        ('{"do_sample": 1}', "generation_config.json: do_sample=1 must be"),
        ('{"do_sample": true, "top_p": 7}', "generation_config.json: top_p=7"),
    ]:
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            generate(loaded, [ONE, TWO], **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temprature": 0.5}, "'temprature' is no sampling setting; did you mean 'temperature'"),
        ({"sampling": {"topp": 0.5}}, "did you mean 'top_p'"),
        ({"sampling": SamplingParams(), "top_p": 0.5}, "Both sampling= and top_p"),
        ({"sampling": 0.5}, "must be SamplingParams, or a dict"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"do_sample": "no"}, "do_sample='no' must be"),
        ({"do_sample": True, "temperature": 0}, "needs a temperature above 0"),
        ({"do_sample": False, "top_p": 7}, "top_p=7"),
        ({"logit_bias": {64: 1.0}}, "logit_bias names token 64"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias="),
        ({"logit_bias": {3: np.nan}}, "logit_bias="),
        ({"presence_penalty": 3}, r"presence_penalty=3: it must be in \[-2, 2\]"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens=5 is more than"),
        ({"logprobs": -1}, "logprobs=-1 must be"),
        ({"logprobs": 65}, "the vocabulary has 64"),
        ({"prompt_logprobs": 65}, "the vocabulary has 64"),
        ({"processor": 3}, "processor=3 must be a function"),
        ({"num_iter": 3}, "this model has no GKA layers"),
        ({"solver": "cg"}, "no layers with a solver"),
        ({"solver": "newton"}, "solver 'newton' is unknown"),
        ({"slots": 1.5}, "slots=1.5 must be"),
        ({"capacity": 10.5}, "capacity=10.5 must be"),
        ({"eos_ids": 3}, "eos_ids=3 must be a list"),
        ({"eos_ids": [-1]}, "eos_ids=-1 must be"),
        ({"max_new_tokens": "many"}, "max_new_tokens='many' must be"),
    ],
)
def test_bad_settings(model, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [ONE], **settings)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (np.array([1, 2]), r"Put a single prompt into a list: \[prompt\]"),
        (np.ones((1, 2)), "holds float64"),
        (np.ones((1, 2, 3), int), r"must be \[B, T\]"),
        (["text"], "Prompt 0 is text; use generate_text"),
    ],
)
def test_bad_prompts(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts)


def test_greedy_that_asks_for_filters_warns():
    with pytest.warns(UserWarning, match="do_sample=False is greedy, so top_p changes nothing"):
        assert SamplingParams.of({"do_sample": False, "top_p": 0.5}) == SamplingParams()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what a file says is no reason to warn
        assert SamplingParams.of({"do_sample": False}, {"top_p": 0.5}) == SamplingParams()
        assert SamplingParams.of({}, {"temperature": 0.5}) == SamplingParams()
        assert SamplingParams.of({"top_k": 5}).temperature == 1
        assert SamplingParams.of({"top_k": 5}, {"temperature": 0.5}).temperature == 0.5
        assert SamplingParams.of({"seed": 5}) == SamplingParams(seed=5)


def broken(model: HybridLM, value: float = np.nan) -> HybridLM:
    """The same model, whose token 63 has an embedding that is not finite."""
    leaves, tree = jax.tree.flatten(model)
    copy = jax.tree.unflatten(tree, leaves)
    copy.embed_tokens.embedding.set_value(model.embed_tokens.embedding[...].at[63].set(value))
    return copy


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_fails(model, plain, value):
    """It says where, and its neighbour is what it is without it, bit for bit."""
    bad, tokens = broken(model, value), [1, 63, 2]
    options: dict[str, Any] = dict(max_new_tokens=12, sampling=HOT, logprobs=True, **SMALL)
    message = "row 0, new token 0: the logits are NaN or infinite; the first to be so is the embed"
    with pytest.warns(RuntimeWarning, match=f"1 of 2 rows failed: {message}"):
        first, second = generate(bad, [tokens, TWO], **options)
    assert first.tokens == [] and first.finish_reason == "error"
    assert first.error is not None and first.error.startswith(message)
    assert second == plain[1]
    with pytest.raises(FloatingPointError, match=message):
        generate(bad, [tokens], slots=2, **options)
    pieces = []
    with pytest.raises(FloatingPointError, match=message):
        for new in stream(bad, [tokens, TWO], max_new_tokens=12, sampling=HOT, **SMALL):
            pieces.append(new)
    assert sum((new[1] for new in pieces), []) == plain[1].tokens


def test_a_row_that_fails_later(model):
    """It keeps the tokens before; its neighbour is what it is beside any other row."""
    expected = run(model, SamplingParams())[1]
    with pytest.warns(RuntimeWarning, match="row 0, new token 1: the logits are NaN"):
        first, second = run(broken(model), SamplingParams(logit_bias={63: 1000.0}))
    assert first.tokens == [63] and first.error is not None and len(first.logprobs or []) == 1
    assert second == expected


def test_nobody_goes_on_from_a_row_that_failed(model, plain):
    """Its slot is used again, and nothing is left of it."""
    engine = Engine(broken(model), 2, capacity=64, pages=2, prefixes="fast", spacing=1)

    def answer(prompt, **ask):
        id, events = engine.add(Request(prompt, 12, HOT, **ask)), []
        while engine.busy:
            events += engine.step()
        return [e for e in events if e.id == id]

    bad = [*TWO, 63, 2]
    for _ in range(2):
        started, end = answer(bad, cuts=(5, 6))
        assert started.cached == 0 and end.reason == "error"
        assert end.error.startswith("new token 0: the logits are NaN")
    started, *new, end = answer(ONE)
    tokens = [token for event in new for token in event.tokens]
    assert (started.cached, tokens, end.reason) == (0, plain[0].tokens, "length")


def test_finite_is_read_off_what_is_there(model):
    """No pass over the logits [B, V] for it, nor for anything that nobody asked for."""
    rows, logits = jax.eval_shape(lambda p: programs.empty(p, 2, 64), PackedModel.of(model))
    plain = programs.stack_settings(None, [SamplingParams()] * 2, [[]] * 2, [None] * 2)
    text = jax.jit(programs.next_token).lower(rows, logits, plain).as_text()
    assert "stablehlo.is_finite" in text
    assert not re.search(rf"is_finite .*tensor<2x{V}x", text)
    assert not re.search(rf"scatter.*\n?.*tensor<2x{V}xf32>", text)


def test_first_bad_layer(model):
    """Every part is named."""

    def look(spoil) -> str | None:
        leaves, tree = jax.tree.flatten(model)
        copy = jax.tree.unflatten(tree, leaves)
        spoil(copy)
        return first_bad_layer(copy, ONE, num_iter=None, chunk=3, capacity=8)

    def nan(parameter) -> None:
        parameter.set_value(parameter[...].at[..., 0].set(jnp.nan))

    assert look(lambda m: None) is None
    assert look(lambda m: nan(m.lm_head.kernel)) == "the output head"
    assert look(lambda m: nan(m.layers[0].mixer.o_proj.kernel)) == (
        "the mixer of layer 0 (full attention)"
    )
    assert look(lambda m: nan(m.layers[0].mlp.up_proj.kernel)) == (
        "the MLP of layer 0 (full attention)"
    )


def test_an_exception_in_a_step_stops_the_engine(model, monkeypatch):
    engine = Engine(model, 2, capacity=64)
    engine.add(Request(ONE))
    monkeypatch.setattr(engine._device, "collect", lambda ticket: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        while True:
            engine.step()
    for call in (engine.step, lambda: engine.add(Request(ONE))):
        with pytest.raises(RuntimeError, match=r"middle of a step \(ZeroDivisionError.*recover"):
            call()
    assert engine.recover() == [Finished(0, "error", "ZeroDivisionError: division by zero")]
    engine.add(Request(ONE, 2))
    assert [e for _ in range(3) for e in engine.step() if isinstance(e, Finished)]


def test_states_that_run_ahead(model):
    """What counts is where positions end, not how many tokens a state holds."""
    longest = model.config.max_position_embeddings
    state, asked = model.init_state(1, 64), [Request(ONE)]
    ahead = dataclasses.replace(state, position=jnp.array([longest - 63]))
    with pytest.raises(ValueError, match="capacity=64 is more than max_position_embeddings=512"):
        Batch(model, asked, state=ahead)
    Batch(model, asked, state=dataclasses.replace(ahead, position=ahead.position - 1))
    other = random_model(tiny_config(("*",)), jnp.bfloat16).init_state(1, 64)
    with pytest.raises(ValueError, match="layer 0 is AttentionState.*bfloat16.*but the model's"):
        Batch(model, asked, state=other)
    with pytest.raises(ValueError, match="capacity=32, but the state was made for 64 tokens"):
        generate(model, [ONE], state=state, capacity=32)
    with pytest.raises(ValueError, match="holds 1 rows, but tokens have 2"):
        generate(model, [ONE, TWO], state=state)
    with pytest.raises(ValueError, match="state is a int"):
        generate(model, [ONE], state=3)
    with pytest.raises(ValueError, match="leave out slots or state"):
        generate(model, [ONE], state=state, slots=1)


def test_a_row_that_fails_after_a_state(model, plain):
    """What its state holds cannot be read again, so its layers are looked at."""
    spoilt = model.init_state(2, 64)
    (layer,) = spoilt.layers
    layer = dataclasses.replace(layer, k=layer.k.at[0].set(jnp.nan))
    spoilt = dataclasses.replace(spoilt, layers=(layer,), length=jnp.array([4, 0]))
    with pytest.warns(RuntimeWarning, match="row 0, new token 0.*the state of layer 0"):
        first, second = generate(
            model, [ONE, TWO], state=spoilt, max_new_tokens=12, sampling=HOT, eos_ids=()
        )
    assert first.finish_reason == "error" and second.tokens == plain[1].tokens
