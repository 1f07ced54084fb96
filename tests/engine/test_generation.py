"""Generation: equal to the full forward, rows independent, nothing compiled twice, clear errors."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.config import HybridConfig
from hmf_jax.engine import Engine, New, Request, generate, programs, score, stream, warmup
from hmf_jax.engine.batch import Batch
from hmf_jax.model import HybridLM
from hmf_jax.packed import PackedModel
from hmf_jax.sampling import SamplingParams
from hmf_jax.sharding import make_mesh
from hmf_jax.training.lora import apply_lora
from tests.util import mesh_of, random_model, rel, tiny_config

V = 320
SLOW = pytest.mark.slow
_compiled: list[str] = []


def _count(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(str(kwargs.get("fun_name")))


jax.monitoring.register_event_duration_secs_listener(_count)


def build(kinds: tuple[str, ...], mesh=None) -> HybridLM:
    """A random float32 model whose next-token distributions are far from flat."""
    config = HybridConfig.preset("tiny", layer_kinds=kinds)
    model = HybridLM.init(config, dtype=jnp.float32, mesh=mesh, seed=1)
    assert model.lm_head is not None
    model.lm_head.kernel.set_value(30 * model.lm_head.kernel[...])
    return model


@pytest.fixture(scope="module")
def model() -> HybridLM:
    return build(("*", "GKA"))


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, n).tolist() for n in lengths]


def check_greedy(model: HybridLM, prompts, generations) -> None:
    """Every new token is the argmax of one full forward over prompt + output; so its logprob."""
    rows = [p + g.tokens for p, g in zip(prompts, generations, strict=True)]
    tokens = np.array(list(zip_longest(*rows, fillvalue=0))).T
    mask = np.arange(tokens.shape[1]) < np.array([[len(r)] for r in rows])
    forward = jax.jit(lambda m, t, s: m(t, segment_ids=s)[0])
    logprobs = np.asarray(jax.nn.log_softmax(forward(model, tokens, mask.astype(np.int32)), -1))
    for i, (prompt, g) in enumerate(zip(prompts, generations, strict=True)):
        predicted = logprobs[i, len(prompt) - 1 : len(rows[i]) - 1]
        assert predicted.argmax(-1).tolist() == g.tokens
        np.testing.assert_allclose(g.logprobs, predicted.max(-1), atol=2e-3)


@pytest.mark.parametrize(
    "kinds",
    [("*", "M2", "SWA"), pytest.param(("*", "GKA", "GDN", "M2", "BMF", "SWA"), marks=SLOW)],
)
def test_all_kinds_equal_the_full_forward(kinds):
    """Different lengths in one batch, several chunks, and past two windows of 16."""
    model = build(kinds)
    prompts = prompts_of(1, 40, 70)
    out = generate(model, prompts, max_new_tokens=70, prefill_chunk=32, logprobs=True)
    assert [(len(g.tokens), g.finish_reason) for g in out] == [(70, "length")] * 3
    check_greedy(model, prompts, out)


@pytest.mark.slow
def test_chunk_size_changes_nothing(model):
    prompts = prompts_of(50, 3)
    settings: dict[str, Any] = dict(max_new_tokens=12, logprobs=True)
    out = generate(model, prompts, prefill_chunk=7, **settings)
    check_greedy(model, prompts, out)
    other = generate(model, prompts, prefill_chunk=32, **settings)
    assert [g.tokens for g in other] == [g.tokens for g in out]


def test_a_row_does_not_depend_on_its_batch(model):
    prompts = prompts_of(9, 31, 2, 17)
    params = [
        SamplingParams(temperature=0.8, seed=1),
        SamplingParams(temperature=1.2, top_k=20, top_p=0.9, seed=1),
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(temperature=0.8, min_p=0.05, repetition_penalty=1.1, seed=7),
    ]
    limits = [20, 5, 11, 20]

    def run(rows: list[int]) -> list[list[int]]:
        out = generate(
            model,
            [prompts[i] for i in rows],
            sampling=[params[i] for i in rows],
            max_new_tokens=[limits[i] for i in rows],
        )
        return [g.tokens for g in out]

    pairs = [run([i, (i + 1) % 4]) for i in range(4)]  # each row in both places of a pair
    assert [[len(t) for t in pair] for pair in pairs] == [[20, 5], [5, 11], [11, 20], [20, 20]]
    assert [pair[0] for pair in pairs] == [pairs[i - 1][1] for i in range(4)]


def test_seeds(model):
    prompt = prompts_of(9)[0]
    hot = [SamplingParams(temperature=1.0, seed=s) for s in (1, 2, 1)]
    (a, b), (c, d) = (
        [g.tokens for g in generate(model, [prompt] * 2, max_new_tokens=10, sampling=pair)]
        for pair in (hot[:2], hot[1:])
    )
    assert a == d and b == c and a != b


def test_repetition_penalty_sees_prompt_and_output(model):
    strong = SamplingParams(repetition_penalty=1e6)
    prompt = prompts_of(30)[0]
    out, _ = generate(model, [prompt] * 2, max_new_tokens=60, sampling=strong)
    # Seen tokens are pushed to about 0 or far below; unseen ones with positive logits win.
    assert len(set(out.tokens)) == 60 and not set(out.tokens) & set(prompt)


def test_end_tokens(model):
    prompts = prompts_of(5, 12)
    free = [g.tokens for g in generate(model, prompts, max_new_tokens=20, eos_ids=())]
    end = free[0][6]
    first = free[0].index(end)
    absent = next(t for t in range(V) if t not in free[0] + free[1])
    a, b = generate(model, prompts, max_new_tokens=20, eos_ids=[[absent, end], [absent]])
    assert a.tokens == free[0][: first + 1] and a.finish_reason == "eos"
    assert b.tokens == free[1] and b.finish_reason == "length"
    both, _ = generate(model, prompts, max_new_tokens=20, eos_ids=(absent, end))
    assert both == a
    immediate, _ = generate(model, prompts, max_new_tokens=20, eos_ids=(free[0][0],))
    assert immediate.tokens == free[0][:1] and immediate.finish_reason == "eos"
    with_config = dataclasses.replace(model.config, eos_token_id=(absent, end))
    leaves, tree = jax.tree.flatten(model)
    same = jax.tree.unflatten(tree, leaves)
    same.config = with_config
    assert generate(same, prompts, max_new_tokens=20)[0] == a


def test_full_state_ends_a_row(model):
    prompt = prompts_of(30)[0]
    (free,) = generate(model, [prompt], max_new_tokens=20)
    (out,) = generate(model, [prompt], max_new_tokens=500, capacity=256)
    assert out.finish_reason == "capacity" and len(out.tokens) == 226
    assert out.tokens[:20] == free.tokens and free.finish_reason == "length"
    (exact,) = generate(model, [prompt], max_new_tokens=226, capacity=256)
    assert exact.tokens == out.tokens and exact.finish_reason == "length"


def test_num_iter_per_prompt(model):
    prompt = prompts_of(20)[0]
    one = {
        n: generate(model, [prompt] * 2, max_new_tokens=8, num_iter=n)[0].tokens for n in (0, 30)
    }
    both = generate(model, [prompt] * 2, max_new_tokens=8, num_iter=[0, 30])
    assert [g.tokens for g in both] == [one[0], one[30]]
    assert one[0] != one[30]
    assert generate(model, [prompt] * 2, max_new_tokens=8)[0].tokens == one[30]


@pytest.mark.slow
def test_the_other_solver(model):
    """Its tokens are those of forward passes with it."""
    prompts = prompts_of(20, 9)
    settings: dict[str, Any] = dict(solver="cg", num_iter=3)
    out = generate(model, prompts, max_new_tokens=8, logprobs=True, **settings)
    for prompt, g in zip(prompts, out, strict=True):
        tokens = jnp.array([prompt + g.tokens])
        expected = score(model, tokens, **settings)[0, len(prompt) - 1 :]
        np.testing.assert_allclose(np.array(g.logprobs), expected, atol=2e-3)
    assert [g.tokens for g in out] != [
        g.tokens for g in generate(model, prompts, max_new_tokens=8, num_iter=3)
    ]


def test_second_prompt_compiles_nothing(model):
    def run(length: int, **settings):
        prompts = prompts_of(length, 3, seed=length)
        return generate(model, prompts, max_new_tokens=9, prefill_chunk=64, **settings)

    run(100)
    before = len(_compiled)
    run(119, num_iter=30)  # the config's own
    run(95, logprobs=True, sampling=[SamplingParams(top_p=0.5, temperature=0.1), SamplingParams()])
    assert len(_compiled) == before
    run(100, num_iter=7)  # the first other number
    before = len(_compiled)
    run(121, num_iter=3, eos_ids=(1, 2, 3), sampling=SamplingParams(temperature=1.0, top_k=3))
    run(95, num_iter=[0, 12])
    assert len(_compiled) == before
    jax.jit(lambda x: x + before)(1.0)  # the counter does count
    assert len(_compiled) > before


@pytest.mark.parametrize("adapters", [False, True])
def test_one_sequence_multiplies_no_single_rows(adapters):
    """XLA for GPUs makes something slow of those; see `hmf_jax.layers.one_row_twice`."""
    model = build(("*", "GKA", "BMF", "M2"))
    model = apply_lora(model, rank=2) if adapters else model
    step = jax.jit(lambda model, tokens, state: model(tokens, state=state)[0])
    args = model, jnp.zeros((1, 1), jnp.int32), model.init_state(1, 16)
    text = step.lower(*args).as_text()
    rows = re.findall(r"dot_general .*: \(tensor<1x(\d+)x\d+xf32>, tensor<\d+x\d+xf32>\)", text)
    assert len(rows) > 20 and set(rows) == {"2"}
    assert re.search(rf"gather.*: \(tensor<{V}x\d+xf32>, tensor<1x2x1xi32>\)", text)


def test_packed_models_share_programs():
    """Models of one structure use one program; packing copies nothing."""
    traced, tokens = [], jnp.arange(6)[None]

    @jax.jit
    def run(packed: PackedModel, tokens: jax.Array) -> jax.Array:
        traced.append(packed)
        return packed.model()(tokens)[0]

    for kinds, count in ((("GKA", "*"), 1), (("*", "GKA"), 2)):
        for seed in (0, 1):
            one = random_model(tiny_config(kinds), jnp.float32, seed)
            packed = PackedModel.of(one)
            assert all(a is b for a, b in zip(packed.arrays, jax.tree.leaves(one), strict=True))
            assert rel(run(packed, tokens), one(tokens)[0]) < 1e-5
        assert len(traced) == count


@pytest.mark.slow
def test_warmup_compiles_everything(model):
    settings: dict[str, Any] = dict(capacity=200, prefill_chunk=128)
    warmup(model, **settings)
    before = len(_compiled)
    for length in (2, 70, 128, 129, 195):
        generate(model, prompts_of(length), max_new_tokens=4, **settings)
    assert len(_compiled) == before


def tokens_of(events, id: int) -> list[int]:
    return [t for e in events if isinstance(e, New) and e.id == id for t in e.tokens]


def test_stopping_one_row_leaves_the_other(model):
    prompts = prompts_of(5, 12)
    expected = generate(model, prompts, max_new_tokens=20)[1].tokens
    batch = Batch(model, [Request(prompt, 20) for prompt in prompts])
    got = tokens_of(batch.step(), 1)
    batch.abort(0)
    while batch.busy:
        events = batch.step(4)
        assert tokens_of(events, 0) == []
        got += tokens_of(events, 1)
    assert got == expected and batch.step() == []


@pytest.mark.slow
def test_mesh_gives_the_same_tokens_and_compiles_once(model):
    mesh = make_mesh(dp=2, tp=2, devices=jax.devices()[:4])
    sharded = build(("*", "GKA"), mesh)
    prompts = prompts_of(40, 9)
    hot = [SamplingParams(temperature=0.9, top_p=0.9, seed=s) for s in (1, 2)]
    settings: dict[str, Any] = dict(max_new_tokens=8, prefill_chunk=32, sampling=hot)
    expected = [g.tokens for g in generate(model, prompts, **settings)]
    assert [g.tokens for g in generate(sharded, prompts, **settings)] == expected
    before = len(_compiled)
    generate(sharded, prompts_of(90, 3), **settings)
    assert len(_compiled) == before


@pytest.mark.parametrize(
    "axes",
    [
        {"fsdp": 2, "tp": 2},
        *(pytest.param({axis: 2}, marks=SLOW) for axis in ("dp", "fsdp", "tp")),
    ],
    ids=str,
)
def test_one_program_each_on_every_mesh(axes):
    """What a program returns lies as it takes it, so that none is compiled for several layouts."""
    model = HybridLM.init(
        tiny_config(("*", "GKA")),
        dtype=jnp.float32,
        mesh=mesh_of(axes),
    )
    settings: dict[str, Any] = dict(capacity=256, prefill_chunk=16, eos_ids=(), max_new_tokens=70)

    def compiled(count: int, **more: Any) -> dict[str, int]:
        before = len(_compiled)
        generate(model, [[1] * 40, [2] * 40, [3] * 40][:count], **settings, **more)
        names = [name.removeprefix("jit(").removesuffix(")") for name in _compiled[before:]]
        return {name: names.count(name) for name in sorted(set(names))}

    # A first and a later piece of a prompt are two programs.
    assert compiled(2) == {"decode": 1, "empty": 1, "first": 1, "prefill": 2}
    assert compiled(2) == {}


def test_rows_are_donated():
    """No program holds the rows twice: what it takes them in is what it returns them in."""
    packed = PackedModel.of(build(("*",)))  # what is donated does not depend on the kinds
    rows, logits = programs.empty.on(None)(packed, 2, 256)
    ask = programs.stack_settings(30, [SamplingParams()] * 2, [[]] * 2, [None] * 2)
    tokens, lengths, mask = np.ones((2, 64), np.int32), np.ones(2, np.int32), np.ones(2, bool)
    calls = {
        "prefill": (packed, rows, logits, tokens, lengths, None),
        "first": (rows, logits, mask, lengths, ask),
        "decode": (packed, rows, mask, np.int32(1), ask),
    }
    held = sum(x.nbytes for x in jax.tree.leaves(rows))
    for name, args in calls.items():
        program = getattr(programs, name).on(None).lower(*args).compile()
        assert program.memory_analysis().alias_size_in_bytes >= held, name


def test_halves_of_a_chunk_on_several_devices(model, monkeypatch):
    """Prompts that end in the first half of a chunk and in the second half of a later one."""
    sharded = build(("*", "GKA"), make_mesh(tp=4, devices=jax.devices()[:4]))
    prompts = prompts_of(90, 9)
    settings: dict[str, Any] = dict(max_new_tokens=1, prefill_chunk=48, logprobs=True)
    expected = generate(model, prompts, **settings)
    monkeypatch.setattr(programs, "why_no_hopper", lambda: None)
    monkeypatch.setattr(programs, "SMALLEST_HALF", 24)
    call, seen = HybridLM.__call__, set()

    def spy(self, tokens, **kwargs):
        seen.add(tokens.shape[1])
        return call(self, tokens, **kwargs)

    monkeypatch.setattr(HybridLM, "__call__", spy)
    for a, b in zip(generate(sharded, prompts, **settings), expected, strict=True):
        assert a.tokens == b.tokens
        assert rel(np.array(a.logprobs), np.array(b.logprobs)) < 1e-4
    assert seen == {24}


def test_bad_requests(model):
    engine = Engine(model, 1, capacity=64)
    for request, message in [
        (lambda: Request([1], max_new_tokens=0), "max_new_tokens=0 must be a whole number >= 1"),
        (lambda: Request([1], num_iter=True), "num_iter=True must be"),
        (lambda: Request([1], sampling=0.5), "must be SamplingParams"),  # pyright: ignore
        (lambda: Request([]), "Prompt 0 is empty"),
        (lambda: Request([1] * 64), "Prompt 0 has 64 tokens, which leaves no room"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.add(request())
    assert not engine.busy and engine.step() == []
    with pytest.raises(ValueError, match="less than the 64 there is"):
        engine.grow(32)
    with pytest.raises(ValueError, match="max_position_embeddings=4096"):
        engine.grow(5000)
    with pytest.raises(TypeError, match=r"Request\(after=...\) is gone: submit the whole prompt"):
        Request([1], after=7)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "at least one list"),
        ([[]], {}, "Prompt 0 is empty"),
        ([[1], []], {}, "Prompt 1 is empty"),
        ([1, 2, 3], {}, r"Put a single prompt into a list: \[prompt\]"),
        ([[0.5]], {}, "not integer token ids"),
        ([[V]], {}, f"token id {V}, outside the vocabulary of {V}"),
        ([[-1]], {}, "token id -1, outside"),
        ([[1] * 40], {"capacity": 40}, "Prompt 0 has 40 tokens.* no room in a capacity of 40"),
        ([[1] * 4096], {}, "no room in a capacity of 4096"),
        ([[1]], {"capacity": 5000}, "more than max_position_embeddings=4096"),
        ([[1]], {"capacity": 0}, "capacity=0 must be a whole number >= 1"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk=0 must be a whole number >= 1"),
        ([[1]], {"num_iter": -1}, "num_iter=-1 must be a whole number >= 0"),
        ([[1]], {"max_new_tokens": 2**31}, "max_new_tokens=2147483648 must be a whole number < 2"),
        ([[1], [2]], {"num_iter": [3, -2]}, "num_iter=-2 must be"),
        ([[1]], {"num_iter": 1.5}, "num_iter"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number >= 1"),
        ([[1]], {"max_new_tokens": [1, 2]}, "max_new_tokens has 2 entries for 1 prompts"),
        ([[1]], {"sampling": [SamplingParams()] * 2}, "2 sampling settings for 1 prompts"),
        ([[1], [2]], {"eos_ids": [[1]]}, "1 lists of end tokens for 2 prompts"),
    ],
)
def test_bad_input(model, monkeypatch, prompts, settings, message):
    monkeypatch.setattr(programs, "prefill", None)  # nothing may run
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **settings)
    with pytest.raises(ValueError, match=message):
        stream(model, prompts, **settings)  # at the call, not at the first next()


@pytest.mark.slow
def test_compilation_cache_serves_the_next_process(tmp_path):
    code = (
        "import jax, jax.numpy as jnp, hmf_jax as g\n"
        "hits = []\n"
        "jax.monitoring.register_event_listener(lambda e, **k: hits.append(e))\n"
        f"assert g.enable_compilation_cache({str(tmp_path)!r}).is_dir()\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.jit(lambda x: jnp.tanh(x) @ x)(jnp.ones((8, 8)))\n"
        "print(sum('cache_hits' in h for h in hits))\n"
    )
    run = [sys.executable, "-c", code]
    hits = [subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ).stdout]
    assert list(tmp_path.iterdir())
    hits += [subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ).stdout]
    assert int(hits[0]) == 0 and int(hits[1]) > 0
