"""`hmf-jax serve`: its options, what it refuses before it loads anything, and a whole life."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from typer.testing import CliRunner

from hmf_jax import embedded
from hmf_jax.cli import app
from hmf_jax.cli.errors import settings
from hmf_jax.serving import EngineConfig, ServeConfig, server


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Nothing of the user's is used or written."""
    monkeypatch.setitem(settings, "debug", False)
    monkeypatch.setattr(server, "enable_compilation_cache", lambda: None)
    monkeypatch.delenv("HMF_API_KEY", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")


@pytest.fixture
def given(monkeypatch):
    """What a command line means: (model, ServeConfig, EngineConfig, the rest)."""

    def parse(*args: str):
        seen = []

        def serve(model, config, engine, **rest):
            seen.append((model, config, engine, rest))

        monkeypatch.setattr(server, "serve", serve)
        result = CliRunner().invoke(app, ["serve", *args])
        assert result.exit_code == 0, result.output
        (found,) = seen
        return found

    return parse


def error(*args: str, code: int = 1) -> str:
    """The one line of a command that fails."""
    result = CliRunner().invoke(app, ["serve", *args])
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == code and len(lines) == 1, result.output
    assert lines[0].startswith("hmf-jax: ")
    return lines[0]


def test_no_flags(given):
    model, config, engine, rest = given("org/name")
    assert (model, rest["revision"]) == ("org/name", None)
    assert config == ServeConfig() and engine == EngineConfig()
    assert (config.host, config.port, engine.prefix_cache) == ("127.0.0.1", 8000, "exact")


def test_the_commands_of_the_model_cards(given):
    """vLLM's options, all of which mean what is so anyway."""
    _, config, engine, _ = given(
        *"M --enable-prefix-caching --mamba-cache-mode align --mamba-cache-dtype float32 "
        "--mamba-ssm-cache-dtype float32 --enable-auto-tool-choice --tool-call-parser hermes "
        "--reasoning-parser qwen3".split()
    )
    assert config == ServeConfig() and engine == EngineConfig()


def test_names_of_vllm_and_ours_are_the_same(given, monkeypatch):
    values = ["--max-model-len", "9000", "--gpu-memory-utilization", "0.8"]
    vllm = "--max-num-seqs 3 --max-num-batched-tokens 512 --tensor-parallel-size 2"
    ours = "--slots 3 --prefill-chunk 512 --tp 2"
    both = given("M", *values, *vllm.split(), "--data-parallel-size", "4")
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.8"
    assert both == given("M", *values, *ours.split(), "--dp", "4")
    engine = both[2]
    assert (engine.slots, engine.prefill_chunk, engine.tp, engine.dp) == (3, 512, 2, 4)
    assert (engine.max_model_len, engine.memory_fraction) == (9000, 0.8)


def test_what_the_http_side_gets(given, monkeypatch):
    _, config, engine, rest = given(
        *"M --host 0.0.0.0 --port 0 --api-key a --api-key b --cors-origin http://x.org "
        "--served-model-name one --served-model-name two --alias fast=num_iter:10 "
        "--max-body 1MiB --max-queue 0 --max-queued-tokens 77 --queue-timeout 1.5 "
        "--request-timeout 9 --shutdown-timeout 0 --trust-request-chat-template --seed 5 "
        "--revision main --snapshot-every 4096 --prefix-host-gib 0.5 --prefix-cache fast "
        "--snapshot-spacing 100 --max-stall-ms 80 --page-size 512 --num-iter 3 "
        "--dtype float".split(),
        "--hf-overrides",
        '{"max_position_embeddings": 64}',
    )
    assert (config.host, config.port, config.api_keys) == ("0.0.0.0", 0, ("a", "b"))
    assert config.model_names == ("one", "two") and config.aliases == {"fast": {"num_iter": 10}}
    assert (config.max_body, config.max_queue, config.max_queued_tokens) == (1 << 20, 0, 77)
    assert (config.queue_timeout, config.request_timeout) == (1.5, 9.0)
    assert (config.shutdown_timeout, config.seed) == (0.0, 5)
    assert config.trust_request_chat_template and config.cors_origins == ("http://x.org",)
    assert (engine.snapshot_every, engine.host_bytes, engine.prefix_cache) == (4096, 2**29, "fast")
    assert engine.snapshot_spacing == 100
    assert (engine.max_stall, engine.page_size, engine.num_iter) == (0.08, 512, 3)
    assert engine.dtype == "float32" and engine.overrides == {"max_position_embeddings": 64}
    assert rest["revision"] == "main"
    monkeypatch.setenv("HMF_API_KEY", "secret")
    assert given("M")[1].api_keys == ("secret",)


@pytest.mark.parametrize(
    ("options", "cache"),
    [
        ("--no-enable-prefix-caching", "off"),
        ("--mamba-cache-mode none", "off"),
        ("--prefix-cache fast --enable-prefix-caching --mamba-cache-mode align", "fast"),
    ],
)
def test_prefix_cache(given, options, cache):
    assert given("M", *options.split())[2].prefix_cache == cache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--mamba-cache-dtype float16", "--mamba-cache-dtype float16 is not supported"),
        ("--mamba-ssm-cache-dtype bfloat16", "auto or float32"),
        ("--mamba-cache-mode all", "align or none"),
        ("--reasoning-parser deepseek_r1", "qwen3"),
        ("--tool-call-parser mistral", "hermes"),
        ("--prefix-cache off --enable-prefix-caching", "contradict"),
        ("--enable-prefix-caching --mamba-cache-mode none", "contradict"),
        ("--alias fast=speed:10", "speed is not a setting"),
        ("--alias fast", "NAME=num_iter:N"),
        ("--alias a=num_iter:1 --alias a=num_iter:2", "each NAME once"),
        ("--max-body many", "--max-body many is not a size"),
        ("--gpu-memory-utilization 1.5", "--gpu-memory-utilization"),
        ("--hf-overrides {", "no JSON"),
        ("--hf-overrides []", "JSON object"),
        ("--ssl-keyfile key.pem", "go together"),
        ("--prefill-chunk 512 --max-stall-ms 9", "prefill_chunk or max_stall"),
    ],
)
def test_wrong_options(options, message):
    assert message in error(str(embedded.directory("gka")), *options.split())


