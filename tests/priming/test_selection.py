"""Layer selection: variants that share their weights, the original's CSV, ranking."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.loading import from_pretrained, save_pretrained
from hmf_jax.parameters import flat_params
from hmf_jax.priming import (
    LayerScores,
    likelihood,
    read_scores,
    score_layers,
    select_layers,
    selection,
    swa_variant,
    write_scores,
    write_swa_variants,
)
from tests.util import random_model, tiny_config

CSV = """\
layer_num,layer_type,n_runs,recall,rag,window_size
-1,base,3,0.9,0.9,2048
0,SWA,3,0.2,0.4,2048
2,SWA,3,0.7,,2048
1,SWA,3,0.5,0.3,2048
3,SWA,3,0.4,0.4,2048
"""


def tokens(length: int = 12):
    return jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, length)), jnp.int32)


@pytest.fixture(scope="module")
def base():
    return random_model(tiny_config(("*",) * 3), jnp.float32)


def scores_of(tmp_path: Path, text: str) -> LayerScores:
    (tmp_path / "scores.csv").write_text(text)
    return read_scores(tmp_path / "scores.csv")


def test_a_variant_is_the_base_but_for_one_window(base):
    variant = swa_variant(base, 1, window=5)
    assert variant.config.layer_kinds == ("*", "SWA", "*") and base.config.layer_kinds == ("*",) * 3
    own = flat_params(variant)
    assert all(own[path] is x for path, x in flat_params(base).items())
    a, b = (m(tokens())[0] for m in (variant, base))
    np.testing.assert_allclose(a[:, :5], b[:, :5], rtol=1e-4, atol=1e-5)
    assert (abs(a[:, 5:] - b[:, 5:]).max(-1) > 1e-3).all()


def test_variant_directories_are_links_and_load(base, tmp_path):
    save_pretrained(base, tmp_path / "base", progress=False)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    written = write_swa_variants(tmp_path / "base", tmp_path / "variants", window=5)
    assert [p.name for p in written] == ["layer_0", "layer_1", "layer_2"]
    one = tmp_path / "variants" / "layer_1"
    for name in ("model.safetensors", "tokenizer.json"):
        assert (one / name).samefile(tmp_path / "base" / name)
        assert not (one / name).is_symlink()
    config = json.loads((one / "config.json").read_text())
    assert config["hybrid_override_pattern"] == "*-SWA-*"
    assert config["swa_config"] == {"window_size": 5} and config["model_type"] == "hybrid_qwen3"
    loaded = from_pretrained(one, dtype=jnp.float32, progress=False)
    np.testing.assert_array_equal(loaded(tokens())[0], swa_variant(base, 1, window=5)(tokens())[0])

    stamp = (one / "config.json").stat().st_mtime_ns
    (tmp_path / "variants" / "layer_2" / "config.json").unlink()
    for file in (tmp_path / "variants" / "layer_2").iterdir():
        file.unlink()
    write_swa_variants(tmp_path / "base", tmp_path / "variants", window=5)
    assert (one / "config.json").stat().st_mtime_ns == stamp
    assert (tmp_path / "variants" / "layer_2" / "config.json").is_file()
    with pytest.raises(FileExistsError, match="variant of other settings"):
        write_swa_variants(tmp_path / "base", tmp_path / "variants", window=6)
    with pytest.raises(ValueError, match="layer 3 is not full attention"):
        write_swa_variants(tmp_path / "base", tmp_path / "more", layers=[0, 3])
    assert not (tmp_path / "more").exists()


def test_scoring_goes_on_where_it_stopped(base, tmp_path):
    file = tmp_path / "scores.csv"
    calls = []

    def score(model):
        calls.append(model.config.layer_kinds)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"task": float(len(calls))}

    with pytest.raises(KeyboardInterrupt):
        score_layers(base, score, file, window=5)
    assert read_scores(file).rows == {-1: {"task": 1.0}, 0: {"task": 2.0}}
    calls.append(())
    scores = score_layers(base, score, file, window=5)
    assert calls[-2:] == [("*", "SWA", "*"), ("*", "*", "SWA")] and len(calls) == 6
    assert scores == read_scores(file) and set(scores.rows) == {-1, 0, 1, 2}


def test_likelihood_is_the_mean_over_all_tokens():
    model = random_model(tiny_config(("*",)), jnp.float32)
    ids = jnp.asarray([[1] * 12, [1] * 7 + [0] * 5])
    logp = np.asarray(jax.nn.log_softmax(model(tokens())[0], axis=-1))
    own = np.take_along_axis(logp[:, :-1], np.asarray(tokens())[:, 1:, None], axis=2)[..., 0]
    mean = (own[0].sum() + own[1, :6].sum()) / 17
    batch = {"tokens": tokens(), "segment_ids": ids}
    rows = [{name: a[i : i + 1] for name, a in batch.items()} for i in (0, 1)]
    assert np.isclose(likelihood(iter(rows))(model)["log_likelihood"], mean, rtol=1e-5)
    with pytest.raises(ValueError, match="no batches"):
        likelihood([])


def test_csv(tmp_path):
    scores = scores_of(tmp_path, CSV)
    assert scores.tasks == ("recall", "rag")
    assert list(scores.rows) == [-1, 0, 2, 1, 3] and scores.rows[2] == {"recall": 0.7}
    write_scores(scores, tmp_path / "again.csv")
    assert read_scores(tmp_path / "again.csv") == scores
    assert (tmp_path / "again.csv").read_text().splitlines()[2:4] == ["0,0.2,0.4", "2,0.7,"]


def test_ranking(tmp_path):
    scores = scores_of(tmp_path, CSV)
    best = select_layers(scores, 2)
    assert best.layers == (1, 2)  # 1 and 3 share 0.4, but row 1 comes first
    assert [i for i, _ in best.ranking] == [2, 1, 3, 0]
    assert (
        best.tie
        == "layers [1, 3] share the score 0.4; [1] were taken because their rows come first"
    )
    assert select_layers(scores, 3).tie is None
    assert select_layers(scores, 2, task_filter="call").layers == (1, 2)
    three = select_layers(scores, 3, exclude_layer_0=True)
    assert three.layers == (1, 2, 3) and 0 not in dict(three.ranking)
    assert selection.pattern(best.layers, 4, "GKA") == "*DA-GKA*-GKA*-*DA"
    assert selection.pattern(best.layers, 4, "M2", fused=False) == "*-M2-M2-*"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (CSV.replace("1,SWA,3,0.5,0.3,2048\n", ""), {}, r"no row for layers \[1\] \(of 4\)"),
        (CSV, {"num_layers": 6}, r"no row for layers \[4, 5\] \(of 6\)"),
        (CSV, {"num_layers": 3}, r"3 layers, but there are scores of \[3\]"),
        (CSV, {"m": 5}, "m=5: choose between 1 and 4"),
        (CSV, {"m": 4, "exclude_layer_0": True}, "m=4: choose between 1 and 3"),
        (CSV, {"task_filter": "icl"}, "no task contains 'icl'; the tasks are recall, rag"),
        (CSV.replace("0.7", ""), {}, "layer 2 has no score in recall, rag"),
        (CSV + "3,SWA,3,0.1,0.1,2048\n", {}, "line 7: layer 3 is there twice"),
        (CSV.replace("0.7", "good"), {}, "line 4: could not convert string to float"),
        (CSV.replace("0.7", "nan"), {}, "line 4: recall is not finite"),
        ("layer,task\n0,1\n", {}, "the header must be layer_num,<task>"),
        ("", {}, "the header must be layer_num,<task>"),
    ],
)
def test_bad_tables(text, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        select_layers(scores_of(tmp_path, text), **{"m": 2, **options})


def test_bad_layers(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="pass a CSV"):
        read_scores(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"layers \[4\] are not among the 4"):
        selection.pattern([1, 4], 4, "GKA")
    mixed = random_model(tiny_config(("*", "SWA")), jnp.float32)
    with pytest.raises(ValueError, match=r"layer 1 is not full attention; choose among \[0\]"):
        swa_variant(mixed, 1, window=5)
    with pytest.raises(ValueError, match="already, SWAConfig"):
        swa_variant(mixed, 0, window=6)
