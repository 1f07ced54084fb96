"""Parameters of the recorded cases, bit for bit from their names and shapes. NumPy only.

A parameter is a function of its name: noise is drawn from RandomState(crc32("<seed>/<name>")),
whose stream NumPy's compatibility policy freezes, and only sums and products follow. Every value is
exact in bfloat16.
"""

import hashlib
import math
import zlib

import numpy as np


def bf16_round(a):
    u = np.ascontiguousarray(a, np.float32).view(np.uint32)
    odd = (u >> np.uint32(16)) & np.uint32(1)
    return ((u + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)).view(np.float32)


def bf16_bits(a):
    return (np.ascontiguousarray(a, np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def noise(name, shape, seed):
    """Sums of four uniform numbers: nearly normal, mean 0, variance 1, at most 2 sqrt(3)."""
    state = np.random.RandomState(zlib.crc32(f"{seed}/{name}".encode()))
    u = state.random_sample((4, int(np.prod(shape))))
    return ((u[0] + u[1] + u[2] + u[3] - 2.0) * math.sqrt(3.0)).reshape(shape)


def param(name, shape, seed):
    shape = tuple(int(s) for s in shape)
    x = noise(name, shape, seed)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "A_log":
        w = 0.3 + 0.8 * x
    elif leaf == "dt_bias":
        w = -3.5 + 0.8 * x
    elif leaf == "D":
        w = 1.0 + 0.3 * x
    elif leaf in ("k_rep", "v_rep"):
        w = np.kron(np.eye(shape[1]), np.ones((shape[0] // shape[1], 1))) + 0.2 * x
    elif leaf == "bias":
        w = 0.4 * x
    elif len(shape) == 1:  # every norm weight
        w = np.maximum(1.0 + 0.25 * x, 0.2)
    elif "conv1d" in name:
        w = 0.5 * x
    elif "embed_tokens" in name:
        w = x
    else:
        low_rank = "linearB" in name or "a_proj" in name or "gk_proj" in name
        scale = 2.0 if "lm_head" in name else 0.7 if low_rank else 1.0
        w = scale * x / math.sqrt(shape[1])
    return bf16_round(w.astype(np.float32))


def build(shapes, seed):
    """{name: float32 array} for {name: shape}."""
    return {n: param(n, s, seed) for n, s in shapes.items()}


def digest(params):
    """SHA-256 over names and bfloat16 bits: `sha` of a case."""
    h = hashlib.sha256()
    for n in sorted(params):
        h.update(n.encode())
        h.update(bf16_bits(params[n]).tobytes())
    return h.hexdigest()
