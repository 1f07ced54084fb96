"""Texts from a file to a model that has learnt them: data, packing, loss and step together."""

from __future__ import annotations

import itertools
import json

import jax.numpy as jnp
import pytest

from hmf_jax.model import HybridLM
from hmf_jax.training import Batches, Recipe, TrainState, make_train_step
from tests.training.test_data import TOKENIZER
from tests.util import tiny_config

pytest.importorskip("grain")


@pytest.mark.slow
def test_a_model_learns_the_texts_of_a_file(tmp_path):
    file = tmp_path / "texts.jsonl"
    texts = ["abc" * 7, "xyz" * 5, "hello hello hello"]
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts * 4))
    batches = Batches(file, TOKENIZER, length=48, batch_size=2, process_index=0, process_count=1)
    config = tiny_config(("GKA", "*"), vocab_size=len(TOKENIZER))
    model = HybridLM.init(config, dtype=jnp.float32)
    optimizer = Recipe(1e-2, "cosine", warmup=0.1).optimizer(steps=40)
    state = TrainState.create(model, optimizer)
    step = make_train_step(optimizer, accumulate=2, max_grad_norm=1.0)
    losses = []
    for batch in itertools.islice(batches, 40):
        state, metrics = step(state, batch)
        assert metrics["finite"] and metrics["tokens"] == batch["loss_mask"].sum()
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 40
    assert losses[-1] < 0.2 * losses[0], losses
