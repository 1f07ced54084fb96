"""Files that were split still have their names, or say where these went."""

from __future__ import annotations

import importlib
import re

import pytest

OLD = {
    "hmf_jax.chat": "ChatSession Reply TextStream check_stop default_sampling generate_text "
    "load_tokenizer split_thinking stop_ids stream_text THINK END_THINK",
    "hmf_jax.loading": "abstract_params flat_params with_params",
    "hmf_jax.training.config": "TrainConfig fine_tune plan",
    "hmf_jax.training.data": "Batches Document Documents encode_chat encode_text",
    "hmf_jax.training.trainer": "train place data_shard find_not_finite peak_flops PEAK_FLOPS "
    "plot_loss read_metrics training_flops",
    "hmf_jax.embedded.train": "BMOJO HYBRIDS MIXERS NUM_ITER SMALL TARGET WINDOW Course Phase Plan "
    "accuracy answers base_config fit forget in_dtype main optimizer replace run slug start "
    "summarize table write_results",
    "hmf_jax.cli": "chat convert demo generate info main prime_distill prime_init prime_select "
    "prime_unfuse train verify",
    "hmf_jax.config": "FUSED LAYER_KINDS SUPPORTED_MODEL_TYPES KNOWN_MODEL_TYPES HybridConfig "
    "BMojoConfig GDNConfig GKAConfig Mamba2Config RopeConfig SWAConfig streams",
    "hmf_jax.generation": "MOST_STEPS SMALLEST_CAPACITY SMALLEST_CHUNK SMALLEST_HALF "
    "Generation capacity_for check_prompts enable_compilation_cache generate stream warmup",
    "hmf_jax.model": "Block HybridLM PackedModel",
}
RENAMED = {"Generation": "Output", "streams": "split_symbol"} | {
    f"prime_{name}": name for name in ("distill", "init", "select", "unfuse")
}
# Imported from where they were, these say where they went or what to use.
MOVED = {
    "hmf_jax.chat": {"run": "hmf_jax.text.generate.run"},
    "hmf_jax.cli": {"DType": "hmf_jax.cli.options.DType", "TP": "hmf_jax.cli.options.TP"},
    "hmf_jax.compose": {
        "compose": "hmf_jax.composition",
        "picaso_weights": "hmf_jax.mixers.mamba2",
    },
    "hmf_jax.convert.mapping": {"Row": "hmf_jax.convert.rows", "table": "hmf_jax.table"},
    "hmf_jax.convert.verify": {"verify_dir": "hmf_jax.verify"},
    "hmf_jax.generation": {"Step": "hmf_jax.engine.Event"},
    "hmf_jax.layers": {
        "GatedGroupNorm": "hmf_jax.mixers.mamba2.GatedGroupNorm",
        "OutputNorm": "hmf_jax.mixers.linear.OutputNorm",
    },
    "hmf_jax.mixers": {"RECURRENT": "hmf_jax.mixers.KINDS"},
    "hmf_jax.priming.stage0": {"Settings": "Mapping"},
    "hmf_jax.state": {
        f"{name}State": f"hmf_jax.mixers.{name}State"
        for name in ("Attention", "Window", "GKA", "GDN", "Mamba2", "BMojo")
    },
}


@pytest.mark.parametrize("module", OLD)
def test_old_paths(module):
    found = importlib.import_module(module)
    for name in OLD[module].split():
        value = getattr(found, name)
        home = getattr(value, "__module__", None)
        if home is not None and home != module:  # the very object of its new home
            assert getattr(importlib.import_module(home), RENAMED.get(name, name)) is value


@pytest.mark.parametrize("module", MOVED)
def test_moved(module):
    for name, place in MOVED[module].items():
        with pytest.raises(ImportError, match=re.escape(place)):
            getattr(importlib.import_module(module), name)


def test_moved_places_exist():
    """What an error names can be imported, as an attribute or as a module."""
    for place in {p for names in MOVED.values() for p in names.values() if "." in p}:
        try:
            importlib.import_module(place)
        except ModuleNotFoundError:
            module, name = place.rsplit(".", 1)
            getattr(importlib.import_module(module), name)


def test_decoder():
    from hmf_jax.generation import Decoder

    for begin in (Decoder, Decoder.begin):
        with pytest.raises(TypeError, match=r"hmf_jax\.engine\.Engine"):
            begin(None)


def test_unknown_names():
    """A module with moved names still has no others: `hasattr` works."""
    for module in ("hmf_jax.state", "hmf_jax.layers", "hmf_jax.mixers", "hmf_jax.cli"):
        assert not hasattr(importlib.import_module(module), "no_such_name")
