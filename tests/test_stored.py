"""Compiled programs on disk: found without tracing, never the wrong one, never a crash."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from hmf_jax import HybridLM, generate, make_mesh, stored
from hmf_jax.engine import Engine, New, Request, storage
from hmf_jax.engine.settings import Settings
from hmf_jax.stored import Call, compiled
from tests.util import random_model, tiny_config

X = jnp.arange(4, dtype=jnp.float32)


@pytest.fixture(autouse=True)
def folder(tmp_path):
    """A compilation cache of this test's own."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


def call_of(*args: Any, traced: list[int] | None = None, made_of: Any = "f", **static: Any) -> Call:
    """A new function each time, which JAX has not seen: x n + bias."""

    def f(x: Any, bias: Any, *, n: Any = 2) -> dict[str, Any]:
        if traced is not None:
            traced.append(1)
        return {"sum": x * (n if isinstance(n, int) else 1) + bias, "bias": bias}

    program = jax.jit(f, static_argnames=("n",), donate_argnums=0)
    args = args or (jnp.array(X),)
    return Call(program, args, dict(bias=np.float32(1)), static, made_of)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def run(call: Call) -> Any:
    (program,) = compiled([call])
    return call._replace(ready=program)()


def test_a_kept_program_is_run_without_tracing(folder) -> None:
    traced: list[int] = []
    first = run(call_of(traced=traced))
    assert len(traced) == len(files(folder)) == 1
    again = call_of(traced=traced)
    found = run(again)
    assert len(traced) == 1 and again.args[0].is_deleted()  # donated, as it was told
    for one in (first, found):
        assert np.array_equal(one["sum"], 2 * X + 1) and one["bias"] == 1
    with pytest.raises(TypeError):  # what it was not compiled for
        compiled([again])[0](jnp.zeros(5), bias=np.float32(1))


def test_shapes_are_enough_and_meshes_work(folder) -> None:
    mesh = make_mesh(fsdp=8)
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.device_put(jnp.arange(8.0), split)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)
    traced: list[int] = []
    compiled([call_of(like, traced=traced)])
    found = run(call_of(x, traced=traced))["sum"]
    assert len(traced) == len(files(folder)) == 1
    assert found.sharding.is_equivalent_to(split, 1) and np.array_equal(found, np.arange(8) * 2 + 1)
    run(call_of(jax.device_put(jnp.array(X), jax.devices()[3]), traced=traced))
    found = run(call_of(jax.device_put(jnp.array(X), jax.devices()[3]), traced=traced))
    assert len(traced) == 2 and found["sum"].devices() == {jax.devices()[3]}


def test_whatever_a_program_depends_on_is_in_its_key(monkeypatch) -> None:
    def key(*args: Any, **more: Any) -> str:
        return stored._key(call_of(*args, **more))

    split = NamedSharding(make_mesh(fsdp=8), PartitionSpec("fsdp"))
    eight = jnp.zeros(8)
    calls: list[Any] = [
        (X,), (eight,), (X.astype(jnp.bfloat16),), ((X, X),), ([X, X],), ({"a": X},), (None,),
        (jax.device_put(X, jax.devices()[1]),), (jax.device_put(eight, split),),
        (jax.device_put(eight, NamedSharding(split.mesh, PartitionSpec())),),
    ]  # fmt: skip
    keys = [key(*args) for args in calls]
    keys += [
        key(X, n=n)
        for n in (1, True, 1.0, "1", (1,), [1], {"n": 1}, jnp.dtype("int8"), stored.directory)
    ]
    keys += [key(X, made_of=what) for what in ("g", {"f": None}, {"f": 0.0}, Settings)]
    with jax.default_matmul_precision("highest"):
        keys.append(key(X))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " ")
    keys.append(key(X))
    monkeypatch.setattr(stored, "_environment", lambda: "another version")
    keys.append(key(X))
    assert len(set(keys)) == len(keys)
    assert key(X) == key(jnp.array(X)) == key(jax.ShapeDtypeStruct((4,), jnp.float32))


def local(x: Any) -> Any:
    return x


@pytest.mark.parametrize("what", ["off", "no cache", "remote", "function", "closure", "from here"])
def test_what_is_not_kept_is_compiled(folder, what: str) -> None:
    with contextlib.ExitStack() as stack:
        call = call_of(n=2)
        if what == "off":
            jax.config.update("jax_enable_compilation_cache", False)
            stack.callback(jax.config.update, "jax_enable_compilation_cache", True)
        elif what == "no cache":
            jax.config.update("jax_compilation_cache_dir", None)
        elif what == "remote":
            jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
            assert stored.directory() is None
            jax.config.update("jax_compilation_cache_dir", None)
        elif what == "closure":
            call = call._replace(made_of=None)
        else:
            call = call_of(jnp.array(X), n=local if what == "from here" else lambda x: x)
        run(call)
    assert not files(folder)


