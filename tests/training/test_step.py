"""One training step: its loss, gradients and update are those of the plain formulas, however the
batch is packed, cut or spread over devices."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from hmf_jax.config import BMojoConfig, SWAConfig
from hmf_jax.model import HybridLM
from hmf_jax.sharding import make_mesh
from hmf_jax.training import (
    RECIPES,
    Recipe,
    TrainState,
    cross_entropy,
    decay_mask,
    make_train_step,
    next_token_loss,
    next_token_targets,
    select_parameters,
)
from hmf_jax.training.loss import piece_size
from tests.util import random_model, rel, tiny_config

SIX = ("*", "GKA", "SWA", "GDN", "BMF", "M2")
T = 24
ODD = dict(vocab_size=61)  # a size that nothing else has


def tokens_for(seed: int, rows: int = 4, vocab: int = 61) -> jax.Array:
    tokens = np.random.default_rng(seed).integers(0, vocab, (rows, T))  # the same in float64
    return jnp.asarray(tokens, jnp.int32)


def uneven(seed: int = 3) -> dict[str, Any]:
    """Four rows: packed documents, padding on the left, on the right and inside, masked tokens."""
    ids = np.ones((4, T), int)
    ids[0, 9:] = 2
    ids[1, :6], ids[1, 15:] = 0, 3
    ids[2, 5:], ids[2, 2] = 0, 0
    mask = np.random.default_rng(seed).random((4, T)) < 0.7
    return {
        "tokens": tokens_for(seed),
        "segment_ids": jnp.asarray(ids),
        "loss_mask": jnp.asarray(mask, jnp.int32),
    }


def pairs(ids, mask) -> list[tuple[int, int, int]]:
    """(row, position, position of its target), one by one."""
    out = []
    for row in range(len(ids)):
        valid = np.flatnonzero(ids[row])
        for a, b in zip(valid[:-1], valid[1:], strict=True):
            if ids[row, a] == ids[row, b] and mask[row, b]:
                out.append((row, a, b))
    return out


def plain_loss(model, batch) -> jax.Array:
    """Mean cross-entropy, from all logits and a list of targets."""
    tokens = batch["tokens"]
    ids = np.asarray(batch.get("segment_ids", np.ones(tokens.shape)))
    mask = np.asarray(batch.get("loss_mask", np.ones(tokens.shape)))
    row, at, target = np.array(pairs(ids, mask)).T
    logp = jax.nn.log_softmax(model(tokens, segment_ids=jnp.asarray(ids, jnp.int32))[0])
    return -jnp.mean(logp[row, at, tokens[row, target]])


def chunked_loss(model, batch, chunk_size=7):
    total, count = next_token_loss(model, **batch, chunk_size=chunk_size)
    return total / count


def one_step(model, optimizer, batch, trainable=None, **options):
    state = TrainState.create(jax.tree.map(jnp.copy, model), optimizer, trainable=trainable)
    return make_train_step(optimizer, **options)(state, batch)


@functools.cache
def plain_step():
    """A float64 model of one kind, and its step with plain gradients and nothing else."""
    model = random_model(tiny_config(("*",), **ODD), jnp.float64)
    return model, one_step(model, optax.sgd(1.0), uneven())


def close(a, b, tol: float) -> None:
    """Every leaf, relative to the size of that leaf."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert rel(x, y) < tol, f"{jax.tree_util.keystr(path)}: {rel(x, y)}"


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_targets_are_the_next_tokens_of_the_same_document():
    batch = uneven()
    targets, weights = next_token_targets(**batch)
    expected = np.zeros((4, T))
    for row, at, target in pairs(np.asarray(batch["segment_ids"]), np.asarray(batch["loss_mask"])):
        expected[row, at] = 1
        assert targets[row, at] == batch["tokens"][row, target]
    np.testing.assert_array_equal(weights, expected)
    targets, weights = next_token_targets(batch["tokens"])
    np.testing.assert_array_equal(targets[:, :-1], batch["tokens"][:, 1:])
    np.testing.assert_array_equal(weights, np.arange(T) < T - 1 + np.zeros((4, 1)))
    # Over tokens alone it is a shift: XLA takes minutes to fold a scan over 8192 constants.
    assert "cummin" not in str(jax.make_jaxpr(next_token_targets)(batch["tokens"]))
    assert "cummin" in str(jax.make_jaxpr(next_token_targets)(**batch))


