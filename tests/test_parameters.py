"""One list of parameters: the same paths and order wherever a model's parameters are used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from hmf_jax import loading, parameters, table
from hmf_jax.model import HybridLM
from hmf_jax.sharding import for_model, make_mesh
from hmf_jax.training.lora import apply_lora
from tests.util import random_model, tiny_config

CONFIG = tiny_config(("*", "GKA", "M2") * 4)  # 12 layers: "layers.10" is not before "layers.2"


def test_paths_are_those_of_the_checkpoint_table_in_the_order_of_the_leaves():
    model = nnx.eval_shape(lambda: HybridLM(CONFIG))
    params = parameters.flat_params(model)
    assert list(params.values()) == jax.tree.leaves(model)
    assert sorted(params) == sorted(entry.path for entry in table.entries(CONFIG))
    layers = [int(path.split(".")[1]) for path in params if path.startswith("layers.")]
    assert layers == sorted(layers) and layers[-1] == 11
    assert loading.flat_params is parameters.flat_params  # where it used to live


def test_a_mesh_splits_parameters_by_the_names_of_their_dimensions():
    mesh = for_model(make_mesh(fsdp=2, tp=2, devices=jax.devices()[:4]), CONFIG)
    assert mesh is not None
    model = nnx.eval_shape(lambda: HybridLM(CONFIG, mesh=mesh))
    abstract = parameters.abstract_params(model, mesh)
    leaves = jax.tree.leaves(parameters.shardings(model, mesh))
    assert [a.sharding for a in abstract.values()] == leaves
    for path, variable in parameters.variables(model).items():
        assert len(variable.get_metadata()["dims"]) == abstract[path].ndim, path
    sharding = abstract["layers.0.mixer.q_proj.kernel"].sharding
    assert isinstance(sharding, NamedSharding)
    assert "fsdp" in sharding.spec[0] and "tp" in sharding.spec[1]
    assert parameters.abstract_params(model, None)["norm.weight"].sharding is None


def test_parts_gradients_and_adapters_have_the_same_paths():
    model = random_model(tiny_config(("*",)), jnp.float32)
    mixer = parameters.flat_params(model.layers[0].mixer)
    whole = parameters.flat_params(model)
    assert all(whole[f"layers.0.mixer.{path}"] is x for path, x in mixer.items())
    gradients = jax.grad(lambda m: sum(jnp.sum(x) for x in jax.tree.leaves(m)))(model)
    assert list(parameters.flat_params(gradients)) == list(whole)
    adapted = parameters.flat_params(apply_lora(model, rank=2, modules="q_proj"))
    new = {f"layers.0.mixer.q_proj.lora_{half}" for half in "AB"}
    assert set(adapted) - set(whole) == new


def test_with_params_fills_an_abstract_model_in():
    model = random_model(tiny_config(("*", "GKA")), jnp.float32)
    params = parameters.flat_params(model)
    abstract = nnx.eval_shape(lambda: HybridLM(model.config, dtype=jnp.float32))
    again = parameters.with_params(abstract, params)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    for path, x in parameters.flat_params(again).items():
        assert x is params[path], path
    assert not isinstance(parameters.flat_params(abstract)["norm.weight"], np.ndarray | jax.Array)


def test_with_params_refuses_by_name_what_does_not_fit():
    model = nnx.eval_shape(lambda: HybridLM(tiny_config(("*",))))
    params = parameters.flat_params(model)
    less = {path: x for path, x in params.items() if path != "norm.weight"}
    with pytest.raises(KeyError, match="missing parameters: norm.weight"):
        parameters.with_params(model, less)
    for changes, message in (
        ({"norm.wieght": params["norm.weight"]}, "norm.wieght is no parameter"),
        ({"norm.weight": np.ones(3, np.float32)}, r"norm.weight has shape \[3\], must be \[32\]"),
        ({"norm.weight": np.ones(32, np.int32)}, "norm.weight must be .* floating.* got int32"),
        ({"norm.weight": [1.0] * 32}, "norm.weight must be a floating-point array, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            parameters.with_params(model, {**params, **changes})