def test_unknown_options_are_wrong_usage():
    assert "dtype" in error("M", "--dtype", "half", code=2)
    assert "no such option" in error("M", "--swap-space", "4", code=2).lower()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--max-model-len 10000000", "max_position_embeddings"),
        ("--dp 5 --tp 2", "10 devices"),
        ("--snapshot-every 100", "multiple of the chunk"),
        ("--slots 4096 --gpu-memory-utilization 0.0001", "fewer slots"),
        ("--num-iter 100000", "num_iter"),
        ("--alias much=num_iter:100000", "alias much"),
        ("--host 256.0.0.1", "256.0.0.1"),
        ('--hf-overrides {"no_such_key":1}', "no_such_key"),
    ],
)
def test_what_does_not_fit_is_found_before_the_weights_are_loaded(options, message, monkeypatch):
    monkeypatch.setattr(server.Life, "run", lambda *_: pytest.fail("too late"))
    assert message in error(str(embedded.directory("gka")), "--port", "0", *options.split())


def test_a_port_in_use_and_certificates(monkeypatch, tmp_path):
    monkeypatch.setattr(server.Life, "run", lambda *_: pytest.fail("too late"))
    model = str(embedded.directory("gka"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"cannot listen at 127.0.0.1:{port}" in error(model, "--port", port)
    (file := tmp_path / "key.pem").write_text("no key")
    files = ["--ssl-keyfile", str(file), "--ssl-certfile", str(file)]
    assert "certificate" in error(model, *files)
    assert "not a directory" in error("nowhere/at/all")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "hmf_jax.serving.server")
    assert 'serving needs uvicorn: pip install "hmf-jax[serve]"' in error("M")


def _json(url: str, **body) -> dict:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read()
    return json.loads(text) if text else {}


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--dp 2", "--tp 2 --prefix-cache fast"])
def test_a_whole_life(options, tmp_path):
    """From the command line to SIGTERM, in a process of its own."""
    model = str(embedded.directory("gka"))
    command = [sys.executable, "-m", "hmf_jax", "serve", model, "--port", "0", *options.split()]
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        said: list[str] = []
        for line in process.stderr:
            said.append(line)
            if "ready: " in line:
                break
        text = "".join(said)
        url = re.search(r"listening at (\S+)", text)
        assert url is not None, text
        assert re.search(r"loaded .* in [\d.]+ s", text) and "pages of" in text
        assert "compiled all programs, in " in text
        _json(url[1] + "/ready")
        (card,) = _json(url[1] + "/v1/models")["data"]
        told = dict(model=card["id"], messages=[{"role": "user", "content": "key?"}], max_tokens=4)
        answer = _json(url[1] + "/v1/chat/completions", **told, seed=1)
        assert answer["usage"]["completion_tokens"] >= 1
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(30) == 0, rest
        assert "no new requests" in rest and "Traceback" not in rest
