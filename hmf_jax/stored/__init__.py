"""Compiled programs on disk, which the next process runs without tracing them.

JAX's compilation cache keeps what XLA makes of a program and finds it by the program itself, so
that every process traces and lowers all of them first: seconds each, one after the other. Here a
program is found by all that it is made of:

    the source files of this package, the versions of JAX and of what else takes part
    the device: platform, kind, version of its runtime; XLA_FLAGS; JAX's settings
    the function, its static arguments, the tree of its arguments (with it the model's config)
    shape, dtype and sharding of every array

Programs lie in JAX's own cache, in the directory "programs", and are kept wherever that cache is
on and has a directory on this machine (`hmf_jax.enable_compilation_cache`); not by a process that
is one of several. What cannot be described exactly, such as a function from elsewhere that is a
static argument, is not kept: it is compiled as ever.

A file holds a pickle, which can run anything, so only files are read that belong to the user and
that nobody else may write. One that is damaged is compiled again, after a warning.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import os
import pickle
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding

from hmf_jax.stored.key import Unknown, key_of

_FOLDER, _SUFFIX, _HEAD = "programs", ".program", b"hmf_jax program 1\n"
_UNUSED = 30 * 24 * 3600.0  # seconds after which a program that nobody has used is removed
log = logging.getLogger(__name__)


class Call(NamedTuple):
    """A jitted function and what it is called with.

    Attributes:
      program: the jitted function.
      args, options: by position and by name; arrays, or `jax.ShapeDtypeStruct` of them.
      static: the static arguments, by name.
      made_of: what a function was made of that is defined within another one; it must say
        everything that the program depends on. Not needed for other functions.
      ready: what `compiled` returned for such a call, or None.
    """

    program: Any
    args: tuple[Any, ...]
    options: Mapping[str, Any] = {}
    static: Mapping[str, Any] = {}
    made_of: Any = None
    ready: jax.stages.Compiled | None = None

    def __call__(self) -> Any:
        """What it returns."""
        if self.ready is not None:
            return self.ready(*self.args, **self.options)
        return self.program(*self.args, **self.options, **self.static)

    @property
    def name(self) -> str:
        """That of the function."""
        return self.program.__wrapped__.__name__

    def compile(self) -> Callable[[], jax.stages.Compiled]:
        """Begins to compile it: traced now, the rest in the function that is returned."""
        return self.program.lower(*self.args, **self.options, **self.static).compile


class Made(NamedTuple):
    """How this process came by a program.

    Attributes:
      name: of its function.
      found: whether it was kept on disk.
      seconds: that it took; where it was not found, without tracing.
      traced: seconds of tracing and lowering.
    """

    name: str
    found: bool
    seconds: float
    traced: float = 0.0


made: list[Made] = []  # by this process so far


def compiled(calls: Iterable[Call]) -> list[jax.stages.Compiled]:
    """The programs of these calls, from disk or compiled and kept; several at a time.

    They are called with `args` and `options`, without static arguments. Other shapes, dtypes or
    shardings are a TypeError or ValueError then.
    """
    return [future.result() for future in begin(calls)]


def begin(calls: Iterable[Call]) -> list[Future[jax.stages.Compiled]]:
    """Like `compiled`, but does not wait for the compiler: reads and traces only."""
    calls = list(calls)
    pool = ThreadPoolExecutor()
    places = [_place(call) for call in calls]
    futures: list[Future[Any]] = [*map(functools.partial(pool.submit, _read), places, calls)]
    for i, (call, place) in enumerate(zip(calls, places, strict=True)):
        if futures[i].result() is None:  # traced here: settings of JAX may be this thread's own
            began = time.perf_counter()
            compile = call.compile()
            traced = time.perf_counter() - began
            futures[i] = pool.submit(_finish, call, compile, traced, place)
    pool.shutdown(wait=False)
    return futures


def summary(done: Sequence[Made]) -> str:
    """In words, of some of `made`: "7 programs: 5 found on disk, 2 compiled ..."."""
    found, rest = [one for one in done if one.found], [one for one in done if not one.found]
    text = f"{len(done)} program{'s' * (len(done) != 1)}: {len(found)} found on disk"
    if rest:
        longest = max(rest, key=lambda one: one.seconds)
        text += f", {len(rest)} traced in {sum(one.traced for one in rest):.1f} s and compiled, "
        text += f"the longest ({longest.name}) in {longest.seconds:.1f} s"
    return text


def _finish(
    call: Call, compile: Callable[[], jax.stages.Compiled], traced: float, place: Path | None
) -> jax.stages.Compiled:
    began, before = time.perf_counter(), _hits()
    program = compile()
    made.append(Made(call.name, False, time.perf_counter() - began, traced))
    if place is None:
        return program
    if _hits() > before and _devices(call)[0].platform == "cpu":
        # What XLA has read for a CPU it cannot write again: functions are missing from it.
        log.info("%s is not kept: JAX's cache had it", call.name)
    else:
        _write(place, program)
    return program


def _hits() -> int:
    """How many programs this thread has found in JAX's own cache."""
    return _listen().__dict__.setdefault("hits", 0)