@pytest.mark.parametrize(
    "chunk_size", [5, 100, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 24))]
)
def test_cross_entropy_in_chunks(chunk_size):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 4)
        x, w = jax.random.normal(keys[0], (2, T, 8)), jax.random.normal(keys[1], (8, 61)) * 3
        targets = jax.random.randint(keys[2], (2, T), 0, 61)
        weights = jax.random.uniform(keys[3], (2, T)).at[0, :5].set(0)

        def plain(x, w):
            logp = jax.nn.log_softmax(x @ w)
            return -jnp.sum(weights * jnp.take_along_axis(logp, targets[..., None], -1)[..., 0])

        def chunked(x, w):
            return 3 * cross_entropy(x, w, targets, weights, None, chunk_size)

        expected = jax.value_and_grad(plain, (0, 1))(x, w)
        got = jax.jit(jax.value_and_grad(chunked, (0, 1)))(x, w)
        close(got, jax.tree.map(lambda a: 3 * a, expected), 1e-12)


def logits_of(seed: int = 0, rows: int = 4) -> tuple[jax.Array, ...]:
    """Hidden states, head, targets and weights of `cross_entropy`."""
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((rows, T, 8)), 3 * rng.standard_normal((8, 64))
    targets, weights = rng.integers(0, 64, (rows, T)), rng.random((rows, T))
    return tuple(map(jnp.asarray, (x, w, targets, weights)))


def products(f: Any, *args: Any) -> int:
    return str(jax.make_jaxpr(f)(*args)).count("dot_general")


def test_the_head_is_multiplied_once_and_once_per_gradient():
    x, w, targets, weights = logits_of()

    def loss(x, w):
        return cross_entropy(x, w, targets, weights, None, 7)

    assert products(loss, x, w) == 1
    value, back = jax.vjp(loss, x, w)
    assert products(back, value) == 0
    for wanted, count in ((0, 2), (1, 2), ((0, 1), 3)):
        assert products(jax.grad(loss, wanted), x, w) == count
    both = jax.grad(loss, (0, 1))(x, w)
    same([jax.grad(loss, i)(x, w) for i in (0, 1)], list(both))
    assert products(jax.grad(jax.jit(loss)), x, w) == 2  # a frozen head stays one inside of jit


def test_pieces_of_the_loss_have_2048_positions():
    assert [piece_size(rows, None) for rows in (1, 4, 5000)] == [2048, 512, 1]
    assert piece_size(4, 700) == 700


@pytest.mark.parametrize("sizes", [dict(fsdp=2, tp=2), dict(dp=2, sp=2)])
def test_cross_entropy_on_meshes(sizes):
    with jax.enable_x64(True):
        args = logits_of()
        mesh = make_mesh(**sizes, devices=jax.devices()[:4])

        def run(mesh: Any, wanted: Any) -> Any:
            def loss(x, w):
                return cross_entropy(x, w, *args[2:], mesh, 5)

            return jax.jit(jax.value_and_grad(loss, wanted))(*args[:2])

        expected = run(None, (0, 1))
        close(run(mesh, (0, 1)), expected, 1e-12)
        close(run(mesh, 0)[1], expected[1][0], 1e-12)


def test_devices_exchange_the_head_in_the_dtype_of_the_model():
    """Cast first, then gathered; and its gradient, as that of all other weights."""
    mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
    config = tiny_config(("*",), vocab_size=64)
    model = nnx.eval_shape(lambda: HybridLM(config, dtype=jnp.float32, mesh=mesh))

    def loss(model: HybridLM) -> jax.Array:
        model = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model)
        return next_token_loss(model, tokens_for(0))[0]

    program = str(jax.make_jaxpr(jax.grad(loss, allow_int=True))(model))
    assert re.search(r"bf16\[32,64\] = sharding_constraint", program)
    assert re.search(r"bf16\[16,64\] = reduce_scatter", program)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_chunked_loss_is_the_plain_loss(tied):
    with jax.enable_x64(True):
        config = tiny_config(("*",), **ODD, tie_word_embeddings=tied)
        model, batch = random_model(config, jnp.float64), uneven()
        plain = functools.partial(plain_loss, batch=batch)
        expected = jax.jit(jax.value_and_grad(plain))(model)  # jit: rope rounds to float32
        got = jax.jit(jax.value_and_grad(chunked_loss))(model, batch)
        close(got, expected, 1e-10)
        jaxpr = jax.make_jaxpr(jax.value_and_grad(chunked_loss))(model, batch)
        assert f"[4,{T},61]" not in str(jaxpr) and "[4,6,61]" in str(jaxpr)
        jaxpr = jax.make_jaxpr(jax.value_and_grad(plain))(model)
        assert f"[4,{T},61]" in str(jaxpr)  # so the search does find them


