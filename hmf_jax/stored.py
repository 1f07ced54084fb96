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
import enum
import functools
import hashlib
import importlib.metadata
import logging
import os
import pickle
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import NamedSharding

from hmf_jax.packed import Origin, PackedModel

_BEGAN = time.time()
_FOLDER, _SUFFIX, _HEAD = "programs", ".program", b"hmf_jax program 1\n"
_UNUSED = 30 * 24 * 3600.0  # seconds after which a program that nobody has used is removed
# Whose code takes part in making a program: their versions are part of the key, and functions and
# types of theirs are what their names say.
_MAKERS = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes", "optax", "qwix", "jla", "jax_triton")
_PLUGINS = ("jax_cuda", "jax_linear", "nvidia_", "triton")  # beginnings of names
_NAMED = ("hmf_jax", "builtins", *_MAKERS)
# Settings of JAX that say where programs are kept and what is told about them.
_ASIDE = ("jax_compilation_cache", "jax_persistent_cache", "jax_log", "jax_debug_log")
_ASIDE += ("jax_traceback", "jax_explain", "jax_enable_compilation_cache")
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

    def compile(self) -> Callable[[], jax.stages.Compiled]:
        """Begins to compile it: traced now, the rest in the function that is returned."""
        return self.program.lower(*self.args, **self.options, **self.static).compile


def compiled(calls: Iterable[Call]) -> list[jax.stages.Compiled]:
    """The programs of these calls, from disk or compiled and kept; several at a time.

    They are called with `args` and `options`, without static arguments. Other shapes, dtypes or
    shardings are a TypeError or ValueError then.
    """
    calls = list(calls)
    with ThreadPoolExecutor() as pool:
        places = [_place(call) for call in calls]
        found = list(pool.map(_read, places, calls))
        waiting = {}
        for i, (call, place) in enumerate(zip(calls, places, strict=True)):
            if found[i] is None:  # traced here: settings of JAX may be this thread's own
                waiting[i] = pool.submit(_finish, call.compile(), place)
        return [waiting[i].result() if one is None else one for i, one in enumerate(found)]


def _finish(compile: Callable[[], jax.stages.Compiled], place: Path | None) -> jax.stages.Compiled:
    program = compile()
    if place is not None:
        _write(place, program)
    return program


def directory() -> Path | None:
    """Where programs are kept; None: nowhere."""
    path = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    on = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    if not path or not on or "://" in path or jax.process_count() > 1:
        return None
    return Path(path).expanduser() / _FOLDER


# Files.


def _read(place: Path | None, call: Call) -> jax.stages.Compiled | None:
    """The program in this file, ready to run; None if there is none."""
    if place is None:
        return None
    try:
        data = _own(place)
        if data is None:
            return None
        body = data[len(_HEAD) + 32 :]
        if not data.startswith(_HEAD + hashlib.sha256(body).digest()):
            raise ValueError("it is not complete")
        program, out_tree = pickle.loads(body)
        in_tree = jax.tree.structure((call.args, dict(call.options)))
        devices = _devices(call)
        found = serialize_executable.deserialize_and_load(
            program, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
        )
        os.utime(place)
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
        body = pickle.dumps((data, out_tree))
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


# Keys.


class _Unknown(Exception):
    """Something that cannot be described so that two of them have the same text only if equal."""


def _place(call: Call) -> Path | None:
    """The file of this program; None if it is not kept."""
    folder = directory()
    if folder is None:
        return None
    try:
        return folder / (_key(call) + _SUFFIX)
    except _Unknown as e:
        log.info("a program is not kept: %s cannot be described", e)
        return None


