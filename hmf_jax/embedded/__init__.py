"""Tiny hybrids that were really trained, and the script that made them.

`hmf_jax.embedded.corpus` makes texts with facts and questions, `hmf_jax.embedded.train` trains a
Transformer on them, primes it to hybrids of every kind and measures what they remember. Some of
its models come with the package.
"""

from __future__ import annotations

from pathlib import Path

HYBRIDS = ("gka", "bmojo-f")
NAMES = (*HYBRIDS, "transformer")  # the last is what they were made from


def directory(name: str) -> Path:
    """The Hugging Face directory of an embedded model, for `from_pretrained`.

    Raises:
      ValueError: there is none of this name.
    """
    if name not in NAMES:
        raise ValueError(f"no embedded model {name!r}; there are {', '.join(NAMES)}")
    return Path(__file__).parent / name
