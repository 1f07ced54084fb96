"""The script behind the embedded models: its parts, and (slow) all of it with a few steps."""

import json
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import contrib

import hmf_jax
from hmf_jax.embedded import corpus, train
from hmf_jax.embedded.fit import optimizer, start
from hmf_jax.embedded.plan import BMOJO, HYBRIDS, MIXERS, NUM_ITER, PLAIN, PRIMED, SMALL, Plan
from hmf_jax.embedded.recall import accuracy, answers, forget
from hmf_jax.embedded.results import summarize, table
from hmf_jax.parameters import flat_params
from hmf_jax.priming import prime
from tests.util import random_model, rel, tiny_config


def test_stacking_parameters_changes_no_update():
    rng = np.random.default_rng(0)
    shapes = {"a.kernel": (4, 6), "b.kernel": (4, 6), "c.kernel": (6, 3), "norm.weight": (4,)}
    shapes |= {"conv.weight": (4, 6), "embedding": (5, 4)}
    params = {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in shapes.items()}
    matrices: Any = {n: contrib.MuonDimensionNumbers() if "kernel" in n else None for n in params}
    plain = contrib.muon(
        0.02, adam_b2=0.98, adam_learning_rate=0.005, muon_weight_dimension_numbers=matrices
    )
    stacked = optimizer()
    one: Any = plain.init(params)
    two: Any = stacked.init(params)
    two = two._replace(hyperparams={**two.hyperparams, "learning_rate": jnp.float32(0.02)})
    plain_update, stacked_update = jax.jit(plain.update), jax.jit(stacked.update)
    for _ in range(3):
        grads = {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in shapes.items()}
        expected, one = plain_update(grads, one, params)
        updates, two = stacked_update(grads, two, params)
        assert max(rel(updates[n], expected[n]) for n in params) < 1e-5
        params = {n: params[n] + updates[n] for n in params}


def test_rates_rise_stay_and_fall():
    rates = Plan(learning_rate=0.5).rates(100)
    assert rates[0] == pytest.approx(0.025) and (rates[19:50] == 0.5).all()
    assert rates[99] == pytest.approx(0.01) and (np.diff(rates[50:]) < 0).all()


@pytest.mark.parametrize("kinds", [("GKA*", "GDN*"), ("M2", "BMF")])
def test_states_start_with_a_long_memory(kinds):
    """The decay per token is 1 / memory in every head; nothing else differs from stage 0."""
    base = random_model(tiny_config(("*", "*"), vocab_size=corpus.VOCAB_SIZE), jnp.float32)
    plain = flat_params(prime(base, kinds, seed=0, **MIXERS))
    params = flat_params(start(base, kinds, 0, 100))
    changed = {name for name in params if bool((params[name] != plain[name]).any())}
    assert changed == {name for name in params if name.endswith("A_log")} and len(changed) == 2
    for name in changed:
        step = jax.nn.softplus(params[name.removesuffix("A_log") + "dt_bias"])
        assert rel(jnp.exp(params[name]) * step, jnp.full(step.shape, 0.01)) < 1e-5


def _asked(seed: int, length: int) -> corpus.Questions:
    return corpus.questions(random.Random(seed), 4, length, 2, 40)


SLOW = pytest.mark.slow  # all recurrent states are forgotten alike


@pytest.mark.parametrize(
    "kind",
    ["GKA", "BMF", "SWA", "*", pytest.param("GDN", marks=SLOW), pytest.param("M2", marks=SLOW)],
)
def test_forgetting_leaves_the_windows_and_nothing_else(kind):
    """One layer: after forgetting, contexts that end alike give the same answers, to the bit."""
    model = random_model(tiny_config((kind,), vocab_size=corpus.VOCAB_SIZE), jnp.float32)
    first, second = _asked(0, 96), _asked(1, 96)
    other = np.concatenate([second.context[:, :56], first.context[:, 56:]], axis=1)

    @jax.jit
    def logits(context, forgetful):
        state = model(context, state=model.init_state(4, 128))[1]
        return model(first.question, state=forget(state, forgetful))[0]

    def depends_on_context(forgetful: bool) -> bool:
        a, b = (logits(context, jnp.array(forgetful)) for context in (first.context, other))
        return bool((a != b).any())

    assert depends_on_context(False) == (kind != "SWA")
    assert depends_on_context(True) == (kind == "*")
    same = logits(first.context, jnp.array(True)) == logits(first.context, jnp.array(False))
    assert bool(same.all()) == (kind in ("SWA", "*"))