def test_sources_that_were_changed_meanwhile_are_not_described(monkeypatch) -> None:
    stored._environment.cache_clear()
    assert stored._environment() == stored._environment()
    stored._environment.cache_clear()
    monkeypatch.setattr(stored, "_BEGAN", 0.0)
    with pytest.raises(stored._Unknown, match="changed"):
        stored._environment()


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "bits", "pickle", "directory"])
def test_a_damaged_file_is_compiled_again(folder, damage: str) -> None:
    run(call_of())
    (file,) = files(folder)
    data = file.read_bytes()
    if damage == "pickle":  # whole, but of something else
        from hashlib import sha256

        body = b"\x80\x04N."
        file.write_bytes(stored._HEAD + sha256(body).digest() + body)
    elif damage == "directory":
        file.unlink()
        file.mkdir()
    else:
        bits = data[:-9] + b"123456789"
        file.write_bytes({"cut": data[:-9], "text": b"hello", "empty": b"", "bits": bits}[damage])
    with pytest.warns(UserWarning, match="program"):
        assert np.array_equal(run(call_of())["sum"], 2 * X + 1)
    if damage != "directory":
        traced: list[int] = []
        run(call_of(traced=traced))
        assert not traced


def test_only_files_of_the_user_are_read(folder, monkeypatch) -> None:
    run(call_of())
    (file,) = files(folder)
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o622)
    with pytest.warns(UserWarning, match="others may write"):
        run(call_of())
    assert file.stat().st_mode & 0o777 == 0o600  # it is the new one
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.warns(UserWarning, match="belongs to somebody else"):
        run(call_of())


def test_a_full_disk_is_a_warning(folder, monkeypatch) -> None:
    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="not kept: no space left"):
        assert np.array_equal(run(call_of())["sum"], 2 * X + 1)
    assert not files(folder)


def test_old_programs_are_removed(folder) -> None:
    folder.mkdir()
    now = time.time()
    for name, days in (("a", 1), ("b", 2), ("c", 31)):
        path = folder / f"{name}.program"
        path.write_bytes(bytes(1000))
        os.utime(path, (now - 86400 * days,) * 2)
    stored._clean(folder)
    assert [path.stem for path in files(folder)] == ["a", "b"]
    before = jax.config.jax_compilation_cache_max_size
    try:
        jax.config.update("jax_compilation_cache_max_size", 1500)
        stored._clean(folder)
    finally:
        jax.config.update("jax_compilation_cache_max_size", before)
    assert [path.stem for path in files(folder)] == ["a"]


@pytest.fixture(scope="module")
def models() -> tuple[HybridLM, HybridLM]:
    """A model, and one like it without numbers."""
    config = tiny_config(("GKA", "*"))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        nnx.eval_shape(lambda: HybridLM(config, dtype=jnp.float32)),
    )
    return jax.device_put(random_model(config, jnp.float32), place), abstract


SIZES: dict[str, Any] = dict(capacity=32, prefill_chunk=16, page_size=16, fixed=True)


def test_an_abstract_engine_has_the_programs_of_a_real_one(models) -> None:
    keys = []
    for model in models:
        device = Engine(model, 1, **SIZES)._device
        calls = list(device._calls())
        keys.append([(device._all._key(call), stored._key(call)) for call in calls])
    assert keys[0] == keys[1] and len({disk for _, disk in keys[0]}) == len(keys[0])
    assert len({memory for memory, _ in keys[0]}) == len(keys[0])


@pytest.mark.slow
def test_an_engine_finds_its_programs_again(models, folder, monkeypatch) -> None:
    """As in another process, and after `recover`: nothing is traced or compiled twice."""
    model, abstract = models
    Engine(abstract, 1, **SIZES).warm()
    kept = len(files(folder))
    monkeypatch.setattr(storage, "_programs", {})
    monkeypatch.setattr(Call, "compile", None)
    engine = Engine(model, 1, **SIZES)
    engine.warm()
    assert kept == len(files(folder)) == len(storage._programs)
    compiled, found = engine.compiled(), []
    for _ in range(2):
        engine.add(Request([1, 2, 3] * 7, max_new_tokens=4, prompt_logprobs=0))
        found.append([])
        while engine.busy:
            for event in engine.step():
                found[-1] += event.tokens if isinstance(event, New) else []
        engine.recover()
    assert engine.compiled() == compiled
    (plain,) = generate(model, [[1, 2, 3] * 7], max_new_tokens=4)
    assert found == [plain.tokens] * 2
