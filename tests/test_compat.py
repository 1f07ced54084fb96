"""Private and version-dependent JAX is touched in one file only."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels import compat

ROOT = Path(__file__).parents[1]
ELSEWHERE = re.compile(
    r"jax\._src|jaxlib|jax\.core\b|jax\.interpreters|jax\.extend|jax\.experimental\.mosaic"
    r"|jax\.__version_info__|hasattr\(jax|getattr\(jax|plgpu\.(ACC|TilingTransform|SwizzleTransform)"
    r"|compute_capability\""
)


def test_only_compat_touches_private_jax():
    files = [
        file
        for folder in ("hmf_jax", "pallas_kernels", "convert", "benchmarks")
        for file in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 50
    found = {
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if file.name != "compat.py" and ELSEWHERE.search(line)
    }
    assert not found, "move these to pallas_kernels/compat.py:\n" + "\n".join(sorted(found))


def test_is_traced():
    assert not compat.is_traced(jnp.zeros(2)) and not compat.is_traced(3)
    seen = []
    jax.jit(lambda x: seen.append(compat.is_traced(x)))(1.0)
    assert seen == [True]


def test_this_jax_has_what_compat_looks_for():
    """Where it is gone operators still run, but slower ones: better to know."""
    assert compat.find_cudnn() is not None
    assert compat.find_cudnn_backward() is not None