@pytest.mark.parametrize("kinds", [("SWA",), pytest.param(SIX, marks=pytest.mark.slow)])
def test_packed_is_separate(kinds):
    """One row of two documents gives the loss and gradients of two rows of one."""
    with jax.enable_x64(True):
        tokens, cut = tokens_for(1, 1), 11
        model = random_model(tiny_config(kinds, **ODD), jnp.float64)
        ids = jnp.where(jnp.arange(T) < cut, 4, 9)[None]
        rows = jnp.concatenate([tokens, jnp.roll(tokens, -cut, axis=1)])
        lengths = jnp.array([[cut], [T - cut]])
        separate = {"tokens": rows, "segment_ids": (jnp.arange(T) < lengths).astype(jnp.int64)}
        grad = jax.jit(jax.value_and_grad(chunked_loss))
        close(grad(model, {"tokens": tokens, "segment_ids": ids}), grad(model, separate), 1e-8)


def test_accumulated_is_one_large_batch():
    """Token counts of the rows differ, so a mean of means would be wrong."""
    with jax.enable_x64(True):
        (model, (expected, metrics)), batch = plain_step(), uneven()
        got, metrics4 = one_step(model, optax.sgd(1.0), batch, accumulate=4, max_grad_norm=1e6)
        close(got.params, expected.params, 1e-12)
        close(metrics4, metrics, 1e-6)
        rows = [{k: a[i : i + 1] for k, a in batch.items()} for i in range(4)]
        assert rel(np.mean([plain_loss(model, row) for row in rows]), metrics["loss"]) > 1e-5


@pytest.mark.parametrize(
    "remat",
    [*(pytest.param(r, marks=pytest.mark.slow) for r in ("block", "dots")), {"*": "block"}],
)
def test_remat_changes_nothing_but_memory(remat):
    with jax.enable_x64(True):
        (model, (expected, _)), batch = plain_step(), uneven()
        optimizer = optax.sgd(1.0)
        got, _ = one_step(model, optimizer, batch, remat=remat)
        close(got.params, expected.params, 1e-12)
        state = TrainState.create(model, optimizer)
        jaxprs = [
            str(jax.make_jaxpr(make_train_step(optimizer, remat=r))(state, batch))
            for r in ("none", remat)
        ]
        found = [len(re.findall(r"= (?:checkpoint|remat2?)\[", jaxpr)) for jaxpr in jaxprs]
        assert found[0] == 0 and found[1] > 0


def test_selection():
    model = nnx.eval_shape(lambda: HybridLM(tiny_config(("GKA", "*", "BMF", "M2"))))
    chosen = select_parameters(model, "gka, norm , self_attn,")
    assert chosen == select_parameters(model, ["gka", "norm", "self_attn"])
    assert "layers.0.mixer.q_proj.kernel" in chosen and "layers.1.mixer.q_proj.kernel" in chosen
    assert "layers.2.mixer.inner.q_proj.kernel" in chosen  # B'MOJO-F's inner mixer is a gka
    assert "layers.3.mixer.C_norm.weight" in chosen and "norm.weight" in chosen
    assert "layers.2.mixer.bmojo_attn.q_proj.kernel" not in chosen
    assert not any("mlp" in n or "embed" in n or "lm_head" in n for n in chosen)
    assert all(n.startswith("layers.2.mixer.") for n in select_parameters(model, "bmojo_f"))
    assert select_parameters(model, "lm_head") == ["lm_head.kernel"]
    with pytest.raises(ValueError, match="'gak' matches no parameter; did you mean 'gka'"):
        select_parameters(model, "norm,gak")
    with pytest.raises(ValueError, match="known: .*self_attn"):
        select_parameters(model, "0000")
    with pytest.raises(ValueError, match="use None"):
        TrainState.create(model, optax.sgd(1.0), trainable=" , ")


