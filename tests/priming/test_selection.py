"""Layer selection: variants that share their weights, the original's CSV, ranking."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.config import HybridConfig
from hmf_jax.loading import from_pretrained, save_pretrained
from hmf_jax.options import Backbone
from hmf_jax.parameters import flat_params, with_params
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
    save_pretrained(random_model(base.config, jnp.float32, 9), tmp_path / "other", progress=False)
    with pytest.raises(FileExistsError, match="layer_0 is a variant of another base"):
        write_swa_variants(tmp_path / "other", tmp_path / "variants", window=5)
    (tmp_path / "variants" / "layer_0" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="layer_0/config.json is not valid JSON"):
        write_swa_variants(tmp_path / "base", tmp_path / "variants", window=5)
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


def position(model) -> dict[str, float]:
    """A score that costs nothing: where the limited layer is."""
    kinds = model.config.layer_kinds
    return {"task": float(kinds.index("SWA") if "SWA" in kinds else -1)}


def test_scores_are_of_the_same_weights_data_and_settings(base, tmp_path):
    """Scores of something else are never taken for these, whoever wrote or damaged them."""
    file, record = tmp_path / "scores.csv", tmp_path / "scores.csv.json"
    options: dict[str, Any] = dict(window=5, identity="data A")
    scores = score_layers(base, position, file, **options)
    whole, told = (file.read_bytes(), record.read_bytes()), []
    assert score_layers(base, position, file, **options, done=told.append) == scores
    assert told == [] and (file.read_bytes(), record.read_bytes()) == whole

    def killed(layer: int) -> None:
        if layer == 1:
            raise KeyboardInterrupt

    for path in (file, record):
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        score_layers(base, position, file, **options, done=killed)
    score_layers(base, position, file, **options, done=told.append)
    assert told == [2] and (file.read_bytes(), record.read_bytes()) == whole

    last = flat_params(base)["layers.2.mlp.up_proj.kernel"]
    moved = with_params(base, {**flat_params(base), "layers.2.mlp.up_proj.kernel": last[::-1]})
    for model, changes, what in (
        (moved, {}, "base weights"),
        (base, {"identity": "data B"}, "score"),
        (base, {"window": 6}, "window"),
    ):
        with pytest.raises(FileExistsError, match=f"holds scores of other {what}; choose another"):
            score_layers(model, position, file, **{**options, **changes})
    assert (file.read_bytes(), record.read_bytes()) == whole

    for damage, error, message in (
        (whole[0].replace(b"0,0.0", b"0,7.0"), FileExistsError, "layer 0 are not those of scores"),
        (b"\0", ValueError, "scores.csv"),
        (b"\xff", ValueError, "scores.csv is no CSV"),
        (whole[0][:-5], ValueError, "as many cells as the header"),
    ):
        file.write_bytes(damage)
        with pytest.raises(error, match=message):
            score_layers(base, position, file, **options)
    file.write_bytes(whole[0])
    for damage in (b"", b"[]", b"{}", record.read_bytes().replace(b"0.0", b'"x"')):
        record.write_bytes(damage)
        with pytest.raises(ValueError, match="scores.csv.json"):
            score_layers(base, position, file, **options)
    record.unlink()
    with pytest.raises(FileExistsError, match="has a column task already, and nothing says"):
        score_layers(base, position, file, **options)
    assert file.read_bytes() == whole[0]


def test_scores_of_other_tasks_stay(base, tmp_path):
    file = tmp_path / "scores.csv"
    file.write_text("layer_num,recall\n2,0.5\n-1,0.9\n")
    score_layers(base, position, file, window=5)
    text = "layer_num,recall,task\n2,0.5,2.0\n-1,0.9,-1.0\n0,,0.0\n1,,1.0\n"
    assert file.read_text() == text
    # Killed between the two files: the record has what the CSV lacks.
    file.write_text("layer_num,recall,task\n2,0.5,\n-1,0.9,-1.0\n")
    told = []
    score_layers(base, position, file, window=5, done=told.append)
    assert file.read_text() == text and told == []
    file.unlink()
    file.mkdir()
    with pytest.raises(FileExistsError, match="scores.csv is not a file"):
        score_layers(base, position, file, window=5)


def test_scores_must_be_numbers(base, tmp_path):
    file = tmp_path / "scores.csv"
    for score, message in (
        (lambda model: {"task": float("nan")}, "the base: task is nan; nothing added"),
        (lambda model: {}, "the base: no score"),
    ):
        with pytest.raises(ValueError, match=message):
            score_layers(base, score, file, window=5)
        assert not file.exists()
    score_layers(base, position, file, window=5)


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
    other = [{**rows[0], "tokens": rows[0]["tokens"].at[0, 3].add(1)}, rows[1]]
    found = [likelihood(batches).identity for batches in (rows, iter(rows), rows[::-1], other)]
    assert found[0] == found[1] and found[0] not in found[2:]


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


def test_layers_that_are_not_attention_stay(tmp_path):
    """Only attention is scored: the other layers of a base need no row, and keep their kind."""
    base = ("GDN", "*", "GDN", "*")
    scores = scores_of(tmp_path, CSV)
    scores = LayerScores(scores.tasks, {i: row for i, row in scores.rows.items() if i in (1, 3)})
    best = select_layers(scores, 1, num_layers=4, layers=[1, 3])
    assert best.layers == (1,) and [i for i, _ in best.ranking] == [1, 3]
    assert selection.pattern(best.layers, 4, "SWA", base=base) == "GDN-SWA*-GDN-*DA"
    assert selection.pattern(best.layers, 4, "SWA", base=base, fused=False) == "GDN-SWA-GDN-*"
    assert selection.pattern([0, 3], 4, "GKA", base=base) == "GDN>GKA-*DA-GDN-GKA*"
    assert "pattern: GDN-SWA*-GDN-*DA" in selection.describe(best, 4, "SWA", base)


BASES = {
    "llama": {"mlp_bias": True},
    "qwen2": {},
    "ministral3": {},
    "qwen3_moe": {"num_local_experts": 16, "mlp_only_layers": [1]},
}


@pytest.mark.parametrize("family", BASES)
def test_variants_of_other_families_are_the_base_but_for_one_window(family, tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 64}
    stored = {"model_type": family, "dtype": "float32", **sizes, **BASES[family]}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(stored))
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    (_, directory) = write_swa_variants(tmp_path / "base", tmp_path / "variants", window=5)
    base, config = HybridConfig.from_dict(stored), HybridConfig.from_json(directory)
    assert config.layer_kinds == ("*", "SWA") and not config.is_stock
    for field in dataclasses.fields(Backbone):
        assert getattr(config, field.name) == getattr(base, field.name), field.name
    written = json.loads((directory / "config.json").read_text())
    assert written["model_type"] == f"hybrid_{family}" and written["dtype"] == "float32"


def test_no_variants_where_the_original_has_no_windows(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_next"}))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match="no SWA layers in qwen3_next_hmf models.*score them here"):
        write_swa_variants(tmp_path, tmp_path.parent / "variants")


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
        (CSV.replace("0.7", "1_0"), {}, "line 4: '1_0' is no number"),
        (CSV.replace("-1,base", "-2,base"), {}, "line 2: layer -2 is not between -1 and"),
        (CSV.replace("3,SWA", "99999,SWA"), {}, "line 6: layer 99999 is not between"),
        (CSV[:-6], {}, "line 6: must have as many cells"),
        (CSV.replace("0.7,,", "0.7,,,"), {}, "line 4: must have as many cells"),
        (CSV.replace("rag", "recall"), {}, "the header must be layer_num"),
        (CSV.replace("0.7", '"0.7'), {}, "scores.csv is no CSV"),
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
    with pytest.raises(ValueError, match="kind 'GAK' is unknown; use one of .*GKA"):
        selection.pattern([1], 4, "GAK")
    mixed = random_model(tiny_config(("*", "SWA")), jnp.float32)
    with pytest.raises(ValueError, match=r"layer 1 is not full attention; choose among \[0\]"):
        swa_variant(mixed, 1, window=5)
    with pytest.raises(ValueError, match="already, SWAConfig"):
        swa_variant(mixed, 0, window=6)
