"""Files that were split into rooms still have their names."""

from __future__ import annotations

import importlib

import pytest

OLD = {
    "hmf_jax.chat": "ChatSession Reply TextStream check_stop default_sampling generate_text "
    "load_tokenizer split_thinking stop_ids stream_text THINK END_THINK",
    "hmf_jax.loading": "abstract_params flat_params with_params",
    "hmf_jax.training.config": "TrainConfig fine_tune plan",
    "hmf_jax.training.data": "Batches Document Documents encode_chat encode_text",
    "hmf_jax.training.trainer": "train place data_shard find_not_finite peak_flops PEAK_FLOPS "
    "plot_loss read_metrics training_flops",
    "hmf_jax.embedded.train": "HYBRIDS NUM_ITER WINDOW Plan accuracy fit run slug start",
}


@pytest.mark.parametrize("module", OLD)
def test_old_paths(module):
    found = importlib.import_module(module)
    for name in OLD[module].split():
        value = getattr(found, name)
        home = getattr(value, "__module__", None)
        if home is not None and home != module:  # the very object of its new home
            assert getattr(importlib.import_module(home), name) is value
