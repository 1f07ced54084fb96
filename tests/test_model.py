"""A model as an object: dtypes and casts, how it prints, what Flax's functions do with it."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import hmf_jax
from hmf_jax import table
from hmf_jax.model import HybridLM
from hmf_jax.moved import ELSEWHERE, TORCH_METHODS
from hmf_jax.packed import PackedModel
from hmf_jax.parameters import flat_params
from hmf_jax.training.step import TrainState
from tests.util import mesh_of, place, random_model, tiny_config

ALL = ("*", "SWA", "GKA", "GDN", "M2", "BMF")
EXACT = ("A_log", "dt_bias", "D")
TOKENS = jnp.arange(1, 9)[None]
build = functools.cache(random_model)


@pytest.fixture
def model() -> HybridLM:
    return copy.deepcopy(build(tiny_config(("*",)), jnp.float32))


def cast(model: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), model)


@functools.partial(jax.jit, static_argnames="solver")
def logits(model: HybridLM, num_iter: Any, solver: str) -> jax.Array:
    return model(TOKENS, num_iter=num_iter, solver=solver)[0]


class TestDtype:
    @pytest.mark.parametrize(
        ("how", "dtype"),
        [
            (cast, "bfloat16"),
            pytest.param(cast, "float16", marks=pytest.mark.slow),
            pytest.param(HybridLM.astype, "bfloat16", marks=pytest.mark.slow),
        ],
    )
    def test_a_cast_model_computes_in_its_dtype(self, how, dtype) -> None:
        """Logits, and the convolutions and caches of states; recurrent states are float32."""
        model = how(build(tiny_config(ALL), jnp.float32), dtype)
        assert model.dtype == jnp.dtype(dtype)
        run = lambda m, t: m(t, state=m.init_state(1, 8))  # noqa: E731
        logits, state = jax.eval_shape(run, model, TOKENS)
        assert logits.dtype == jnp.dtype(dtype)
        for layer, symbol in zip(state.layers, ALL, strict=True):
            for path, x in jax.tree.leaves_with_path(layer):
                name = jax.tree_util.keystr(path)
                exact = re.search(r"h_kk|h_kv|\.s$|log_decay", name) is not None
                assert x.dtype == (jnp.float32 if exact else jnp.dtype(dtype)), (symbol, name)

    def test_astype_is_a_new_model_and_keeps_what_must_be_exact(self) -> None:
        model = build(tiny_config(ALL), jnp.float32)
        half = model.astype("bfloat16")
        assert model.dtype == jnp.float32
        for path, x in flat_params(half).items():
            exact = path.endswith(EXACT)
            assert x.dtype == (jnp.float32 if exact else jnp.bfloat16), path
        loaded = nnx.eval_shape(lambda: HybridLM(model.config, dtype=jnp.bfloat16))
        assert jax.tree.structure(half) == jax.tree.structure(loaded)

    @pytest.mark.slow
    def test_rounded_decays_are_the_only_difference_of_a_plain_cast(self) -> None:
        """In float32 again, so that only parameters differ: A_log is used in full precision."""
        model = build(tiny_config(("GKA",)), jnp.float32)
        rounded = cast(cast(model, jnp.bfloat16), jnp.float32)
        mixed = flat_params(rounded) | {
            path: x.astype(jnp.bfloat16)
            for path, x in flat_params(rounded).items()
            if path.endswith(EXACT)
        }
        mixed = jax.tree.unflatten(jax.tree.structure(rounded), list(mixed.values()))
        np.testing.assert_array_equal(*(logits(m, 3, "cg") for m in (mixed, rounded)))

    @pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "complex64"])
    def test_what_no_model_computes_in(self, model: HybridLM, dtype: str) -> None:
        with pytest.raises(ValueError, match=f"{dtype}.*choose bfloat16, float16 or float32"):
            cast(model, dtype)(TOKENS)
        for made in (model.astype, lambda dtype: HybridLM.init(model.config, dtype=dtype)):
            with pytest.raises(ValueError, match=f"{dtype}.*choose bfloat16, float16 or float32"):
                made(dtype)

    @pytest.mark.parametrize("dtype", [None, "half precision", "float64", object()])
    def test_what_is_no_dtype(self, model: HybridLM, dtype: Any) -> None:
        with pytest.raises(ValueError, match=r"^dtype=[^\n]*$"):
            model.astype(dtype)

    def test_saved_in_the_dtype_it_was_cast_to(self, model: HybridLM, tmp_path) -> None:
        """Without `astype` tensors keep the dtypes of the source."""
        model.save_pretrained(tmp_path / "source", progress=False)
        model.source = tmp_path / "source"
        for saved, dtype in (
            (cast(model, jnp.bfloat16), "float32"),
            (model.astype("float16"), "float16"),
        ):
            saved.save_pretrained(tmp_path / dtype, progress=False)
            config = json.loads((tmp_path / dtype / "config.json").read_text())
            tensors = load_file(tmp_path / dtype / "model.safetensors")
            assert config["dtype"] == dtype and {x.dtype.name for x in tensors.values()} == {dtype}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(config="8b"), TypeError, "HybridConfig.preset"),
        (dict(seed=-1), ValueError, "seed must be an integer >= 0, got -1"),
        (dict(seed=1.5), ValueError, "seed must be an integer"),
        (dict(dtype=None), ValueError, "dtype=None"),
    ],
)
def test_bad_arguments_of_init(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        HybridLM.init(**{"config": tiny_config(("*",)), **options})


class TestSource:
    """Where a model is from follows it, and is no part of what programs are compiled for."""

    def test_what_keeps_it(self, model: HybridLM) -> None:
        model.source = "/models/a"
        for how in (
            copy.copy,
            copy.deepcopy,
            nnx.clone,
            lambda m: cast(m, jnp.float16),
            lambda m: m.astype(jnp.float16),
            lambda m: nnx.merge(*nnx.split(m)),
            lambda m: pickle.loads(pickle.dumps(m)),
            lambda m: jax.device_put(m, jax.devices()[1]),
            lambda m: TrainState.create(m, optax.sgd(0.1)).model(),
        ):
            new = how(model)
            assert new.source == "/models/a"
            new.source = "/models/b"
            assert model.source == "/models/a"

    def test_models_of_two_directories_share_programs_and_map_together(
        self, model: HybridLM, tmp_path
    ) -> None:
        other = cast(model, jnp.float32)
        model.source, other.source = "/models/a", "/models/b"
        traced = []

        @jax.jit
        def double(model: HybridLM) -> HybridLM:
            traced.append(model)
            return jax.tree.map(lambda x: 2 * x, model)

        assert double(model).source is None and double(other).source is None
        assert len(traced) == 1 and double(model).origin.lost
        with pytest.warns(UserWarning, match="jitted function.*no tokenizer files.*source="):
            double(model).save_pretrained(tmp_path / "saved", progress=False)
        assert jax.tree.map(jnp.add, model, other).source == "/models/a"
        assert PackedModel.of(model).structure is PackedModel.of(other).structure
        assert PackedModel.of(model).model().source is None

    def test_trained_models_keep_their_own(self, model: HybridLM) -> None:
        other = cast(model, jnp.float32)
        model.source, other.source = "/models/a", "/models/b"
        one, two = (TrainState.create(m, optax.sgd(0.1)) for m in (model, other))
        step = jax.jit(lambda state: state)
        assert step(one).model().source == "/models/a"
        assert step(two).model().source == "/models/b"


def test_counts() -> None:
    config = tiny_config(ALL)
    model = build(config, jnp.float32)
    assert model.num_parameters() == table.num_parameters(config)
    outside = model.num_parameters(exclude_embeddings=True)
    assert outside == model.num_parameters() - 2 * config.vocab_size * config.hidden_size


def test_prints_in_a_few_lines(model: HybridLM) -> None:
    """Layers, sizes and memory, whatever the leaves are."""
    model.source = "/models/a"
    text = repr(model)
    assert text == str(model) and len(text.splitlines()) <= 8
    for said in (
        "float32, loaded from /models/a",
        "1 layers: *",
        "1 x *    full attention",
        f"{model.num_parameters():,} parameters",
        "one sequence of 512 tokens",
    ):
        assert said in text
    mesh = place(model, model.config, mesh_of(dict(tp=2)))
    assert "on a mesh of tp=2" in repr(mesh)
    assert repr(mesh.shardings()).startswith("HybridLM(") and "no arrays" in repr(mesh.shardings())
    assert "\n" not in repr(model.init_state(2, 8))
    assert "1 layers, rows=2, capacity=8" in repr(model.abstract_state(2, 8))


class TestFlax:
    """Each of NNX's functions works as it does for any module."""

    def test_gradients_and_optimizers(self, model: HybridLM) -> None:
        optimizer = nnx.Optimizer(model, optax.sgd(0.3), wrt=nnx.Param)

        @nnx.jit
        def step(model: HybridLM, optimizer: nnx.Optimizer) -> Any:
            loss = lambda m: -jax.nn.log_softmax(m(TOKENS)[0])[0, :, 7].mean()  # noqa: E731
            value, gradients = nnx.value_and_grad(loss)(model)
            optimizer.update(model, gradients)
            return value

        losses = [float(step(model, optimizer)) for _ in range(3)]
        assert losses[-1] < losses[0] - 0.1

    def test_split_and_merge(self, model: HybridLM) -> None:
        graph, state = nnx.split(model)
        run = jax.jit(lambda state: nnx.merge(graph, state)(TOKENS)[0])
        np.testing.assert_array_equal(run(state), run(nnx.state(copy.deepcopy(model))))
        assert len(jax.tree.leaves(nnx.state(model))) == len(flat_params(model))

    def test_modes_give_the_model_back(self, model: HybridLM) -> None:
        assert model.eval() is model and model.train() is model
        with pytest.raises(ValueError, match="no_such"):
            nnx.view(model, no_such=True)

    @pytest.mark.parametrize("kinds", [("GKA",), pytest.param(ALL, marks=pytest.mark.slow)])
    def test_tabulate(self, kinds: tuple[str, ...]) -> None:
        """Blocks, mixers and projections have their rows, and the model works afterwards."""
        model = build(tiny_config(kinds), jnp.float32)
        plain = dict(width=200, force_terminal=False)
        text = nnx.tabulate(model, TOKENS, console_kwargs=plain)
        rows = {line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")}
        layers = [f"layers/{i}" for i in range(len(kinds))]
        wanted = {"embed_tokens", "norm", *layers, *(f"{layer}/mixer" for layer in layers)}
        assert wanted <= rows and f"{model.num_parameters():,}" in text
        assert jax.eval_shape(lambda m: m(TOKENS)[0], model).shape == (*TOKENS.shape, 64)

    def test_display(self, model: HybridLM, capsys) -> None:
        nnx.display(model)
        assert "full attention" in capsys.readouterr().out


class TestNamesOfOtherLibraries:
    def test_methods_of_torch(self, model: HybridLM) -> None:
        for name, instead in TORCH_METHODS.items():
            with pytest.raises(AttributeError) as caught:
                getattr(model, name)
            assert str(caught.value) == f"HybridLM has no attribute {name!r}: {instead}"
            assert not hasattr(model, name)
        with pytest.raises(AttributeError, match="has no attribute 'layer'$"):
            _ = model.layer  # type: ignore[attr-defined]

    def test_names_of_transformers(self) -> None:
        for name, instead in ELSEWHERE.items():
            with pytest.raises(ImportError) as caught:
                getattr(hmf_jax, name)
            assert str(caught.value) == f"hmf_jax.{name} {instead}."
        assert not hasattr(hmf_jax, "no_such_name")

    def test_what_the_errors_name_exists(self) -> None:
        text = " ".join([*TORCH_METHODS.values(), *ELSEWHERE.values()])
        for path in set(re.findall(r"hmf_jax(?:\.\w+)+", text)):
            value = importlib.import_module("hmf_jax")
            for name in path.split(".")[1:]:
                if not hasattr(value, name):
                    importlib.import_module(f"{value.__name__}.{name}")
                value = getattr(value, name)


class TestSolver:
    """`solver=` of a call reaches GKA layers, those inside B'MOJO-F included."""

    @pytest.mark.slow
    def test_converges_sooner(self) -> None:
        model = build(tiny_config(("BMF",)), jnp.float32)
        exact = logits(model, 100, "chebyshev")
        error = {
            (solver, n): float(jnp.linalg.norm(logits(model, n, solver) - exact))
            for solver in ("chebyshev", "cg")
            for n in (0, 8)
        }
        assert error["cg", 8] < 0.02 * error["chebyshev", 8]
        assert error["cg", 0] == error["chebyshev", 0] > 0

    def test_every_way_through_the_model(self) -> None:
        """A state and single tokens compute the same; `hidden` and `trace` pass the name on."""
        model = build(tiny_config(("GKA",)), jnp.float32)
        options: Any = dict(num_iter=3, solver="cg")
        whole = logits(model, 3, "cg")
        other = logits(model, 3, "chebyshev")
        assert np.abs(whole - other).max() > 1e-2

        @jax.jit
        def ways(model):
            _, state = model(TOKENS[:, :-1], state=model.init_state(1, 8), **options)
            return model(TOKENS[:, -1:], state=state, **options)[0]

        last = ways(model)
        np.testing.assert_allclose(last, whole[:, -1:], atol=1e-4)
        assert model.embed(TOKENS, solver="cg")[1].solver == "cg"
        for way in (model.hidden, model.trace):
            with pytest.raises(ValueError, match="solver 'gmres'"):
                way(TOKENS, solver="gmres")

    def test_refusals(self, model: HybridLM) -> None:
        gka = build(tiny_config(("GKA",)), jnp.float32)
        with pytest.raises(ValueError, match="solver 'gmres' is unknown; use one of chebyshev, cg"):
            gka(TOKENS, solver="gmres")
        with pytest.raises(ValueError, match="solver='cg': the model has no layers with a solver"):
            model(TOKENS, solver="cg")
