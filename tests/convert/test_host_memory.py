"""Loading streams: host memory beyond the arrays stays at one tensor per reader thread + 1 GiB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from hmf_jax import table
from hmf_jax.config import HybridConfig
from hmf_jax.convert.hf_to_jax import THREADS
from hmf_jax.convert.rows import by_tensor, tensor_shape
from hmf_jax.convert.safetensors_io import Pending, write

GIB = 2**30
# 8B shapes, few layers, small vocabulary: 2 GiB of which the largest tensor is 96 MiB.
CONFIG = HybridConfig.preset("8b", layer_kinds=("*", "GKA", "GDN", "M2", "BMF"), vocab_size=8192)

MEASURE = """
import json, resource, sys
import jax
from hmf_jax import make_mesh
from hmf_jax.loading import from_pretrained
from hmf_jax.parameters import flat_params
mesh = make_mesh(tp=int(sys.argv[2])) if int(sys.argv[2]) > 1 else None
model = from_pretrained(sys.argv[1], mesh=mesh, progress=False)
arrays = sum(s.data.nbytes for x in flat_params(model).values() for s in x.addressable_shards)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "arrays": arrays}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("large")
    block = np.random.default_rng(0).standard_normal(1 << 20).astype(ml_dtypes.bfloat16)
    pending = []
    for name, blocks in by_tensor(table.entries(CONFIG)).items():
        shape = tensor_shape(blocks)
        pending.append(Pending(name, "BF16", shape, lambda shape=shape: np.resize(block, shape)))
    write(directory, pending, max_shard_size="500MB")
    (directory / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    return directory


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("tp", [1, 8])
def test_peak_memory_of_loading_two_gibibytes(checkpoint, tp):
    files = list(checkpoint.glob("model-*.safetensors"))
    stored = sum(f.stat().st_size for f in files)
    assert stored > 2 * GIB and len(files) > 3
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(checkpoint), str(tp)],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={tp}",
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    largest = max(
        2 * int(np.prod(tensor_shape(blocks)))
        for blocks in by_tensor(table.entries(CONFIG)).values()
    )
    beyond, allowed = measured["peak"] - measured["arrays"], THREADS * largest + GIB
    sizes = {"stored": stored, **measured, "beyond the arrays": beyond, "allowed": allowed}
    print(f"\n{len(files)} files, tp={tp}:", *(f"{k} {v / GIB:.2f} GiB," for k, v in sizes.items()))
    assert beyond <= allowed < stored
