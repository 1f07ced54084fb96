"""The benchmark runner on the tiny shape: rows are complete, errors honest, comparisons right."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import (
    compare,
    compiling,
    counting,
    full_size,
    models,
    operators,
    rows,
    run,
    serve_table,
    timing,
    training,
)
from benchmarks.peers import transformers_lora
from hmf_jax.cli import app
from hmf_jax.config import HybridConfig
from hmf_jax.loading import from_pretrained
from hmf_jax.memory import abstract_state, device_bytes, plan_memory
from hmf_jax.model import HybridLM, PackedModel
from hmf_jax.options import MoEConfig
from hmf_jax.pallas_kernels.shapes import SHAPES, TP
from hmf_jax.parameters import flat_params
from hmf_jax.sharding import make_mesh
from hmf_jax.training import TrainState, flops
from tests.util import rel

FIELDS = {
    "op", "impl", "dtype", "shape", "num_iter", "pass", "ms", "relative_error", "case", "extra",
    "device", "jax_version", "commit", "date",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SAMPLE_S", 1e-4)
    monkeypatch.setattr(timing, "BUDGET_S", 1e-3)


ALL = ",".join(operators.OPERATORS)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "dtype, ops, passes, bound",
    [
        ("bfloat16", "gka,attention", "fwd", 3e-2),
        ("bfloat16", "ssd", "decode", 3e-2),
        pytest.param("bfloat16", ALL, "fwd,decode", 3e-2, marks=pytest.mark.slow),
        pytest.param("float32", ALL, "fwd_bwd", 1e-4, marks=pytest.mark.slow),
    ],
)
def test_operators_give_complete_rows(
    tmp_path: Path, dtype: str, ops: str, passes: str, bound: float
) -> None:
    out = tmp_path / "deep" / "rows.jsonl"
    argv = f"--ops {ops} --lengths 40 --num-iter 3 --dtypes {dtype} --passes {passes}"
    run.main([*argv.split(), "--out", str(out)])
    got = read(out)
    assert {(r["op"], r["pass"]) for r in got} == {
        (op, pass_) for op in ops.split(",") for pass_ in passes.split(",")
    }
    for r in got:
        assert set(r) == FIELDS
        assert r["shape"].keys() == {"batch", "length", "heads", "kv_heads", "head_dim"}
        assert r["ms"] > 0 and r["num_iter"] == (3 if r["op"] == "gka" else None)
        assert r["relative_error"] < bound, r
        if dtype == "bfloat16":
            assert r["relative_error"] > 1e-5, f"bfloat16 cannot be this exact: {r}"


def test_errors_see_a_wrong_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    ssd = operators.ssd

    def off(x, *args, impl, **kwargs):
        y, state = ssd(x, *args, impl=impl, **kwargs)
        return (y * 1.1 if impl == "chunked" else y), state

    monkeypatch.setattr(
        operators, "ssd", lambda x, B, C, dt, A, D, **kw: off(x, B, C, dt, A, D, **kw)
    )
    row = operators.measure(
        "ssd", "chunked", shape="tiny", tp=1, batch=1, length=20, dtype="float32", num_iter=None,
        pass_="fwd", env={},
    )  # fmt: skip
    assert row.relative_error == pytest.approx(0.1, rel=1e-3)


def test_every_implementation_and_part_of_a_device(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    argv = "--ops attention --impls chunked,reference --tp 8 --passes fwd --lengths 8,12"
    run.main([*argv.split(), "--out", str(out)])
    got = read(out)
    assert {(r["impl"], r["case"], r["shape"]["heads"], r["shape"]["length"]) for r in got} == {
        (impl, "tiny tp8", 1, length) for impl in ("chunked", "reference") for length in (8, 12)
    }


def test_what_cannot_run_is_named_and_not_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit, match="Nothing was measured"):
        run.main(["--ops", "ssd", "--impls", "cudnn,auto", "--out", str(out)])
    assert not out.exists()
    err = capsys.readouterr().err
    assert "ssd has no implementation 'cudnn'" in err and "names its implementation" in err
    with pytest.raises(SystemExit):
        run.main(["--ops", "sdd"])
    assert "'sdd' is unknown; choose from gka" in capsys.readouterr().err


def test_ceilings() -> None:
    copy, matmul = timing.ceilings(64, {"device": "x"})
    assert copy.extra["gb_per_s"] == pytest.approx(2 * 8 * 64 * 64 * 4 / copy.ms / 1e6)
    assert matmul.extra["tflop_per_s"] == pytest.approx(2 * 64**3 / matmul.ms / 1e9)


def test_milliseconds_rotates_and_waits() -> None:
    seen = []

    def fn(x: int) -> int:
        seen.append(x)
        time.sleep(2e-3)
        return x

    assert 2 <= timing.milliseconds(fn, [1, 2, 3]) < 50
    assert set(seen[4:]) == {1, 2, 3} and len(seen) >= 4 + timing.SETS


def test_milliseconds_of_long_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LONG_S", 1e-3)
    seen = []
    timing.milliseconds(lambda x: (seen.append(x), time.sleep(2e-3)), [1, 2, 3])
    assert seen == [1, 1, 1, 2]


@pytest.mark.parametrize(
    "ops",
    [
        "ttft",
        "mixer,mixer_decode",
        pytest.param("model,ttft,decode_throughput,train_step,mlp", marks=pytest.mark.slow),
    ],
)
def test_models(tmp_path: Path, ops: str) -> None:
    out = tmp_path / "rows.jsonl"
    argv = f"--ops {ops} --mixers GKA --layers 2 --lengths 24"
    argv += " --chunk 16 --steps 4 --num-iter 2 --batches 2"
    run.main([*argv.split(), "--out", str(out)])
    got = {r["op"]: r for r in read(out)}
    assert got.keys() == set(ops.split(","))
    for r in got.values():
        assert set(r) == FIELDS and r["ms"] > 0 and r["num_iter"] == 2
        assert r["case"] == "tiny GKA 2 layers" and r["impl"] == "auto"
        assert r["extra"]["weight_bytes"] > 0
        assert r["extra"]["program_bytes"] > r["extra"]["weight_bytes"]
        assert r["op"] == "mlp" or r["extra"]["ran"]["gka"] == "chunked"
    if first := got.get("ttft"):  # 2 rows
        flops = 2 * counting.prompt_flops(models.Bench(two_layers(), {}, abstract=True).model, 24)
        assert first["extra"]["tflop_per_s"] == pytest.approx(flops / first["ms"] / 1e9)
    if decode := got.get("decode_throughput"):
        assert decode["pass"] == "decode"
        assert decode["extra"]["tokens_per_s"] == pytest.approx(2e3 / decode["ms"])


def two_layers() -> models.Settings:
    return models.Settings("tiny", "GKA", layers=2)


def test_what_a_prompt_multiplies_and_a_token_reads() -> None:
    """By hand, for two layers of attention with and without experts."""
    config = HybridConfig.preset("tiny", layer_kinds=("*", "*"))
    d, f, H, K, D = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    head = config.vocab_size * d
    attention, mlp = 2 * d * (H + K) * D, 3 * d * f

    def shapes(config: HybridConfig) -> HybridLM:
        return jax.eval_shape(lambda: HybridLM.init(config, dtype=jnp.bfloat16))

    def flops(mlp: int) -> int:
        return 2 * (10 * 2 * (attention + mlp) + head) + 2 * 4 * H * D * 10 * 11 // 2

    assert counting.prompt_flops(shapes(config), 10) == flops(mlp)
    moe = MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=32)
    sparse = shapes(dataclasses.replace(config, family="qwen3_moe", moe=moe))
    experts = 3 * d * 32
    assert counting.prompt_flops(sparse, 10) == flops(2 * experts + 8 * d)
    whole = counting.weight_bytes(sparse, 10**6)
    assert whole == device_bytes(sparse) - (0 if config.tie_word_embeddings else 2 * head)
    assert whole - counting.weight_bytes(sparse, 1) == 2 * 2 * 6 * experts
    assert whole - counting.weight_bytes(sparse, 2) == 2 * 2 * 6 * experts * 3 // 4


def test_programs_are_compiled_before_they_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """--compile-only makes neither arrays nor rows."""
    lowered: list[Any] = []
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: lowered.append(self))
    out = tmp_path / "rows.jsonl"
    argv = "--mixers * --layers 1 --lengths 12 --steps 4 --compile-only".split()
    run.main([*argv, "--ops", "decode_throughput", "--out", str(out)])
    assert not out.exists() and len(lowered) == 1
    for wrong in (["--ops", "model"], ["--ops", "ttft", "--mesh", "tp=2"]):
        with pytest.raises(SystemExit):
            run.main([*argv, *wrong])
        assert "--compile-only is for --ops ttft,decode_throughput" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--ops", "gka", "--shape", "llama-3.1-8b"])
    assert "--shape llama-3.1-8b is for models" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_compiled_is_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """From shapes alone and with a model: the same programs."""
    lowered: list[str] = []
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: lowered.append(self.as_text()))
    settings = dataclasses.replace(two_layers(), length=12, steps=4)
    for abstract in (True, False):
        bench = models.Bench(settings, {}, abstract=abstract)
        bench.compile("ttft")
        bench.compile("decode_throughput")
    assert lowered[:2] == lowered[2:] and len(lowered) == 4


@pytest.mark.slow  # the engine's tests say the same of its programs
@pytest.mark.parametrize(("axes", "chunk"), [({"tp": 2}, 12), ({"tp": 4}, 8)])
def test_a_mesh_gives_the_tokens_and_states_of_one_device(axes: dict[str, int], chunk: int) -> None:
    def run(axes: dict[str, int]):
        options: dict[str, Any] = dict(layers=2, chunk=chunk, steps=4, num_iter=4, axes=axes)
        bench = models.Bench(models.Settings("tiny", "GKA", 2, 12, "float32", **options), {})
        _, decode, rows = bench._decode_program()
        bytes_ = device_bytes((bench.model, rows.state))
        packed = PackedModel.of(bench.model)
        prompt = np.asarray(bench.s.tokens(None)[0])
        first, filled = bench._prefill_program(16)[1](packed, prompt)
        tokens = decode(rows)[1][:, :3]
        assert (tokens >= 0).all()
        return (first, tokens), filled.state.layers, bytes_

    tokens, state, bytes_ = run({})
    got_tokens, got_state, got_bytes = run(axes)
    for a, b in zip(got_tokens, tokens, strict=True):
        assert a.tolist() == b.tolist()
    for a, b in zip(jax.tree.leaves(got_state), jax.tree.leaves(state), strict=True):
        assert rel(a, b) < 1e-5
    assert got_bytes < bytes_ * (0.51 if axes["tp"] == 2 else 0.36)  # two copies of 2 kv heads


@pytest.mark.slow
def test_rows_of_a_mesh(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As many rows as the memory of two devices holds; rates and bytes are those of one."""
    out = tmp_path / "rows.jsonl"
    argv = "--ops decode_throughput --mixers * --layers 1 --lengths 60 --steps 4 --memory 0.02"
    run.main([*argv.split(), "--batches", "full", "--mesh", "tp=2", "--out", str(out)])
    (r,) = read(out)
    plan = plan_memory(
        models.Settings("tiny", "*", layers=1).config,
        64,
        0.02e9,
        fraction=1,
        mesh=make_mesh(tp=2, devices=jax.devices()[:2]),
    )
    rows, extra = r["shape"]["batch"], r["extra"]
    assert rows == plan.sequences and r["case"] == "tiny * 1 layers, mesh tp=2"
    assert extra["mesh"] == {"tp": 2} and extra["weight_bytes"] == plan.weights
    assert extra["tokens_per_s"] == pytest.approx(1e3 * rows / r["ms"] / 2)
    for argv, error in {
        "--mesh tp=2": "gka runs on one device",
        "--ops ttft --mesh tp=0": "as in tp=2",
        "--ops ttft --mesh tp=16": "needs 16 devices, but there are 8",
    }.items():
        with pytest.raises(SystemExit):
            run.main(argv.split())
        assert error in capsys.readouterr().err