def test_only_what_is_selected_trains():
    model = random_model(tiny_config(("*",), **ODD), jnp.float32)
    before = dict(
        zip(select_parameters(model), jax.tree.leaves(jax.device_get(model)), strict=True)
    )
    state, _ = one_step(model, optax.adamw(1e-2), uneven(), trainable="self_attn,norm")
    assert set(state.params) == set(select_parameters(model, "self_attn,norm"))
    assert set(state.params) | set(state.frozen) == set(before)
    assert set(state.opt_state[0].mu) == set(state.opt_state[0].nu) == set(state.params)
    after = dict(zip(before, jax.tree.leaves(state.model()), strict=True))
    for name, value in before.items():
        changed = not np.array_equal(after[name], value)
        assert changed == (name in state.params), name


@pytest.mark.slow
def test_clipping():
    model, batch = random_model(tiny_config(("*",), **ODD), jnp.float32), uneven()
    grads = jax.jit(jax.grad(functools.partial(plain_loss, batch=batch)))(model)
    norm = optax.tree.norm(jax.tree.leaves(grads))
    state, metrics = one_step(model, optax.sgd(1.0), batch, max_grad_norm=float(norm / 8))
    assert rel(metrics["grad_norm"], norm) < 1e-5
    moved = jax.tree.map(jnp.subtract, jax.tree.leaves(state.model()), jax.tree.leaves(model))
    assert rel(optax.tree.norm(moved), norm / 8) < 1e-5


HEADS = dict(num_attention_heads=8, num_key_value_heads=4, intermediate_size=64, vocab_size=96)
SGD = optax.sgd(0.1, momentum=0.9)  # its momentum is, after one step, the gradient


def in_float64(config, values, batch):
    """The model with these values in float64, its plain loss and gradients."""
    structure = jax.tree.structure(jax.eval_shape(lambda: HybridLM(config, dtype=jnp.float64)))
    leaves = [jnp.asarray(v, jnp.float64) for v in jax.tree.leaves(values)]
    model = jax.tree.unflatten(structure, leaves)
    return model, jax.jit(jax.value_and_grad(functools.partial(plain_loss, batch=batch)))(model)


@functools.cache
def reference():
    """A float64 model of all six kinds with float32 values, its plain loss and gradients."""
    config = tiny_config(SIX, **HEADS)
    model = random_model(config, jnp.float32, seed=1)
    return jax.device_get(in_float64(config, model, uneven()))


@pytest.mark.slow
def test_step_of_every_layer_kind():
    """A float32 step is the step of float64 gradients to 1e-4, each layer's to 2e-4.

    Single parameters of a GKA may differ more: its solver amplifies rounding.
    """
    with jax.enable_x64(True):
        before, (loss, grads) = reference()
    model = random_model(before.config, jnp.float32, seed=1)
    state, metrics = one_step(model, SGD, uneven())
    assert rel(metrics["loss"], loss) < 1e-5 and metrics["finite"]
    leaves = map(jax.tree.leaves, (before, grads))
    grads_of: dict[str, list[tuple[Any, Any]]] = {}
    for name, old, g in zip(select_parameters(model), *leaves, strict=True):
        ours = np.asarray(state.opt_state[0].trace[name])
        assert rel(ours, g) < 2e-3, name
        assert rel(state.params[name], old - 0.1 * ours) < 1e-6, name
        grads_of.setdefault(".".join(name.split(".")[:2]), []).append((ours, np.asarray(g)))
    everything = [pair for layer in grads_of.values() for pair in layer]
    for layer, parts in (*grads_of.items(), ("all", everything)):
        ours, g = (np.concatenate([a.ravel() for a in side]) for side in zip(*parts, strict=True))
        assert rel(ours, g) < (1e-4 if layer == "all" else 2e-4), layer


