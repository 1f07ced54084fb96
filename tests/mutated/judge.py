"""What happens when a damaged directory is read, and whether that is right."""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hmf_jax import HybridConfig, from_pretrained
from hmf_jax.parameters import flat_params
from hmf_jax.text.template import render
from hmf_jax.text.tokenizer import default_sampling, load_tokenizer, stop_ids
from tests.mutated.kinds import OTHER, REFUSED, SAME, Kind

MEMORY, SECONDS = 2 << 30, 30
TEXT = ("tokenizer", "generation_config", "template")  # groups that are judged by reading text
_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError)


def wrong(kind: Kind, seed: int, originals: Mapping[str, Path], place: Path) -> str | None:
    """Damages a copy of one of the originals; says what was wrong about how it was read, or None.

    Args:
      kind: what is done to the copy.
      seed: of the place where, and of what.
      originals: form of a directory -> one that is whole.
      place: an empty directory for the copy; it is removed.
    """
    place.mkdir()
    directory = place / "model"
    shutil.copytree(originals[kind.form], directory)
    kind.change(directory, random.Random(f"{kind.name} {seed}"))
    before = _listing(place)
    read = _read_text if kind.group in TEXT else _read_weights
    begin, found, error = time.monotonic(), None, None
    try:
        with _limits(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read(directory)
    except Exception as e:
        error = e
    seconds, after = time.monotonic() - begin, _listing(place)
    shutil.rmtree(place)
    if seconds > SECONDS:
        return f"took {seconds:.0f} s"
    if before != after:
        return f"files changed: {sorted(before ^ after)[:3]}"
    if error is not None:
        return _wrong_error(error, directory)
    if kind.right == REFUSED:
        return "accepted"
    if kind.right == SAME and kind.group not in TEXT and not _equal(found, originals[kind.form]):
        return "loaded with other weights"
    return None


def _wrong_error(error: Exception, directory: Path) -> str | None:
    text = str(error)
    what = f"{type(error).__name__}: {text[:300]!r}"
    if type(error) not in _ERRORS:
        return what
    lines = text.split("\n")
    if len(lines) > 52 or len(text) > 8000 or not all(line.isprintable() for line in lines):
        return f"unreadable, {what}"
    return None if str(directory) in text else f"no file named, {what}"


def _read_weights(directory: Path) -> Any:
    return flat_params(from_pretrained(directory, dtype=None, progress=False))


def _read_text(directory: Path) -> Any:
    """What a conversation reads before the model runs."""
    tokenizer = load_tokenizer(directory)
    ids = tokenizer("Where is the key?\n", add_special_tokens=False)["input_ids"]
    if not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise AssertionError(f"token ids {ids[:9]}")
    text = tokenizer.decode(ids)
    messages = [{"role": "user", "content": "hi"}]
    shown = render(tokenizer, messages, add_generation_prompt=True)
    if len(shown) > 10_000_000:
        raise AssertionError(f"{len(shown)} characters of template")
    return text, default_sampling(directory), stop_ids(HybridConfig(), tokenizer, directory)


_weights: dict[Path, dict[str, np.ndarray]] = {}


def _equal(found: Any, original: Path) -> bool:
    if original not in _weights:
        _weights[original] = {p: np.asarray(x) for p, x in _read_weights(original).items()}
    wanted = _weights[original]
    return wanted.keys() == found.keys() and all(
        np.array_equal(np.asarray(x), wanted[p]) for p, x in found.items()
    )


def _listing(place: Path) -> set[tuple[Any, ...]]:
    """Everything below the directory above, to notice any change."""
    found = set()
    for path in place.rglob("*"):
        status = path.lstat()
        found.add((str(path.relative_to(place)), status.st_size, status.st_mtime_ns))
    return found


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """An error for more than 2 GB or 30 s."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


__all__ = ["OTHER", "REFUSED", "SAME", "TEXT", "wrong"]