@pytest.mark.parametrize("axes", [{}, {"tp": 4}, {"fsdp": 2, "tp": 2}])
def test_plan_memory_is_what_devices_hold(axes: dict[str, int]) -> None:
    config = models.Settings("tiny", "BMF", layers=2).config
    mesh = make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())]) if axes else None
    plan = plan_memory(config, 64, 0.02e9, fraction=1, mesh=mesh)
    model = HybridLM.init(config, mesh=mesh)

    def held(tree: Any) -> int:
        arrays = jax.tree.leaves(tree)
        return sum(a.addressable_shards[0].data.nbytes for a in arrays)

    state = model.init_state(plan.sequences, 64)
    assert plan.weights == held(model)
    per_device = plan.sequences // axes.get("fsdp", 1)
    logits = 10 * config.vocab_size
    assert per_device * (plan.sequence - logits) == held(state.layers)
    free = 0.02e9 - plan.weights - plan.workspace
    assert 0 <= free - per_device * plan.sequence < plan.sequence
    found = abstract_state(model, plan.sequences, 64)
    if mesh is not None:
        for a, b in zip(jax.tree.leaves(found.layers), jax.tree.leaves(state.layers), strict=True):
            assert a.sharding == b.sharding and a.shape == b.shape


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["", "--mesh fsdp=2", "--mesh tp=2"])
@pytest.mark.parametrize("op", ["lora_step", "mixers_step", "full_step"])
def test_training_steps(
    tmp_path: Path, op: str, mesh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(flops, "PEAK_FLOPS", {jax.devices()[0].device_kind: 1e9})
    argv = f"--ops {op} --mixers GDN --layers 2 --lengths 24 --batches 2 {mesh}"
    run.main([*argv.split(), "--out", str(out)])
    (r,) = read(out)
    assert set(r) == FIELDS and r["ms"] > 0 and r["op"] == op and r["pass"] == "fwd_bwd"
    n = 2 if mesh else 1
    assert (
        r["case"] == f"tiny GDN 2 layers, {mesh.replace('--', '') + ', ' * bool(mesh)}remat block"
    )
    assert r["extra"]["program_bytes"] > r["extra"]["state_bytes"]
    assert n * r["extra"]["state_bytes"] > 12 * r["extra"]["trained"] > 0
    if op == "full_step":  # all of it split: norms and gates, which tp keeps whole, are small
        assert n * r["extra"]["state_bytes"] < 12.1 * r["extra"]["trained"]
    assert r["extra"]["tokens_per_s"] == pytest.approx(48e3 / n / r["ms"])
    assert r["extra"]["mfu"] > 0 and r["extra"]["ran"]["gated_delta_rule"] == "chunked"


@pytest.mark.slow
def test_a_batch_that_fills_the_memory(tmp_path: Path, capsys) -> None:
    out = tmp_path / "rows.jsonl"
    argv = "--ops decode_throughput --mixers GKA --layers 2 --lengths 60 --steps 4 --num-iter 2"
    run.main([*argv.split(), "--batches", "full", "--memory", "0.02", "--out", str(out)])
    (row,) = read(out)
    config = dataclasses.replace(HybridConfig.preset("tiny", "GKA"), layer_kinds=("*", "GKA"))
    plan = plan_memory(config, 64, 0.02e9, fraction=1)
    extra, rows = row["extra"], row["shape"]["batch"]
    held = extra["weight_bytes"]  # decays are float32 in the model
    assert rows == plan.sequences > 1 and 0 <= held - plan.weights < 100
    assert extra["state_bytes"] - 8 * rows == rows * (plan.sequence - 10 * config.vocab_size)
    # Weights but for the embedding; 60 of 64 entries of a cache; float32 states twice.
    K, D, H = config.num_key_value_heads, config.head_dim, config.num_attention_heads
    moved = 2 * 60 * K * D * 2 + 2 * 2 * H * D * D * 4 + 3 * (H + 2 * K) * D * 2
    table = 0 if config.tie_word_embeddings else 2 * config.vocab_size * config.hidden_size
    assert extra["step_bytes"] == rows * moved + held - table
    with pytest.raises(SystemExit, match="Nothing was measured"):
        run.main([*argv.split(), "--batches", "full", "--memory", "0.0001"])
    assert "one sequence of 64 tokens needs" in capsys.readouterr().err


def test_next_token_loss() -> None:
    logits = jnp.zeros((1, 3, 5)).at[0, 0, 2].set(50.0)
    tokens = jnp.array([[1, 2, 4]])  # certain of the second, clueless about the third
    assert float(models.next_token_loss(logits, tokens)) == pytest.approx(math.log(5) / 2, rel=1e-5)


@pytest.mark.slow
def test_compile_times_compare_the_two_designs() -> None:
    settings = models.Settings("tiny", "GDN", layers=1, length=8)
    for inner_jit in (True, False):
        got = compiling.compile_times(settings, inner_jit=inner_jit, env={})
        assert [r.pass_ for r in got] == ["decode", "fwd", "fwd_bwd"]
        for r in got:
            assert r.case.endswith("inner jit" if inner_jit else "plain")
            assert r.ms / 1e3 == pytest.approx(sum(r.extra.values())) and r.ms > 0


def test_plain_design_has_no_inner_jit() -> None:
    config = models.Settings("tiny", "GDN", layers=2).config
    model = jax.eval_shape(lambda: models.HybridLM(config))
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)

    def text() -> str:
        return str(jax.make_jaxpr(lambda m, t: m(t)[0])(model, tokens))

    assert "run_block" in text()
    with compiling.inlined_blocks():
        assert "run_block" not in text()
    assert "run_block" in text()