def _key(call: Call) -> str:
    function = call.program.__wrapped__
    if call.made_of is None:
        made_of = _text(function)
    else:
        made_of = f"{function.__module__}:{function.__qualname__} {_text(call.made_of)}"
    leaves, tree = jax.tree.flatten((call.args, dict(call.options)))
    parts = [
        _environment(),
        ",".join(f"{name}={getattr(jax.config, name, None)!r}" for name in _settings()),
        ",".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")),
        made_of,
        _text(dict(call.static)),
        _text(tree),
        "\n".join(map(_array_text, leaves)),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _devices(call: Call) -> Sequence[Any]:
    """The devices that it runs on, in the order of the mesh."""
    for x in jax.tree.leaves((call.args, dict(call.options))):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return [*sharding.mesh.devices.flat]
        if sharding is not None and len(sharding.device_set) == 1:
            return [*sharding.device_set]
    return jax.devices()[:1]


@functools.cache
def _settings() -> list[str]:
    return sorted(name for name in jax.config.values if not name.startswith(_ASIDE))


@functools.cache
def _environment() -> str:
    """What is the same for all programs of this process.

    Raises `_Unknown` if the source files are not those that this process runs.
    """
    root, digest = Path(__file__).parent, hashlib.sha256()
    files = [
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.endswith(".py")
    ]
    for file in sorted(files):
        if file.stat().st_mtime > _BEGAN:
            raise _Unknown(f"{file}, which was changed meanwhile,")
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    device = jax.devices()[0]
    kind = [device.platform, device.device_kind, device.client.platform_version]
    kind += [getattr(device, name, "") for name in ("compute_capability", "core_count")]
    if device.platform == "cpu":
        kind.append(_instructions())
    return f"{digest.hexdigest()} {sys.version} {kind} {_versions()}"


def _versions() -> list[str]:
    """Names and versions of what takes part in compiling, as directories of packages say."""
    found = []
    for name in _MAKERS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    for path in sys.path:
        if os.path.isdir(path):
            names = (name for name in os.listdir(path) if name.startswith(_PLUGINS))
            found += [name for name in names if name.endswith(".dist-info")]
    return sorted(found)


def _instructions() -> str:
    """What this machine's processor can do: programs for CPUs depend on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _array_text(x: Any) -> str:
    if not hasattr(x, "dtype"):
        return type(x).__name__
    sharding = getattr(x, "sharding", None)
    place = sharding is not None and getattr(x, "committed", True)
    weak = getattr(x, "weak_type", False)
    return f"{np.shape(x)} {x.dtype} {weak} {_sharding_text(sharding) if place else ''}"


@functools.lru_cache
def _sharding_text(sharding: Any) -> str:
    if isinstance(sharding, NamedSharding):
        mesh = sharding.mesh
        ids = [device.id for device in mesh.devices.flat]
        what = f"{sharding.spec} {[*mesh.shape.items()]} {mesh.axis_types} {ids}"
    else:
        what = f"{type(sharding)} {sorted(device.id for device in sharding.device_set)}"
        what += "" if len(sharding.device_set) == 1 else repr(sharding)
    return f"{what} {sharding.memory_kind}"


def _text(x: Any) -> str:
    """What says all of a static value; raises `_Unknown` where that is not known."""
    if x is None or isinstance(x, bool | int | float | complex | str | bytes):
        return f"{type(x).__name__}({x!r})"
    if isinstance(x, enum.Enum | np.dtype):
        return f"{type(x).__qualname__}({x!s})"
    if isinstance(x, jax.tree_util.PyTreeDef):
        return _tree_text(x)
    if isinstance(x, type | types.FunctionType):
        name = f"{x.__module__}:{x.__qualname__}"
        if x.__module__.partition(".")[0] not in _NAMED or "<" in name:
            raise _Unknown(name)
        if getattr(x, "__closure__", None):
            raise _Unknown(f"what {name} was made of")
        return name
    if isinstance(x, tuple | list):
        return f"{_text(type(x))}[{','.join(map(_text, x))}]"
    if isinstance(x, Mapping):
        return f"{_text(type(x))}{{{','.join(f'{_text(k)}:{_text(v)}' for k, v in x.items())}}}"
    if isinstance(x, jax.sharding.Sharding):
        return _sharding_text(x)
    if isinstance(x, jax.sharding.Mesh):
        ids = [device.id for device in x.devices.flat]
        return f"{[*x.shape.items()]} {x.axis_types} {ids}"
    if isinstance(x, Origin):
        return "Origin"  # all are equal
    if hasattr(x, "__dataclass_fields__"):
        fields = ",".join(f"{name}={_text(getattr(x, name))}" for name in x.__dataclass_fields__)
        return f"{_text(type(x))}({fields})"
    raise _Unknown(f"a {type(x).__qualname__}")


def _tree_text(tree: Any) -> str:
    node = tree.node_data()
    if node is None:
        return "*"
    kind, static = node
    if kind is PackedModel:
        return _packed_text(static)
    return f"{_text(kind)}<{_text(static)}>({','.join(map(_tree_text, tree.children()))})"


@functools.lru_cache(maxsize=32)
def _packed_text(structure: Any) -> str:
    """Of the model that a list of arrays stands for, see `PackedModel`."""
    return _tree_text(structure.treedef)