@pytest.mark.parametrize("kinds", [("*",), pytest.param(SIX, marks=pytest.mark.slow)])
def test_adamw_step(kinds):
    """The first step of AdamW is -lr (g / (|g| + eps) + decay w), without decay for vectors."""
    with jax.enable_x64(True):
        config, batch = tiny_config(kinds, **ODD), uneven()
        model, (_, grads) = in_float64(config, random_model(config, jnp.float64), batch)
        recipe = Recipe(1e-2, "constant", weight_decay=0.1)
        state, metrics = one_step(model, recipe.optimizer(10), batch)
        assert rel(metrics["learning_rate"], 1e-2) < 1e-6
        leaves = map(jax.tree.leaves, (state.model(), model, grads))
        for name, new, w, g in zip(select_parameters(model), *leaves, strict=True):
            decay = 0.1 * w if w.ndim > 1 else 0.0
            direction = g / (jnp.abs(g) + 1e-8) + decay
            assert rel(new - w, -1e-2 * direction) < 1e-4, name  # |g| near eps amplifies


def recall(seed, rows: int = 32, n: int = 4) -> dict[str, jax.Array]:
    """Four keys of 0..7, each followed by a value of 8..15; then again in another order."""
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    keys = jax.vmap(lambda k: jax.random.permutation(k, 8)[:n])(jax.random.split(a, rows))
    told = jnp.stack([keys, jax.random.randint(b, (rows, n), 8, 16)], axis=2)
    order = jnp.argsort(jax.random.uniform(c, (rows, n)), axis=1)
    asked = jnp.take_along_axis(told, order[..., None], axis=1)
    tokens = jnp.concatenate([told, asked], axis=1).reshape(rows, 4 * n)
    return {"tokens": tokens, "loss_mask": jnp.zeros_like(tokens).at[:, 2 * n + 1 :: 2].set(1)}


@pytest.mark.slow  # the notebooks, which CI runs, learn to recall, too
@pytest.mark.parametrize("kind", SIX)
def test_recall_is_learnt(kind):
    """A value at random costs log 8 = 2.08; one of the four seen, whatever the key, about 1.25."""
    layers, rate = (2, 3e-3) if kind in ("*", "SWA") else (1, 1e-2)
    small = dict(vocab_size=16, swa=SWAConfig(12), bmojo=BMojoConfig(4, True, "GKA"))
    model = HybridLM.init(tiny_config((kind,) * layers, **small), dtype=jnp.float32)
    optimizer = optax.adam(rate, b2=0.98)
    state, batch = TrainState.create(model, optimizer), jax.jit(recall)
    step, losses = make_train_step(optimizer, max_grad_norm=1.0), []
    while len(losses) < 1000 and (len(losses) < 10 or np.mean(losses[-10:]) > 0.9):
        state, metrics = step(state, batch(len(losses)))
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2 and np.mean(losses[-10:]) < 0.9, losses[::50]


MESHES = {
    "dp4": dict(dp=4),
    "fsdp4": dict(fsdp=4),
    "tp4": dict(tp=4),
    "tp8": dict(tp=8),
    "fsdp2 x tp2": dict(fsdp=2, tp=2),
    "dp2 x fsdp2 x tp2": dict(dp=2, fsdp=2, tp=2),
    "sp4": dict(sp=4),
    "fsdp2 x sp2": dict(fsdp=2, sp=2),
    "sp2 x tp2": dict(sp=2, tp=2),
}


def on_mesh(model: HybridLM, sizes: dict[str, int]) -> HybridLM:
    mesh = make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    target = jax.eval_shape(lambda: HybridLM(model.config, dtype=model.dtype, mesh=mesh))
    moved = jax.device_put(jax.tree.leaves(model), jax.tree.leaves(target.shardings()))
    return jax.tree.unflatten(jax.tree.structure(target), moved)