ROW = rows.Row(
    "gka", "chunked", "bfloat16",
    {"batch": 1, "length": 8, "heads": 2, "kv_heads": 1, "head_dim": 4}, 30, "fwd", 2.0, 1e-3,
    device="d", jax_version="0", commit="aaaa", date="2026-01-01",
)  # fmt: skip


def test_rows_round_trip_and_select_a_commit(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    newer = dataclasses.replace(ROW, commit="bbbb", relative_error=None)
    file.write_text(f"{ROW.to_json()}\n\n{newer.to_json()}\n")
    assert rows.read(file) == [ROW, newer]
    assert rows.read(f"{file}@bb") == [newer]
    with pytest.raises(ValueError, match="no row of commit 'c'; it has aaaa, bbbb"):
        rows.read(f"{file}@c")


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "rows.jsonl"
    twice = dataclasses.replace(ROW, commit="bbbb", ms=9.0)
    faster = dataclasses.replace(ROW, commit="bbbb", ms=1.0, relative_error=2e-3)
    other = dataclasses.replace(ROW, commit="bbbb", pass_="decode")
    file.write_text("\n".join(r.to_json() for r in (ROW, twice, faster, other)))
    compare.main([f"{file}@aaaa", f"{file}@bbbb"])
    _, pair, only = capsys.readouterr().out.splitlines()
    assert pair.split()[:6] == ["2.000", "1.000", "0.500", "1.0e-03", "->", "2.0e-03"]
    assert only.startswith("only after: gka bfloat16 b1 l8 h2/1 d4 iter30 decode")


def test_environment_names_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HMF_COMMIT", "abc123")
    env = rows.environment()
    assert env["commit"] == "abc123" and env["jax_version"] == jax.__version__
    assert env["device"] == jax.devices()[0].device_kind
    assert env["date"].endswith("+00:00")


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_divide(name: str) -> None:
    for tp in TP:
        s = SHAPES[name].per_device(tp)
        assert s.heads * tp == SHAPES[name].heads and s.heads % s.kv_heads == 0
    with pytest.raises(ValueError, match="tp=3 does not fit"):
        SHAPES[name].per_device(3)


def test_serve_table(tmp_path: Path) -> None:
    """Ratios, the cards' numbers, the share of the copy rate; absent rows are dashes."""
    out = tmp_path / "rows.jsonl"
    shape = {"batch": 50, "length": 16384 - 64}

    def row(op: str, model: str, ms: float, num_iter: int | None, **extra: Any) -> str:
        length = 16384 if op == "ttft" else shape["length"]
        found = {"op": op, "case": f"8B {model} 36 layers", "num_iter": num_iter, "ms": ms}
        return json.dumps(found | {"shape": shape | {"length": length}, "extra": extra})

    lines = [
        row("ceiling_copy", "x y", 1.0, None, gb_per_s=3000),
        row("decode_throughput", "*", 9.0, None, tokens_per_s=1, gb_per_s=1),  # superseded
        row("decode_throughput", "*", 40.0, None, tokens_per_s=1000, gb_per_s=2400),
        row("decode_throughput", "GKA", 40.0, 30, tokens_per_s=1500, gb_per_s=2700),
        row("decode_throughput", "GKA", 40.0, 30, tokens_per_s=2000, gb_per_s=2400, mesh={"tp": 2}),
        row("ttft", "*", 500.0, None),
        row("ttft", "GKA", 600.0, 30),
        row("ttft", "GKA", 900.0, 30).replace("layers", "layers through generate"),  # not of these
        row("ttft", "GKA", 9000.0, 30).replace("8B", "32B"),
    ]
    out.write_text("\n".join(lines))
    found = serve_table.read(out, 64)
    text = serve_table.table(found, serve_table.copy_rate(out))
    assert "| 8B | * |  | 1 | 1,000 (50, 80%) |" in text
    assert "| 8B | GKA | 30 | 1 | 1,500 (50, 90%, 1.50x, card 1.78x) |" in text
    assert "| 32B | GKA | 30 | 1 | 9,000 |" in text
    assert "| 8B | GKA | 30 | 1 | 600 (1.20x, card 1.26x) |" in text
    assert "| 8B | GKA | 30 | 2 | 2,000 (50, 80%, card 1.78x) |" in text  # no Transformer on 2
    assert serve_table.ratios(found, "ttft") == {("8B", "GKA", 30, 1): {16384: 1.2}}
    wanted = [serve_table.wanted("8B", ["*", "GKA", "BMF"], [16384], [30, 1], tp) for tp in (1, 2)]
    one, two = map(set, wanted)
    assert len(one) == 8 and one.isdisjoint(two) and {k in one for k in found} == {True, False}
    assert {key for key in found if key[2][0] == "8B"} <= one | two


def test_checkpoint_as_from_a_new_model(tmp_path: Path) -> None:
    config = HybridConfig.preset("tiny", layer_kinds=("GKA", "M2", "GKA"))
    full_size.write_checkpoint(config, tmp_path / "model")
    got = flat_params(from_pretrained(tmp_path / "model", dtype="auto", progress=False))
    like = flat_params(HybridLM(config))
    assert got.keys() == like.keys()
    for path, x in got.items():
        assert x.dtype == like[path].dtype
        a, b = (np.asarray(y, np.float32) for y in (x, like[path]))
        if a.size > 4096:
            assert abs(a.mean()) < 0.1 * a.std() and a.std() == pytest.approx(b.std(), rel=0.05)
        elif "conv1d" not in path and "proj.kernel" not in path:
            np.testing.assert_array_equal(a.min() > 0, b.min() > 0, path)
    one, other = (got[f"layers.{i}.mixer.q_proj.kernel"] for i in (0, 2))
    assert (one != other).mean() > 0.9
    with pytest.raises(FileExistsError):
        full_size.write_checkpoint(config, tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_full_size(tmp_path: Path, tp: int) -> None:
    out, model = tmp_path / "rows.jsonl", tmp_path / "model"
    argv = f"--shape tiny --length 12 --layers 2 --tp {tp} --directory {model} --out {out}".split()
    full_size.main(argv)
    load, first, decode = read(out)
    assert [r["op"] for r in (load, first, decode)] == ["load", "ttft", "decode_throughput"]
    case = "tiny GKA 2 layers" + (", mesh tp=2" if tp == 2 else "") + " through generate"
    assert {load["case"], first["case"], decode["case"]} == {case}
    extra = load["extra"]
    assert load["ms"] / 1e3 >= extra["load_s"] + extra["first_token_s"] > first["ms"] / 1e3 > 0
    assert extra["peak_host_bytes"] >= extra["peak_host_bytes_before"] > 1e8
    stored = (model / "model.safetensors").stat()
    assert extra["checkpoint_bytes"] == stored.st_size
    full_size.main(argv)  # it is there already
    assert (model / "model.safetensors").stat().st_mtime == stored.st_mtime
    with pytest.raises(SystemExit):
        full_size.main([*argv, "--mixer", "GDN"])


def test_the_command_line_passes_arguments_on(tmp_path: Path, monkeypatch, capsys) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{ROW.to_json()}\n")
    result = CliRunner().invoke(app, ["bench", "compare", str(file), str(file)])
    assert result.exit_code == 0 and "gka bfloat16 b1 l8 h2/1 d4 iter30" in result.stdout
    result = CliRunner().invoke(app, ["bench", "serve-table", "--help"])
    assert result.exit_code == 0 and "--contexts" in result.stdout
    monkeypatch.setitem(sys.modules, "benchmarks.serve_table", None)
    result = CliRunner().invoke(app, ["bench", "serve-table", "--out", "x"])
    assert result.exit_code == 1 and "get the repository and run `python -m" in result.stderr


def test_the_table_of_training_steps(tmp_path: Path, monkeypatch, capsys) -> None:
    """Compiled first, then one process per row; the peer beside; nothing is measured again."""
    out, ran = tmp_path / "rows.jsonl", []
    dims = dict(batch=1, length=8192, heads=4, kv_heads=2, head_dim=16)

    def process(command: list[str], env: Any = None, check: bool = False) -> None:
        ran.append(command)
        peer = command[2].endswith("lora")
        if "--compile-only" in command or (not peer and "none" in command):
            return  # what does not fit into the memory leaves no row
        given = dict(zip(command[3::2], command[4::2], strict=False))
        case, extra = f"tiny {given.get('--mixers', '*')} 4 layers", {"mfu": 0.5, "peak_bytes": 2e9}
        row = dataclasses.replace(
            ROW, op="lora_step", shape=dims, case=f"{case}, remat block", extra=extra,
            impl="transformers sdpa" if peer else "auto", ms=3000.0 if peer else 2000.0,
        )  # fmt: skip
        with out.open("a") as file:
            file.write(row.to_json() + "\n")

    monkeypatch.setattr("subprocess.run", process)
    argv = ["--out", str(out), "--shape", "tiny", "--remat", "block,none", "--jobs", "1"]
    training.main([*argv, "--only", "LoRA, Qwen3"])
    assert ["--compile-only" in c for c in ran] == [True, True, False, False, False]
    assert "--ceilings" in ran[3] and "--no-ceilings" in ran[4]
    text = capsys.readouterr().out
    assert "| step | transformers sdpa, block | remat block |" in text
    assert "| LoRA, Qwen3 | 3000 ms (50%, 2 GB) | 2000 ms (50%, 2 GB) |" in text
    assert (tmp_path / "rows.md").read_text() == text
    ran.clear()
    training.main([*argv, "--only", "LoRA, Qwen3", "--no-peer"])
    assert [c[c.index("--remat") + 1] for c in ran] == ["none", "none"]
    with pytest.raises(SystemExit):
        training.main([*argv, "--only", "DPO"])
    assert "fits none of: LoRA, Qwen3; " in capsys.readouterr().err


def test_random_documents_fill_every_row() -> None:
    ids = training.segment_ids((2, 50), 7, 0)
    assert (np.diff(ids, axis=1) >= 0).all() and (ids[:, 0] == 1).all() and (ids[:, -1] == 7).all()
    assert (ids[0] != ids[1]).any() and (training.segment_ids((1, 3), 1, 0) == 1).all()


def test_a_peer_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="skipped: not installed here: torch, transformers, peft,"):
        transformers_lora.main(["--attention", "flash_attention_2"])


def test_a_peers_flops_are_counted_like_ours() -> None:
    settings = models.Settings("tiny", "*")
    model = jax.eval_shape(lambda: training._model("lora_step", settings))
    state = TrainState.abstract(model, training.OPTIMIZER, trainable="lora")
    config, parameters = settings.config, []
    for trained, arrays in ((True, state.params), (False, state.frozen)):
        for name, a in arrays.items():
            size = SimpleNamespace(ndim=a.ndim, numel=lambda a=a: a.size, requires_grad=trained)
            parameters.append((name, size))
    theirs = SimpleNamespace(
        num_hidden_layers=len(config.layer_kinds), num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
    )  # fmt: skip
    peer = SimpleNamespace(named_parameters=lambda: parameters)
    found = transformers_lora.training_flops(peer, theirs, 100)
    assert found == flops.training_flops(state, 100)


@pytest.mark.slow
def test_serve_table_goes_on_where_it_was(tmp_path: Path, capfd) -> None:
    out = tmp_path / "rows.jsonl"
    argv = ["--out", str(out), "--shape", "tiny", "--steps", "4", "--no-ceilings"]
    argv += ["--contexts", "64", "--num-iter", "2", "--memory", "0.02", "--chunk", "32"]
    serve_table.main([*argv, "--models", "*"])
    serve_table.main([*argv, "--models", "*,GKA"])
    assert len(out.read_text().splitlines()) == 4
    assert (tmp_path / "rows.png").stat().st_size > 1000
    assert (tmp_path / "rows.md").read_text().count("| tiny | GKA | 2 | 1 |") == 2
    serve_table.main([*argv, "--models", "GKA", "--tp", "2"])  # another row, of two devices
    assert len(out.read_text().splitlines()) == 6
    assert (tmp_path / "rows.md").read_text().count("| tiny | GKA | 2 | 2 |") == 2


def test_time_in_collectives_is_that_of_nccl_and_of_xlas_own_kernels() -> None:
    by_name = {
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(args)": (6.0, 3.0),
        "all_reduce_1_0_fusion_1": (2.0, 1.0),
        "loop_reduce_fusion_72": (4.0, 1.0),
    }
    found = timing.DeviceTime(12.0, 5.0, by_name).per(2, top=1)
    assert found["collectives_ms"] == 4 and found["device_ms"] == 6
    assert list(found["kernels_ms"]) == ["ncclDevKernel_AllReduce_Sum_bf16_RING_LL(args)"]
