"""Eight fake CPU devices for the sharding tests, quick compilation, markers."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

# Programs here are small and run a few times: what costs is compiling them, so optimise little.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would spin, waiting for a core
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)

import jax
import pytest

jax.config.update("jax_traceback_in_locations_limit", 0)  # nobody reads where an operation is from
# Programs that a shell starts in the background ignore it, and so would those that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
gc.set_threshold(100_000)  # traced programs are many objects that stay: going over them costs

# The files that take longest, which workers begin with: none is left alone at the end.
LONGEST = (
    "test_benchmarks.py",
    "test_generation.py",
    "test_laws.py",
    "test_compose.py",
    "test_step.py",
    "test_attention.py",
    "test_gka.py",
    "test_distill.py",
    "test_model.py",
    "test_lora.py",
    "test_attention_mosaic.py",
    "test_operators.py",
    "test_gated_delta_rule.py",
    "test_oracle.py",
    "test_stage0.py",
    "test_gka_mosaic.py",
    "test_model_goldens.py",
    "test_chat.py",
    "test_two_window_attention.py",
    "test_slots.py",
    "test_causal_conv1d.py",
    "test_families.py",
    "test_gka_decode.py",
    "test_ssd.py",
    "test_train.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if jax.default_backend() != "gpu":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def forget_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """One process cannot map the compiled programs of all slow tests at once."""
    yield
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()
