"""docs/deploy and docs/serving.md name what exists: options, routes, metrics."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")  # the extra `train`

DOCS = Path(__file__).resolve().parents[2] / "docs"
DEPLOY, PAGE = DOCS / "deploy", (DOCS / "serving.md").read_text()


def options() -> set[str]:
    """Every option of `hmf-jax serve`, with the names that vLLM gives them."""
    import typer

    from hmf_jax.cli import app

    command: Any = typer.main.get_command(app)
    parameters = command.commands["serve"].params
    return {name for p in parameters for name in (*p.opts, *p.secondary_opts)} - {"model"}


def metrics() -> set[str]:
    """The metrics of a server, as they are queried."""
    from hmf_jax.serving.metrics import Metrics

    ends = {"counter": "_total", "info": "_info"}
    return {f.name + ends.get(f.type, "") for f in Metrics().registry.collect()}


def test_page_names_every_option_and_no_other():
    known = {name for name in options() if name.startswith("--")}
    named = set(re.findall(r"--[a-z][\w-]*", PAGE))
    others = {"--help", "--tasks", "--model", "--model_args"}  # the last three are lm_eval's
    assert named - others <= known
    assert known <= named


def test_commands_of_the_examples_are_known():
    (container,) = kubernetes("Deployment")["spec"]["template"]["spec"]["containers"]
    docker = (DEPLOY / "Dockerfile").read_text()
    unit = (DEPLOY / "hmf-jax.service").read_text()
    lines = [
        container["args"],
        json.loads(re.findall(r"ENTRYPOINT (.*)", docker)[0]),
        shlex.split(re.findall(r"ExecStart=(.*)", unit)[0]),
        read("compose.yaml")["services"]["hmf-jax"]["command"],
    ]
    for words in lines:
        assert {word for word in words if word.startswith("--")} <= options(), words
    folder = re.findall(r"^COPY (\w+) \w+$", docker, re.MULTILINE)
    assert folder and all((DOCS.parent / name).is_dir() for name in folder)


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def kubernetes(kind: str) -> Any:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return next(document for document in documents if document["kind"] == kind)


def test_kubernetes_example_fits_together():
    deployment, service = kubernetes("Deployment"), kubernetes("Service")
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    (port,) = container["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
    probes = {
        name: container[f"{name}Probe"]["httpGet"] for name in ("liveness", "readiness", "startup")
    }
    assert all(probe["port"] == port["name"] for probe in probes.values())
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "liveness": "/health", "readiness": "/ready", "startup": "/ready",
    }  # fmt: skip
    # What is stopped gets the time that the server takes to shut down.
    args = container["args"]
    shutdown = int(args[args.index("--shutdown-timeout") + 1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > shutdown + 5
    unit = (DEPLOY / "hmf-jax.service").read_text()
    assert int(re.findall(r"TimeoutStopSec=(\d+)", unit)[0]) > 30
    assert int(read("compose.yaml")["services"]["hmf-jax"]["stop_grace_period"].rstrip("s")) > 30


def test_dashboard_and_page_name_metrics_that_exist():
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    shown = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            shown |= set(re.findall(r"(?:vllm|hmf):\w+", target["expr"]))
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) > 10
    names = metrics()
    histograms = {name.removesuffix("_bucket") for name in shown if name.endswith("_bucket")}
    plain = {name for name in shown if not name.endswith("_bucket")}
    written = set(re.findall(r"((?:vllm|hmf):\w+)", PAGE))
    assert histograms <= names and plain <= names and written <= names
    assert any(
        config["job_name"] == "hmf-jax" for config in read("prometheus.yml")["scrape_configs"]
    )


def test_routers_pass_streams_on():
    text = (DEPLOY / "nginx.conf").read_text()
    assert "proxy_buffering off;" in text and "proxy_http_version 1.1;" in text
    models = read("litellm.yaml")["model_list"]
    assert len({model["litellm_params"]["api_base"] for model in models}) == len(models) == 2
