"""Stage 1: losses and gradients are the original's; nothing flows into the teacher."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hmf_jax.config import SWAConfig
from hmf_jax.loading import from_pretrained, save_pretrained
from hmf_jax.mixers import split_symbol
from hmf_jax.padding import arrange
from hmf_jax.parameters import flat_params
from hmf_jax.priming import (
    DistillConfig,
    distillation_loss,
    distillation_terms,
    loss_and_gradients,
    make_distill_step,
    prime,
    students,
    teacher,
    unfuse,
)
from hmf_jax.priming.distill import _square_error
from hmf_jax.sharding import make_mesh
from hmf_jax.training import TrainState, select_parameters
from hmf_jax.verify import run_stage1, verify_dir
from tests.families.tiny import FAMILIES, tiny_family
from tests.goldens import cases, expected, golden
from tests.util import random_model, rel, tiny_config

T = 12
QUICK = ("stage1_gdn",)


def tokens_for(seed: int = 0, rows: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 64, (rows, T)), jnp.int32)


@functools.cache
def fused_model(pattern: str = "SWA*-*DA", dtype: Any = jnp.float32):
    return random_model(tiny_config(tuple(pattern.split("-"))), dtype)


def load(directory, dtype):
    return from_pretrained(directory, dtype=dtype, progress=False)


def loss_of(model, tokens, **options) -> float:
    total, count = distillation_loss(model, tokens, **options)
    return float(total / count)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("stage1"))
def test_every_recorded_loss_and_gradient(case):
    report = verify_dir(golden(case), load, distillation=loss_and_gradients)
    assert report.ok, "\n".join(str(c) for c in report.checks if not c.ok)
    assert {c.name for c in report.checks} == set(expected(golden(case))) - {"input_ids"}


@pytest.mark.parametrize("case", [c for c in cases("stage1") if c in QUICK or not QUICK])
def test_recorded_losses_and_gradients(case):
    """One case and its largest sum of terms; the others are slow."""
    directory = golden(case)
    recorded = expected(directory)
    chosen = {
        name: x
        for name, x in recorded.items()
        if name == "input_ids" or name.split(".")[1] == "all"
    }
    with jax.default_matmul_precision("highest"):
        model = load(directory, jnp.float32)
        checks = run_stage1(model, loss_and_gradients, chosen)
    assert len(checks) == len(chosen) - 1 > 10
    assert all(c.ok for c in checks), [str(c) for c in checks if not c.ok]
    trainable = json.loads((directory / "case.json").read_text())["trainable"]
    names = {c.name.split(".", 2)[2].split(".rows")[0] for c in checks if c.name[:4] == "grad"}
    assert names == set(trainable)


def mse(a, b) -> float:
    return float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))


EVERY = pytest.param("GKA*-GDN*-M2*-BMF*-GDN>GKA-*DA-*", marks=pytest.mark.slow)


@pytest.mark.parametrize("pattern", ["SWA*-*DA", EVERY])
def test_terms_are_the_differences_of_two_models(pattern):
    """Student and teacher are the unfused hybrid and the base, run on their own."""
    model, tokens = fused_model(pattern), tokens_for()
    hybrid, base = unfuse(model), teacher(model)
    layers = model.config.num_hidden_layers
    assert base.config.layer_kinds == tuple(
        "GDN" if symbol == "GDN>GKA" else "*" for symbol in pattern.split("-")
    )
    ours, goal = (m.trace(tokens)[2] for m in (hybrid, base))
    start = model.embed_tokens(tokens)
    terms = distillation_terms(model, tokens)
    for i, ((m_s, y_s), (m_a, y_a)) in enumerate(zip(ours, goal, strict=True)):
        before = [start, start] if i == 0 else [ours[i - 1][1], goal[i - 1][1]]
        f_s, f_a = y_s - m_s - before[0], y_a - m_a - before[1]
        for name, pair in (("mixer", (m_s, m_a)), ("decoder", (y_s, y_a)), ("mlp", (f_s, f_a))):
            assert np.isclose(terms[name][i], mse(*pair), rtol=1e-4, atol=1e-9), (i, name)
    final = mse(hybrid.hidden(tokens), base.hidden(tokens))
    assert np.isclose(terms["pre_lm_head"], final, rtol=1e-5)
    losses = [("none", (), True), ("residuals", ("mixer", "mlp"), True)]
    for target, parts, head in [*losses, ("all", ("decoder", "mixer", "mlp"), False)]:
        per_layer = sum(float(jnp.sum(terms[part])) for part in parts) / layers
        found = loss_of(model, tokens, target=target, pre_lm_head=head)
        assert np.isclose(found, per_layer + final * head, rtol=1e-5), (target, head)


@pytest.mark.slow
def test_only_the_student_is_differentiated():
    """As if the teacher's side were a constant: norms, MLPs and embeddings are shared."""
    with jax.enable_x64():
        model, tokens = fused_model("SWA*-*DA", jnp.float64), tokens_for()
        goal = teacher(model).trace(tokens)[2]
        final = teacher(model).hidden(tokens)

        def plain(hybrid):
            seen = hybrid.trace(tokens)[2]
            errors = [jnp.mean((a[1] - b[1]) ** 2) for a, b in zip(seen, goal, strict=True)]
            return sum(errors) / 2 + jnp.mean((hybrid.hidden(tokens) - final) ** 2)

        def fused(model):
            total, count = distillation_loss(model, tokens, target="decoder")
            return total / count

        wanted = flat_params(jax.jit(jax.grad(plain))(unfuse(model)))
        found = flat_params(jax.jit(jax.grad(fused))(model))
        for path, g in found.items():
            if ".teacher." in path:
                assert not np.asarray(g).any(), path
            elif path != "lm_head.kernel":
                assert np.asarray(g).any() and rel(g, wanted[path]) < 1e-6, path


