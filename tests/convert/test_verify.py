"""verify on a model made of lookups, whose every output is known."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from hmf_jax.moe import Routing
from hmf_jax.verify import Report, rel, run_case, verify_dir

B, L, V, D, W = 2, 9, 5, 4, 6
RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((V, V)).astype(np.float32)
ROUTER = np.asarray([[0, 1, 3], [5, 4, 0], [1, 2, 1.5], [0, 9, 8], [2, 2.5, 0]], np.float32)
KEYS = RNG.standard_normal((B, L, 2, D)).astype(np.float32)  # by token
CONV = RNG.standard_normal((B, 3, 7)).astype(np.float32)  # the last three inputs
STATE = RNG.standard_normal((B, 3, D, D)).astype(np.float32)
TOKENS = RNG.integers(0, V, (B, L + 8)).astype(np.int32)


def ring(tokens: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros((B, size, *tokens.shape[2:]), np.float32)
    for i in range(L):
        out[:, i % size] = tokens[:, i]
    return out


class Lookup:
    """Logits depend on the token alone; `decode_error` spoils single steps."""

    dtype = jnp.float32

    def __init__(self, error: float = 0.0, decode_error: float = 0.0):
        self.error, self.decode_error = error, decode_error

    def init_state(self, batch: int, capacity: int):
        assert (batch, capacity) == (B, L + 8)
        cache = Namespace(k=ring(KEYS, capacity), v=ring(-KEYS, capacity))
        window = Namespace(k=ring(KEYS, W), v=ring(-KEYS, W))
        inner = Namespace(
            conv_x=CONV[..., :3], conv_B=CONV[..., 3:5], conv_C=CONV[..., 5:], s=STATE
        )
        inner.log_decay = STATE[..., 0, 0]
        gka = Namespace(conv_q=CONV, h_kk=STATE, h_kv=-STATE)
        bmojo = Namespace(inner=inner, k=np.concatenate([window.k, -window.k], 1))
        return Namespace(layers=(cache, window, gka, bmojo))

    def __call__(self, tokens, *, state=None):
        logits = TABLE[np.asarray(tokens)] * (1 + self.error)
        if state is not None:
            logits = logits * (1 + self.decode_error)
        return logits, state

    def trace(self, tokens, *, state):
        logits = TABLE[np.asarray(tokens)] * (1 + self.error)
        return logits, state, [(logits * 2, logits * 3)] * 4

    def embed(self, tokens, *, state):
        return np.asarray(tokens), None

    def blocks(self, x, ctx, state):
        """The last layer sends each token to two of three experts."""
        logits = ROUTER[x] * (1 + self.error)
        experts = np.argsort(-logits, axis=-1)[..., :2]
        chosen = (experts[..., None] == np.arange(3)).sum((0, 1))
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        routing = Routing(*map(jnp.asarray, (logits, experts, chosen, p.sum((0, 1)))))
        return [Namespace(routing=None)] * 3 + [Namespace(routing=routing)]


def case(**changes) -> dict[str, Any]:
    return {
        "kind": "model",
        "L": L,
        "rows": [1],
        "layer_row": 1,
        "pattern": "*-SWA-GKA-BMF",
    } | changes


def recorded() -> dict[str, np.ndarray]:
    positions = np.asarray([0, 3, 8], np.int32)
    conv = np.concatenate([np.full((7, 1), 99, np.float32), CONV[1].T], axis=1)
    newest = KEYS[1, -4:].swapaxes(0, 1)
    out = {
        "input_ids": TOKENS,
        "positions": positions,
        "logits": TABLE[TOKENS[[1]][:, positions]],
        "logits_tail": TABLE[TOKENS[:, L - 1 :]],
        "layers.0.mixer_out": TABLE[TOKENS[1, positions]] * 2,
        "layers.3.layer_out": TABLE[TOKENS[1, positions]] * 3,
        "state.0.key_last4": newest,
        "state.0.value_last4": -newest,
        "state.1.key_last4": newest,
        "state.2.conv_q": conv,
        "state.2.h_kk": STATE[1],
        "state.2.h_kv": -STATE[1, :1],
        "state.3.conv": conv,
        "state.3.ssm": STATE[1],
        "state.3.log_aprods": STATE[1, :, 0, 0],
    }
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def errors(checks) -> set[str]:
    return {c.name for c in checks if not c.ok}


def test_everything_recorded_is_compared():
    checks = run_case(Lookup(), case(), recorded())
    plain = {n for n in recorded() if n not in ("input_ids", "positions")}
    assert {c.name for c in checks} == plain | {"logits (prefill)", "decode"}
    assert all(c.ok and c.error == 0 and c.tolerance == 1e-4 for c in checks)


def test_errors_are_found_and_measured():
    checks = run_case(Lookup(error=1e-3), case(), recorded())
    assert {c.name for c in checks if c.ok} == {n for n in recorded() if n.startswith("state.")}
    assert all(abs(c.error - 1e-3) < 1e-6 for c in checks if not c.ok)
    assert run_case(Lookup(error=1e-3), case(), recorded(), rtol=2e-3)[0].ok
    assert errors(run_case(Lookup(decode_error=1e-3), case(), recorded())) == {"decode"}
    assert all(not c.ok for c in run_case(Lookup(error=np.nan), case(), recorded())[:3])
    for name in ("state.2.conv_q", "state.2.h_kk", "state.1.key_last4", "state.3.log_aprods"):
        wrong = recorded()
        wrong[name] = wrong[name] * 1.01
        assert errors(run_case(Lookup(), case(), wrong)) == {name}


def test_decode_is_compared_with_the_originals_only_where_that_is_right():
    wrong = recorded() | {"logits_decode": 2 * TABLE[TOKENS[:, L:]]}
    assert errors(run_case(Lookup(), case(), wrong)) == set()
    assert errors(run_case(Lookup(), case(pattern="*-SWA-GKA-M2"), wrong)) == {"decode"}


def routing() -> dict[str, np.ndarray]:
    """What the routers decide, as recorded."""
    tokens = TOKENS[1, [0, 3, 8]]
    best = np.argsort(-ROUTER, axis=1)[:, :2]
    counts, total = np.zeros(3), np.zeros(3)
    for token in TOKENS[:, :L].ravel():
        counts[best[token]] += 1
        total += np.exp(ROUTER[token]) / np.exp(ROUTER[token]).sum()
    return {
        "layers.3.router_logits": ROUTER[tokens],
        "layers.3.router_topk": best[tokens].astype(np.int32),
        "aux": np.asarray([3 * (counts / (B * L)) @ (total / (B * L))], np.float32),
    }


def test_routing():
    found = {c.name: c for c in run_case(Lookup(), case(), recorded() | routing())}
    assert found.keys() > routing().keys() and errors(found.values()) == set()
    other = routing()
    other["layers.3.router_topk"] = other["layers.3.router_topk"][:, ::-1]  # equal, reordered
    assert errors(run_case(Lookup(), case(), recorded() | other)) == set()
    ids = other["layers.3.router_topk"] = np.array(other["layers.3.router_topk"])
    ids[0, 0] = 3 - ids[0].sum()  # the expert that it does not choose
    (wrong,) = (c for c in run_case(Lookup(), case(), recorded() | other) if not c.ok)
    assert wrong.name == "layers.3.router_topk" and abs(wrong.error - 1 / 6) < 1e-6
    model = Lookup()
    model.dtype = jnp.bfloat16  # rounding chooses others
    assert errors(run_case(model, case(), recorded() | other)) == set()
    with pytest.raises(ValueError, match="layers.0.router_logits is recorded and the model has no"):
        run_case(Lookup(), case(), recorded() | {"layers.0.router_logits": ROUTER})


def test_the_scale_of_the_original_is_reported_only():
    theirs = {"original_scale.logits": 2 * recorded()["logits"]}
    found = run_case(Lookup(), case(), recorded() | theirs)
    (check,) = (c for c in found if c.name in theirs)
    assert check.ok and check.tolerance is None and abs(check.error - 0.5) < 1e-6
    assert "original_scale.logits  (the original scales B'MOJO-F by" in str(check)


def test_bfloat16_is_judged_by_the_originals_own_error():
    model = Lookup(error=1e-2)
    model.dtype = jnp.bfloat16
    judged = [c for c in run_case(model, case(checks={"bf16": 9e-3}), recorded()) if c.tolerance]
    assert {c.name for c in judged} == {"logits", "logits (prefill)"} and all(c.ok for c in judged)
    checks = run_case(model, case(checks={"bf16": 7e-3}), recorded())
    assert errors(checks) == {"logits", "logits (prefill)"}
    unknown = Report(Path("here"), "bfloat16", run_case(model, case(), recorded()))
    assert unknown.ok and str(unknown).endswith("own error in this dtype is not recorded")


def test_unknown_tensors_and_shapes():
    with pytest.raises(ValueError, match="do not know how to compare surprise"):
        run_case(Lookup(), case(), recorded() | {"surprise": TABLE})
    with pytest.raises(ValueError, match="do not know how to compare the state 'soul'"):
        run_case(Lookup(), case(), recorded() | {"state.0.soul": TABLE})
    with pytest.raises(ValueError, match="shapes differ"):
        rel(np.zeros(2), np.zeros(3))


def test_directories(tmp_path):
    def load(directory, dtype):
        assert directory == tmp_path and dtype == jnp.float32
        return Lookup(error=1e-3)

    with pytest.raises(FileNotFoundError, match="has no case.json, so there is nothing to compare"):
        verify_dir(tmp_path, load)
    (tmp_path / "case.json").write_text(json.dumps(case()))
    with pytest.raises(FileNotFoundError, match="has no expected.safetensors"):
        verify_dir(tmp_path, load)
    save_file(recorded(), tmp_path / "expected.safetensors")
    report = verify_dir(tmp_path, load)
    assert not report.ok and "FAIL  1.00e-03  logits  (at most 1.00e-04)" in str(report)
    assert str(report).endswith("6 of 15 tensors FAIL")
    report = verify_dir(tmp_path, load, rtol=1e-2)
    assert report.ok and str(report).endswith("all tensors pass")
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'bfloat16'"):
        verify_dir(tmp_path, load, dtype="float16")
    (tmp_path / "case.json").write_text(json.dumps(case(kind="op")))
    with pytest.raises(ValueError, match="kind 'op'; verify runs kind 'model'"):
        verify_dir(tmp_path, load)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"L": 0}, "case.json: L must be an integer >= 1, got 0"),
        ({"L": "9"}, "case.json: L must be an integer"),
        ({"layer_row": B}, "case.json: layer_row must be an integer <= 1"),
        ({"rows": [0, -1]}, "case.json: rows must be an integer >= 0"),
        ({"rows": None}, "case.json: rows must be a list of rows"),
        ({"kind": "\x1b[2J"}, r"a case of kind '\\\\x1b\[2J'; verify runs kind 'model'"),
        ({"tensors": ["input_ids"]}, "expected.safetensors lacks positions, logits, logits_tail"),
        ({"tensors": []}, "expected.safetensors lacks input_ids"),
    ],
)
def test_recordings_that_are_none(tmp_path, change, message):
    case = {"kind": "model", "L": L, "rows": [0, 1], "layer_row": 1} | change
    (tmp_path / "case.json").write_text(json.dumps(case))
    values = {"input_ids": TOKENS, "positions": np.arange(3), "logits": TABLE, "logits_tail": TABLE}
    names = case.get("tensors", list(values))
    save_file({n: values[n] for n in names}, tmp_path / "expected.safetensors")
    with pytest.raises(ValueError, match=message):
        verify_dir(tmp_path, lambda *_: Lookup())


def test_a_damaged_recording(tmp_path):
    (tmp_path / "case.json").write_text(json.dumps({"kind": "model"}))
    save_file({"input_ids": TOKENS}, tmp_path / "expected.safetensors")
    raw = (tmp_path / "expected.safetensors").read_bytes()
    (tmp_path / "expected.safetensors").write_bytes(raw[:-1])
    with pytest.raises(ValueError, match="expected.safetensors is truncated"):
        verify_dir(tmp_path, lambda *_: Lookup())