def test_accuracy_counts_whole_answers():
    """Against what the model says: all right; with one digit of one answer changed: one less."""
    model = random_model(tiny_config(("GKA",), vocab_size=corpus.VOCAB_SIZE), jnp.float32)
    asked = _asked(0, 96)
    question = asked.question.copy()
    for _ in range(2):  # the second digit depends on the first
        said = answers(model, asked.context, question, 30, jnp.array(False))
        question[:, 1:] = np.where(asked.answer[1:], said, question[:, 1:])
    asked = asked._replace(question=question)
    assert accuracy(model, asked) == 1.0
    question[2, np.flatnonzero(asked.answer)[1]] += 1
    assert accuracy(model, asked) == 0.75


def test_results_are_means_over_seeds():
    def row(accuracy, **changes):
        row = dict(model="GKA", stage="primed", steps=None, num_iter=30, zeroed=False, context=128)
        return row | changes | dict(accuracy=accuracy)

    reports = [
        {"rows": [row(0.5), row(0.25, num_iter=None, zeroed=True)]},
        {"rows": [row(0.75), row(0.25, context=256), row(0.125, steps=40)]},
    ]
    text = table(summarize(reports))
    assert "| GKA | primed | 30 | 62.5 ± 17.7 | 25.0 |" in text
    assert "| GKA | primed, states zeroed |  | 25.0 | – |" in text
    assert "| GKA | primed, 40 steps | 30 | 12.5 | – |" in text


def test_every_hybrid_has_a_course():
    plan = Plan()
    courses = {name: plan.course(name) for name in HYBRIDS}
    assert courses.pop(BMOJO) == plan.bmojo and set(courses.values()) == {plan.hybrid}
    half = plan.scaled(0.5)
    for one, other in ((plan.hybrid, half.hybrid), (plan.bmojo, half.bmojo)):
        for a, b in zip(one.distill + one.tune, other.distill + other.tune, strict=True):
            assert a.steps % plan.block == b.steps % plan.block == plan.row % a.length == 0
            assert abs(b.steps - a.steps / 2) <= plan.block / 2


@pytest.mark.slow
def test_bmojo_with_a_few_steps(tmp_path):
    train.run(0, tmp_path, SMALL, [BMOJO])
    report = json.loads((tmp_path / "seed0" / "metrics.json").read_text())
    assert {r["stage"] for r in report["rows"] if r["model"] == BMOJO} == set(_STAGES)
    assert len(report["losses"][f"{BMOJO}, stage 2"]) == 12
    model = hmf_jax.from_pretrained(tmp_path / "seed0" / "bmojo-f", progress=False)
    assert model.config.layer_kinds == ("SWA", "SWA", "BMF", "BMF")


@pytest.mark.slow
def test_everything_with_a_few_steps(tmp_path):
    train.run(0, tmp_path, SMALL, ["GKA"])
    report = json.loads((tmp_path / "seed0" / "metrics.json").read_text())
    stages = {(r["model"], r["stage"]) for r in report["rows"]}
    windows = {("Transformer", f"window in layer {i}") for i in range(4)}
    assert stages == {("GKA", s) for s in _STAGES} | {("Transformer", "trained")} | windows
    assert {(r["stage"], r["steps"]) for r in report["rows"] if r["steps"]} == {
        ("primed", 8),
        ("not distilled", 4),
        ("not distilled", 8),
    }
    assert {r["num_iter"] for r in report["rows"]} == {None, *NUM_ITER}
    assert len(report["losses"]["GKA, not distilled"]) == 12
    assert "| GKA | primed | 30 |" in (tmp_path / "results.md").read_text()
    for name, kinds in (("transformer", "****"), ("gka", "SWA-SWA-GKA-GKA")):
        model = hmf_jax.from_pretrained(tmp_path / "seed0" / name, progress=False)
        assert model.config.hybrid_override_pattern.replace("-", "") == kinds.replace("-", "")
        chat = hmf_jax.ChatSession(model, max_new_tokens=4)
        assert chat.send("Gove?").tokens

    metrics = tmp_path / "seed0" / "metrics.json"
    train.run(0, tmp_path, SMALL, ["GKA"])  # nothing is left to do
    assert json.loads(metrics.read_text()) == report
    cut = {**report, "finished": [f for f in report["finished"] if f != ["GKA", PLAIN]]}
    metrics.write_text(json.dumps(cut))
    train.run(0, tmp_path, SMALL, ["GKA"])  # cut off in the comparison: only that again
    again = json.loads(metrics.read_text())
    assert again["rows"] == report["rows"] and again["finished"] == report["finished"]
    primed = "GKA, stage 2"
    assert again["seconds"][primed] == report["seconds"][primed]
    with pytest.raises(ValueError, match="other settings"):
        train.run(0, tmp_path, SMALL.scaled(2.0), ["GKA"])


_STAGES = ("stage 0", "distilled", PRIMED, PLAIN)