def test_plain_attention_is_a_shared_layer():
    """ "*" in a fused pattern means what "*DA" does."""
    one = prime(base := random_model(tiny_config(("*",) * 2), jnp.float32), "SWA*-*DA")
    two = prime(base, "SWA*-*")
    options: Any = dict(target="all")
    assert loss_of(one, tokens_for(), **options) == loss_of(two, tokens_for(), **options) > 0


def test_a_student_that_does_the_same_has_no_loss():
    model = prime(random_model(tiny_config(("*",) * 2), jnp.float32), "SWA*-*DA", swa=SWAConfig(T))
    assert loss_of(model, tokens_for(), target="all") < 1e-9


@pytest.mark.slow
def test_packed_is_separate_and_padding_does_not_count():
    with jax.enable_x64():
        model, tokens = fused_model("M2*-*DA", jnp.float64), tokens_for()
        run = functools.partial(distillation_loss, model, target="residuals")
        ids = np.ones((2, T), int)
        ids[0, 5:], ids[1, 8:] = 2, 0
        packed, count = run(tokens, segment_ids=jnp.asarray(ids))
        first = run(tokens[:1, :5])
        rows = np.zeros((2, T), int)  # the other two documents, one of them behind its padding
        rows[0, : T - 5], rows[1, T - 8 :] = 1, 1
        apart = jnp.stack([jnp.roll(tokens[0], -5), jnp.roll(tokens[1], T - 8)])
        others = run(apart, segment_ids=jnp.asarray(rows))
        assert count == first[1] + others[1] == T + 8
        assert np.isclose(packed, first[0] + others[0], rtol=1e-9)


def test_errors_of_padding_do_not_count():
    """Some operators leave zeros at padding, where both then agree; others need not."""
    model = fused_model()
    ids = np.asarray([[0, 0, 1, 1, 0, 2] + [3] * 6])
    _, ctx = model.embed(tokens_for(rows=1), segment_ids=jnp.asarray(ids))
    weights = ctx.mask(jnp.ones((1, T)))
    a, b = (jnp.asarray(np.random.default_rng(s).random((1, T, 5)), jnp.float32) for s in (0, 1))
    wanted = ((a - b) ** 2).mean(-1)[np.asarray(arrange(jnp.asarray(ids), ctx.place)) != 0].sum()
    assert np.isclose(_square_error(a, b, weights), wanted, rtol=1e-6)
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    exact = _square_error(a.astype(jnp.float32), b.astype(jnp.float32), weights)
    assert _square_error(a, b, weights) == exact  # computed in float32


def test_tokens_count_as_much_as_what_they_predict():
    """weighted: sum_t w[next of t] e_t / sum_t w[next of t]; e is each token's own error."""
    model, tokens = fused_model("SWA*-*DA"), tokens_for()
    ids = np.ones((2, T), int)
    ids[0, 4:], ids[0, 6] = 2, 0  # two documents, padding inside the second
    mask = np.random.default_rng(0).random((2, T)).astype(np.float32)
    segment_ids, loss_mask = jnp.asarray(ids), jnp.asarray(mask)
    ours, goal = (
        np.asarray(m.hidden(tokens, segment_ids=segment_ids))
        for m in (unfuse(model), teacher(model))
    )
    errors = ((ours - goal) ** 2).mean(-1)
    following = [(0, t, t + 1) for t in range(T - 1) if t not in (3, 5, 6)] + [(0, 5, 7)]
    following += [(1, t, t + 1) for t in range(T - 1)]
    total, weight = distillation_loss(
        model, tokens, weighted=True, loss_mask=loss_mask, segment_ids=segment_ids
    )
    assert np.isclose(weight, sum(mask[b, n] for b, _, n in following), rtol=1e-5)
    wanted = sum(mask[b, n] * errors[b, t] for b, t, n in following)
    assert np.isclose(total, wanted, rtol=1e-4)