@pytest.mark.slow  # test_lora.py makes a step on meshes in the default suite
@pytest.mark.parametrize("name", MESHES)
@jax.enable_x64(True)
def test_every_mesh_makes_the_same_step(name):
    """In float64, so that a wrong sum cannot pass for rounding, which GKA amplifies."""
    model, (loss, grads) = reference()
    state = TrainState.create(on_mesh(model, MESHES[name]), SGD)
    shardings = {n: p.sharding for n, p in state.params.items()}
    program = make_train_step(SGD).lower(state, uneven()).compile()
    got, metrics = program(state, uneven())
    assert rel(metrics["loss"], loss) < 1e-6  # it is float32
    leaves = map(jax.tree.leaves, (model, grads))
    for n, old, g in zip(select_parameters(model), *leaves, strict=True):
        assert rel(got.opt_state[0].trace[n], g) < 1e-7, n
        assert rel(got.params[n], old - 0.1 * g) < 1e-8, n
    for n, p in got.params.items():
        assert p.sharding == shardings[n], n  # not only equivalent: else the next step compiles
    program(got, uneven())

    # Nothing is gathered but token ids, the gradient of the embedded tokens (over dp where XLA
    # finds that less than to add up tables) and, over fsdp, parameters: no states, no logits. Over
    # sp also gradients of channels and numbers per head and token, and the last hidden states, from
    # which padding has to move.
    sp = MESHES[name].get("sp", 1)
    fsdp = MESHES[name].get("fsdp", 1) * sp
    weights = {tuple(sorted(p.sharding.shard_shape(p.shape))) for p in got.params.values()}
    for shape in gathered(program.as_text()):
        parts = [(*shape[:i], n // fsdp, *shape[i + 1 :]) for i, n in enumerate(shape)]
        known = any(tuple(sorted(part)) in weights for part in parts)
        known |= shape[1:] in ((T, 32), (T, 32 // fsdp))
        known |= sp > 1 and (len(shape) < 3 or (shape[1] == T and shape[2] <= 8))
        assert known and (fsdp > 1 or shape[1:] == (T, 32)), shape
    if fsdp > 1:  # nor does the gradient of the output head exist as a whole
        head = list(got.params["lm_head.kernel"].sharding.shard_shape((32, 96)))
        assert tuple(head) in gathered(program.as_text(), "reduce-scatter")
        assert (32, head[1]) not in gathered(program.as_text(), "all-reduce")


def gathered(text: str | None, operation: str = "all-gather") -> list[tuple[int, ...]]:
    """Shapes of all floating-point arrays that the program's all-gathers (or others) return."""
    assert text is not None
    found = re.findall(rf" = (\(.*?\)|\S+) {operation}(?:-start)?\(", text)
    shapes = [s for r in found for s in re.findall(r"f\d+\[([\d,]*)\]", r)]
    return [tuple(map(int, filter(None, s.split(",")))) for s in shapes]


def test_a_loss_that_is_not_finite_changes_nothing():
    optimizer = RECIPES["reasoning"].optimizer(20)
    model, batch = random_model(tiny_config(("*",), **ODD), jnp.float32), uneven()
    state = TrainState.create(model, optimizer)
    step = make_train_step(optimizer, max_grad_norm=1.0)
    batch["loss_mask"] = batch["loss_mask"].astype(jnp.float32)
    state, _ = step(state, batch)
    before = jax.device_get((state.params, state.opt_state, state.step))
    for value, finite, tokens in ((jnp.nan, False, np.nan), (jnp.inf, False, np.inf), (0, True, 0)):
        mask = batch["loss_mask"].at[0, 3].set(value) * (value != 0)
        state, metrics = step(state, {**batch, "loss_mask": mask})
        assert bool(metrics["finite"]) == finite
        np.testing.assert_equal(float(metrics["tokens"]), tokens)
        same((state.params, state.opt_state, state.step), before)
    state, metrics = step(state, batch)
    assert metrics["finite"] and state.step == 2
    poisoned = dataclasses.replace(
        state, params=state.params | {"norm.weight": jnp.full(32, jnp.nan)}
    )
    assert not step(poisoned, batch)[1]["finite"]


@pytest.mark.slow
def test_master_weights():
    """Updates of 1/1000 of a weight add up in float32 and vanish in bfloat16."""
    config, batch = tiny_config(("M2",), **ODD), uneven()
    optimizer = optax.chain(optax.scale_by_sign(), optax.scale(-1e-4))
    for master in (True, False):
        model = random_model(config, jnp.bfloat16)
        norm = jax.device_get(model.norm.weight[...])
        state = TrainState.create(model, optimizer, master_weights=master)
        assert state.params["norm.weight"].dtype == (jnp.float32 if master else jnp.bfloat16)
        assert state.params["layers.0.mixer.A_log"].dtype == jnp.float32
        step = make_train_step(optimizer)
        for _ in range(100):
            state, _ = step(state, batch)
        assert state.model().norm.weight.dtype == state.model().dtype == jnp.bfloat16
        assert np.array_equal(state.model().norm.weight[...], norm) != master
    model = random_model(config, jnp.bfloat16)
    moments = TrainState.create(model, optax.adam(1.0), master_weights=False).opt_state[0]
    assert moments.nu["norm.weight"].dtype == jnp.float32


@pytest.mark.slow
def test_orbax_saves_the_state(tmp_path):
    optimizer = RECIPES["instruct"].optimizer(20)
    model, batch = random_model(tiny_config(("*",), **ODD), jnp.bfloat16), uneven()
    state = TrainState.create(model, optimizer, trainable="self_attn")
    step = make_train_step(optimizer)
    state, _ = step(state, batch)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
        )
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    same(restored, state)
    same(step(restored, batch), step(state, batch))


def test_recipes():
    """Learning rates of the original's schedulers: warm-up from 0, then down to 0 at the end."""
    long = RECIPES["long_context"].learning_rates()
    progress = (2000 - 209) / (4480 - 209)
    assert rel(long(104), 5e-5 * 104 / 209) < 1e-5
    assert rel(long(2000), 5e-5 * 0.5 * (1 + np.cos(np.pi * progress))) < 1e-5
    instruct = RECIPES["instruct"].learning_rates(101)  # 3% of 101 steps: 4
    expected = [0, 5e-5 / 4, 5e-5, 5e-5 * (101 - 50) / 97, 0]
    assert rel([instruct(i) for i in (0, 1, 4, 50, 101)], expected) < 1e-5
    distill = RECIPES["distill"].learning_rates()
    assert rel([distill(i) for i in (360, 720, 18999)], [0.5e-4, 1e-4, 1e-4]) < 1e-5
    model = nnx.eval_shape(lambda: HybridLM(tiny_config(SIX)))
    params = dict(zip(select_parameters(model), jax.tree.leaves(model), strict=True))
    for name, decays in decay_mask(params).items():
        still = name.endswith(("A_log", "dt_bias", ".D", "bias")) or "norm" in name
        assert decays != still, name
    with pytest.raises(ValueError, match="depends on the data"):
        RECIPES["reasoning"].optimizer()
    for bad, message in (
        (dict(schedule="cosin"), "schedule must be .*, not 'cosin'"),
        (dict(schedule="linear", warmup=3.0), "warmup=3.0"),
        (dict(schedule="linear", learning_rate=0.0), "learning_rate=0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe(**{"learning_rate": 1e-3, **bad})  # pyright: ignore[reportArgumentType]


def test_bad_arguments():
    arguments: list[tuple[dict[str, Any], str]] = [
        (dict(accumulate=0), "accumulate=0"),
        (dict(max_grad_norm=0.0), "max_grad_norm=0.0"),
        (dict(chunk_size=0), "chunk_size=0"),
        (dict(remat="blocks"), "'blocks' is unknown"),
        (dict(remat={"gka": "block"}), "remat 'gka'"),
    ]
    for bad, message in arguments:
        with pytest.raises(ValueError, match=message):
            make_train_step(optax.sgd(1.0), **bad)
    model = random_model(tiny_config(("*",)), jnp.bfloat16)
    tokens = jnp.ones((4, 8), jnp.int32)
    state = TrainState.create(model, optax.sgd(1.0))
    for batch, message in (
        ({"tokens": tokens, "labels": tokens}, "labels"),
        ({"loss_mask": tokens}, "A batch has tokens"),
        ({"tokens": tokens, "loss_mask": tokens[:, 1:]}, r"must be \[B, T\]"),
        ({"tokens": tokens[0]}, r"must be \[B, T\]"),
        ({"tokens": tokens[:0]}, "at least one row"),
        ({"tokens": tokens[:3]}, "does not divide the 3 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            make_train_step(optax.sgd(1.0), accumulate=2)(state, batch)
    with pytest.raises(ValueError, match="loss_mask has shape"):
        next_token_loss(model, tokens, loss_mask=tokens[:1])
