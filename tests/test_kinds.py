"""A new kind of layer is one file (tests/toy_kind.py) and one line: the whole library knows it."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import hmf_jax
from hmf_jax import table
from hmf_jax.config import HybridConfig
from hmf_jax.loading import from_pretrained, save_pretrained
from hmf_jax.memory import describe, plan_memory, state_memory
from hmf_jax.mixers import KINDS
from hmf_jax.parameters import flat_params
from hmf_jax.priming import prime
from hmf_jax.training import TrainState, make_train_step, training_flops
from tests import toy_kind
from tests.util import random_model, rel, tiny_config

LAYERS = ("*", "EMA")


@pytest.fixture(autouse=True, scope="module")
def known():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "EMA", toy_kind.EMA)  # the one line
        yield


@pytest.fixture(scope="module")
def model(known):
    return random_model(tiny_config(LAYERS), jnp.float32)


def tokens(length: int = 11, batch: int = 2):
    return jnp.asarray(np.random.default_rng(0).integers(1, 64, (batch, length)), jnp.int32)


def test_config():
    config = tiny_config(LAYERS, ema=toy_kind.EMAConfig(use_gate=False))
    assert config.ema.use_gate is False and tiny_config(LAYERS).ema == toy_kind.EMAConfig()
    assert tiny_config(("*",)).ema is None
    data = config.to_dict()
    assert data["hybrid_override_pattern"] == "*-EMA"
    assert data["ema_config"] == {"use_gate": False}
    assert dataclasses.replace(HybridConfig.from_dict(data), extra="{}") == config
    assert config.override({"ema_config.use_gate": True}).ema.use_gate
    with pytest.raises(ValueError, match="unknown symbol 'EMA\\*'"):  # it cannot start from "*"
        tiny_config(("EMA*",))


def test_however_it_is_cut(model):
    """Prefill, continuation and single steps, with padding and packing, give one forward pass."""
    whole = model(tokens())[0]
    _, state = model(tokens()[:, :4], state=model.init_state(2, 16))
    middle, state = model(tokens()[:, 4:9], state=state)
    steps = []
    for i in (9, 10):
        logits, state = model(tokens()[:, i : i + 1], state=state)
        steps.append(logits)
    assert rel(jnp.concatenate([middle, *steps], axis=1), whole[:, 4:]) < 1e-5
    ids = jnp.asarray([[1] * 5 + [2] * 6, [0, 1, 1, 1, 1, 0, 3, 3, 3, 3, 0]])
    packed = model(tokens(), segment_ids=ids)[0]
    assert rel(packed[:1, 5:], model(tokens()[:1, 5:])[0]) < 1e-5
    assert rel(packed[1:, 6:10], model(tokens()[1:, 6:10])[0]) < 1e-5


def test_generation(model):
    (one,) = model.generate([[5, 9, 7]], max_new_tokens=4)
    whole = model(jnp.asarray([[5, 9, 7, *one.tokens]]))[0]
    assert one.tokens == whole[0, 2:-1].argmax(-1).tolist()


def test_checkpoints(model, tmp_path):
    save_pretrained(model, tmp_path / "saved", progress=False)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    own = {n.removeprefix("model.layers.1.ema."): x for n, x in stored.items() if ".ema." in n}
    assert {n: x.shape for n, x in own.items()} == {
        "in_proj.weight": (64, 32),
        "gate_proj.weight": (64, 32),
        "decay": (64,),
        "out_proj.weight": (32, 64),
    }
    again = from_pretrained(tmp_path / "saved", dtype=jnp.float32, progress=False)
    for path, x in flat_params(model).items():
        np.testing.assert_array_equal(flat_params(again)[path], x, err_msg=path)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["ema_config"] == {"use_gate": True}


def test_priming():
    base = random_model(tiny_config(("*", "*")), jnp.float32)
    with pytest.raises(ValueError, match=r"layer 1: the base has '\*' there, 'EMA' cannot start"):
        prime(base, "*-EMA")


def test_priming_keeps_it(model):
    assert prime(model, "SWA-EMA").config.layer_kinds == ("SWA", "EMA")


def test_memory():
    config = tiny_config(LAYERS)
    short, long = state_memory(tiny_config(("EMA",)), (16, 64), dtype=jnp.float32).values()
    assert (short.attention, short.fixed) == (long.attention, long.fixed) == (0, 64 * 4)
    assert plan_memory(config, 128, 1e9).sequences > 1
    assert "1 x EMA  exponential moving average, gated" in describe(config)


def test_parameters_are_counted(model):
    assert table.num_parameters(model.config) == sum(x.size for x in flat_params(model).values())


def test_training():
    optimizer = optax.adam(1e-2)
    state = TrainState.create(random_model(tiny_config(LAYERS), jnp.float32), optimizer)
    step, losses = make_train_step(optimizer, remat={"EMA": "block"}), []
    for _ in range(8):
        state, metrics = step(state, {"tokens": tokens()})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    per_key = 12 * 4 * 16  # of the attention layer alone; rows of 11 tokens see 6 keys on average
    assert training_flops(state, 11) - training_flops(state, 1) == per_key * (6 - 1)


def test_composition(model):
    state = hmf_jax.compose(model, list(range(1, 13)), 2)
    assert state.layers[1].average.shape == (1, 64)  # the mean of both parts
    with pytest.raises(ValueError, match="exponential moving average states cannot be fused"):
        hmf_jax.compose(model, list(range(1, 13)), 2, ssm="fuse")


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("hmf_jax.state", "GKAState", "hmf_jax.mixers.GKAState"),
        ("hmf_jax.convert", "mapping", "hmf_jax.table and hmf_jax.convert.rows"),
        ("hmf_jax.convert", "verify", "hmf_jax.verify"),
    ],
)
def test_names_that_moved_say_where(old, name, new):
    with pytest.raises(ImportError, match=f"{old}.{name} is now {new}"):
        exec(f"from {old} import {name}")


def test_names_that_stay_in_config():
    from hmf_jax.config import FUSED, LAYER_KINDS, BMojoConfig, streams

    assert LAYER_KINDS == ("*", "SWA", "GKA", "GDN", "M2", "BMF", "EMA")
    assert list(FUSED) == ["*DA", "SWA*", "GKA*", "GDN*", "M2*", "BMF*", "GDN>GKA"]
    assert streams("GDN>GKA") == ("GKA", "GDN") and BMojoConfig().ssm_mixer == "M2"
    with pytest.raises(ImportError, match="cannot import name 'LSTMConfig'"):
        exec("from hmf_jax.config import LSTMConfig")