def test_step_trains_the_students_and_nothing_else():
    base = random_model(tiny_config(("*",) * 2), jnp.float32)
    model = prime(base, "M2*-*DA")
    assert select_parameters(model, students(model.config)) == [
        path for path in flat_params(model) if path.startswith("layers.0.mixer.")
    ]
    optimizer = optax.adam(3e-3)
    state = TrainState.create(model, optimizer, trainable=students(model.config))
    step = make_distill_step(optimizer, target="mixer", accumulate=2)
    batch = {"tokens": tokens_for(rows=4)}
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert metrics["tokens"] == 4 * T and losses[-1] < 0.5 * losses[0]
    trained = state.model()
    np.testing.assert_array_equal(teacher(trained)(batch["tokens"])[0], base(batch["tokens"])[0])
    assert np.isclose(loss_of(prime(base, "M2*-*DA"), batch["tokens"], target="mixer"), losses[0])
    options: Any = dict(target="mixer", loss_mask=jnp.zeros_like(batch["tokens"]))
    assert loss_of(trained, batch["tokens"], **options) < losses[-1] * 1.01


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["block", "dots"])
def test_remat_and_mesh_make_the_same_step(remat, tmp_path):
    base = random_model(tiny_config(("*",) * 2), jnp.float32)
    save_pretrained(prime(base, "GKA*-*DA"), tmp_path / "fused", progress=False)
    batch = {"tokens": tokens_for(rows=4)}
    optimizer = optax.sgd(0.1)
    mesh = make_mesh(dp=2, fsdp=2, tp=2)
    results = []
    for where, choice in ((None, "none"), (None, remat), (mesh, remat)):
        model = from_pretrained(tmp_path / "fused", dtype=jnp.float32, mesh=where, progress=False)
        state = TrainState.create(model, optimizer, trainable="gka")
        step = make_distill_step(optimizer, target="all", remat=choice, accumulate=2)
        state, metrics = step(state, batch)
        results.append((float(metrics["loss"]), flat_params(state.model())))
    for loss, params in results[1:]:
        assert np.isclose(loss, results[0][0], rtol=1e-5)
        for path, x in params.items():
            assert rel(x, results[0][1][path]) < 1e-4, path


ALL = ("GKA*", "GDN*", "M2*", "BMF*", "SWA*", "*DA")


@pytest.mark.parametrize(
    ("family", "kinds"),
    [("llama", ("SWA*", "*DA"))]
    + [pytest.param("qwen3_next", ("GDN>GKA", "*DA"), marks=pytest.mark.slow)]
    + [pytest.param(family, ALL, marks=pytest.mark.slow) for family in FAMILIES],
)
def test_a_step_of_every_family(family, kinds):
    """Students alone learn, as much when the backward pass computes them again."""
    results = []
    for remat in ("block", "none") if "GDN>GKA" in kinds else ("block",):
        model = random_model(tiny_family(family, kinds), jnp.float32)
        before = {path: np.asarray(x) for path, x in flat_params(model).items()}
        chosen = select_parameters(model, students(model.config))
        optimizer = optax.sgd(0.1)
        state = TrainState.create(model, optimizer, trainable=students(model.config))
        step = make_distill_step(optimizer, target="all", remat=remat)
        state, metrics = step(state, {"tokens": tokens_for()})
        results.append((float(metrics["loss"]), flat_params(state.model())))
    loss, after = results[0]
    assert 0 < loss < np.inf
    changed = {path for path, x in after.items() if (np.asarray(x) != before[path]).any()}
    assert changed <= set(chosen)
    students_of = {path.split(".")[1] for path in changed}
    assert students_of == {str(i) for i, kind in enumerate(kinds) if split_symbol(kind)[1]}
    for path, x in results[-1][1].items():
        assert rel(x, after[path]) < 1e-4, path


def test_bad_input():
    hybrid = random_model(tiny_config(("M2", "*")), jnp.float32)
    with pytest.raises(
        ValueError, match=r"cannot distil this model: its pattern M2-\* has no fused"
    ):
        distillation_loss(hybrid, tokens_for())
    with pytest.raises(ValueError, match="no layer of this model has a teacher"):
        distillation_loss(random_model(tiny_config(("*DA", "*")), jnp.float32), tokens_for())
    with pytest.raises(ValueError, match="target 'layers' is unknown; use one of none, decoder"):
        make_distill_step(optax.sgd(1.0), target="layers")
    with pytest.raises(ValueError, match="leaves no loss"):
        distillation_loss(fused_model(), tokens_for(), target="none", pre_lm_head=False)
    with pytest.raises(ValueError, match="leaves no loss"):
        DistillConfig.of({"model": "m", "data": "d", "output": "o", "pre_lm_head": False})
    with pytest.raises(ValueError, match="lora_rank is for fine-tuning"):
        DistillConfig.of({"model": "m", "data": "d", "output": "o", "lora_rank": 4})
    with pytest.raises(ValueError, match="cannot unfuse this model: its pattern"):
        unfuse(unfuse(fused_model()))
    with pytest.raises(ValueError, match="cannot unfuse"):
        teacher(hybrid)