@functools.cache
def _listen() -> threading.local:
    counts = threading.local()

    def heard(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            counts.hits = getattr(counts, "hits", 0) + 1

    jax.monitoring.register_event_listener(heard)
    return counts


def directory() -> Path | None:
    """Where programs are kept; None: nowhere."""
    path = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    on = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    if not path or not on or "://" in path or jax.process_count() > 1:
        return None
    return Path(path).expanduser() / _FOLDER


def _place(call: Call) -> Path | None:
    """The file of this program; None if it is not kept."""
    folder = directory()
    if folder is None:
        return None
    try:
        return folder / (key_of(call) + _SUFFIX)
    except (Unknown, OSError) as e:
        log.info("%s is not kept, since there is no saying what it is made of: %s", call.name, e)
        return None


def _devices(call: Call) -> Sequence[Any]:
    """The devices that it runs on, in the order of the mesh."""
    for x in jax.tree.leaves((call.args, dict(call.options))):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return [*sharding.mesh.devices.flat]
        if sharding is not None and len(sharding.device_set) == 1:
            return [*sharding.device_set]
    return jax.devices()[:1]


# Files.


def _read(place: Path | None, call: Call) -> jax.stages.Compiled | None:
    """The program in this file, ready to run; None if there is none."""
    if place is None:
        return None
    began = time.perf_counter()
    try:
        data = _own(place)
        if data is None:
            return None
        body = data[len(_HEAD) + 32 :]
        if not data.startswith(_HEAD + hashlib.sha256(body).digest()):
            raise ValueError("it is not complete")
        program, out_tree = _loads(body)
        in_tree = jax.tree.structure((call.args, dict(call.options)))
        devices = _devices(call)
        found = serialize_executable.deserialize_and_load(
            program, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
        )
        os.utime(place)
        made.append(Made(call.name, True, time.perf_counter() - began))
        return found
    except FileNotFoundError:
        return None
    except Exception as e:
        warnings.warn(f"{place} is compiled again: {type(e).__name__}: {e}", stacklevel=2)
        return None


def _own(place: Path) -> bytes | None:
    """The file's content if it is the user's and nobody else can have written it."""
    with open(place, "rb") as file:
        status = os.fstat(file.fileno())
        if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
            warnings.warn(
                f"{place} is not used: it belongs to somebody else, or others may write it",
                stacklevel=3,
            )
            return None
        return file.read()


def _write(place: Path, program: jax.stages.Compiled) -> None:
    """Keeps a program, unless it or the disk does not allow it."""
    try:
        data, _, out_tree = serialize_executable.serialize(program)
        body = _dumps((data, out_tree))
    except Exception as e:  # the backend cannot, it calls Python, ...
        log.info("a program is not kept: %s: %s", type(e).__name__, e)
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=place.parent, prefix=".new")
        try:
            with open(descriptor, "wb") as file:
                file.write(_HEAD + hashlib.sha256(body).digest() + body)
            os.replace(name, place)
        except BaseException:
            os.unlink(name)
            raise
        _clean(place.parent)
    except OSError as e:
        warnings.warn(f"a compiled program is not kept: {e}", stacklevel=2)


class _Pickler(pickle.Pickler):
    """Devices, which the meshes of models have, by their numbers."""

    def persistent_id(self, obj: Any) -> Any:
        return obj.id if isinstance(obj, jax.Device) else None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        return next(device for device in jax.devices() if device.id == pid)


def _dumps(value: Any) -> bytes:
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()


def _loads(data: bytes) -> Any:
    return _Unpickler(io.BytesIO(data)).load()


def _clean(folder: Path) -> None:
    """Removes what nobody has used for long, and more, the oldest first, if JAX's cache has a
    limit: programs may take as much."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process cleans, too
            status = path.stat()
            if path.suffix == _SUFFIX or time.time() - status.st_mtime > _UNUSED:
                files.append((status.st_mtime, status.st_size, path))
    limit = jax.config.jax_compilation_cache_max_size  # pyright: ignore[reportAttributeAccessIssue]
    total = 0
    for used, size, path in sorted(files, reverse=True):
        total += size
        if time.time() - used > _UNUSED or (0 <= limit < total):
            path.unlink(missing_ok=True)
