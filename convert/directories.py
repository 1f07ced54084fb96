"""Directories that are written at once or not at all, and the lock of a directory.

A save makes its directory under a hidden name beside the target, flushes it to the disk, and then
exchanges the two names in one step, so that at every moment the target's name leads to the old
content or to the new one. On file systems that cannot exchange names (some network ones) there is
a moment without either; should the process end there, the next load or save moves the old content
back. What a killed save leaves under a hidden name is removed by the next save beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import hashlib
import os
import re
import shutil
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

from hmf_jax.convert.reading import (
    CHECKSUMS,
    check_checksums,
    printable,
    read_json,
    write_checksums,
)

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and leftovers stay
    fcntl = None

__all__ = [
    "check_checksums",  # of hmf_jax.convert.reading, as printable, read_json and write_checksums
    "check_target",
    "link",
    "lock",
    "printable",
    "read_json",
    "recover",
    "replacing",
    "write_checksums",
]

PARAMS, DTYPES_FILE = "params", "stored_dtypes.json"
# What a save of a model writes besides the tokenizer files, and therefore replaces.
_MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    DTYPES_FILE,
    CHECKSUMS,
)
# What travels with a model besides its weights and config.
COMPANIONS = (
    "tokenizer.*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates",
    "generation_config.json",
)
_TEMPORARY, _ASIDE = ".hmf-jax-save-", ".hmf-jax-old-"
_LOCK = ".hmf-jax.lock"
_OLD = 86400.0  # seconds that no save takes
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


def is_orbax(directory: Path) -> bool:
    """Whether a model directory holds Orbax parameters (as they are, or damaged)."""
    params = directory / PARAMS
    known = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")
    ours = (directory / CHECKSUMS).is_file() or (directory / DTYPES_FILE).is_file()
    return params.is_dir() and (ours or any((params / name).exists() for name in known))


def holds_model(directory: Path, model_types: Collection[str] | None = None) -> bool:
    """Whether there are weights and a config.json of one of these `model_type`s (None: of any)."""
    try:
        config = read_json(directory / "config.json")
    except (OSError, ValueError):
        return False
    found = config.get("model_type")
    known = isinstance(found, str) if model_types is None else found in model_types
    if not (known or "hybrid_override_pattern" in config):
        return False
    return is_orbax(directory) or any(directory.glob("model*.safetensors"))


def check_target(
    directory: str | Path,
    overwrite: bool = False,
    *,
    model_types: Collection[str] | None = None,
    space: int = 0,
) -> Path:
    """The absolute path of a directory that can be written; call it before any work is done.

    Args:
      directory: the target. A symbolic link is followed only to where nothing is yet.
      overwrite: a model that is there may be replaced.
      model_types: which ones count as a model, see `holds_model`.
      space: bytes that will be needed.

    Raises:
      FileExistsError: there is a file, something else than a model, or a model and no `overwrite`.
      OSError: no permission, no space, a mount point, the working directory.
    """
    directory = Path(directory).expanduser().absolute()
    if ".." in directory.parts:
        directory = directory.resolve()
    recover(directory)
    if directory.is_symlink():
        real = directory.resolve()
        if real.exists() and not (real.is_dir() and _is_empty(real)):
            raise FileExistsError(f"{directory} is a symbolic link to {real}; name that directory")
        directory = real
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; choose another output directory")
    if directory.is_dir():
        _check_existing(directory, overwrite, model_types)
    parent = directory.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(f"{directory} cannot be made: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{directory} cannot be written: no permission to write in {parent}")
    if space and (free := shutil.disk_usage(parent).free) < space:
        raise OSError(
            f"{directory} needs {space / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB free; "
            "nothing written"
        )
    return directory


def _check_existing(directory: Path, overwrite: bool, model_types: Collection[str] | None) -> None:
    if not _is_empty(directory):
        if not holds_model(directory, model_types):
            raise FileExistsError(
                f"{directory} is not empty and holds no model that is known here (config.json and "
                "weights); choose another directory"
            )
        if not overwrite:
            raise FileExistsError(
                f"{directory} exists and is not empty; choose another directory or pass "
                "overwrite=True (--overwrite)"
            )
    if os.path.ismount(directory):
        raise OSError(f"{directory} is a mount point; choose a directory inside it")
    with contextlib.suppress(FileNotFoundError):  # the working directory may be gone
        if Path.cwd().is_relative_to(directory.resolve()):
            raise OSError(f"{directory} is the working directory; change to another one first")


@contextlib.contextmanager
def replacing(
    directory: str | Path,
    overwrite: bool = False,
    *,
    model_types: Collection[str] | None = None,
    space: int = 0,
) -> Iterator[Path]:
    """A temporary directory that takes the place of `directory` if the block succeeds.

    Of a model that it replaces, the files that no save writes (README.md, notes, subfolders) are
    kept; tokenizer files as well, unless the new content brings its own.

    Arguments and errors as in `check_target`; after any error the directory is as it was.
    """
    target = check_target(directory, overwrite, model_types=model_types, space=space)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean(target.parent)
    tmp, held = _temporary(target.parent)
    try:
        yield tmp
        if target.is_dir():  # it may have changed since
            check_target(target, overwrite, model_types=model_types)
            _keep(target, tmp)
            shutil.copymode(target, tmp)
        _flush(tmp)
        _put(tmp, target)
        _flush_directory(target.parent)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(f"the disk is full; nothing written to {target}") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)  # after an exchange: the old content
        _release(held)
    shutil.rmtree(_aside(target), ignore_errors=True)


def recover(directory: Path) -> None:
    """Moves back what a killed save had moved aside, where names cannot be exchanged."""
    if os.path.lexists(directory):
        return
    aside = _aside(directory)
    if aside.is_dir():
        with contextlib.suppress(OSError):  # another process may be quicker
            os.rename(aside, directory)


def _aside(directory: Path) -> Path:
    name = hashlib.sha256(os.fsencode(directory.name)).hexdigest()[:16]
    return directory.with_name(_ASIDE + name)


def _is_empty(directory: Path) -> bool:
    with os.scandir(directory) as entries:
        return next(entries, None) is None


def _temporary(parent: Path) -> tuple[Path, int]:
    """A new hidden directory, and its descriptor, which holds a lock for as long as we live."""
    while True:
        tmp = parent / f"{_TEMPORARY}{_host()}-{uuid.uuid4().hex[:16]}"
        try:
            tmp.mkdir()
            if fcntl is None:  # no lock is possible, and Windows opens no directories
                return tmp, -1
            held = os.open(tmp, os.O_RDONLY)
        except FileNotFoundError:  # cleaned as a leftover before it was locked
            continue
        _flock(held, wait=True)
        if tmp.is_dir():
            _held.add(held)
            return tmp, held
        os.close(held)


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _clean(parent: Path) -> None:
    """Removes the temporary directories of processes that have ended.

    Those of other machines only when they are old: some network file systems let every machine
    have a lock of its own.
    """
    with os.scandir(parent) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(_TEMPORARY)]
    for name in names:
        found = re.fullmatch(re.escape(_TEMPORARY) + "([0-9a-f]{8})-[0-9a-f]{16}", name)
        if found is None:
            continue
        with contextlib.suppress(OSError):
            held = os.open(parent / name, os.O_RDONLY | _NOFOLLOW)
            try:
                old = time.time() - os.fstat(held).st_mtime > _OLD
                if (found[1] == _host() or old) and _flock(held):
                    shutil.rmtree(parent / name, ignore_errors=True)
            finally:
                os.close(held)


def _keep(old: Path, new: Path) -> None:
    """Links what no save writes from the old content into the new."""
    present = set(os.listdir(new))
    brought = any(_matches(name, COMPANIONS) for name in present)
    replaced = _MODEL_FILES + (COMPANIONS if brought else ())
    if is_orbax(old):
        replaced += (PARAMS,)
    for path in old.iterdir():
        if _matches(path.name, replaced):
            continue
        if path.name in present:
            raise FileExistsError(f"{path} is no part of a model; move it away to save one here")
        link(path, new / path.name)


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def link(source: Path, target: Path) -> None:
    """The same file or tree under a second name; a copy where the file system has no hard links."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link_file)
    else:
        _link_file(source, target)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _put(tmp: Path, target: Path) -> None:
    """Gives `tmp` the target's name, and what was there the name of `tmp`."""
    if not target.is_dir() or _is_empty(target):
        if os.name == "nt" and target.is_dir():
            target.rmdir()
        os.rename(tmp, target)
        return
    if _exchange(tmp, target):
        return
    aside = _aside(target)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(target, aside)
    try:
        os.rename(tmp, target)
    except OSError:
        recover(target)
        raise


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two names in one step; False where that cannot be done."""
    if sys.platform == "linux":
        name, here, flag = "renameat2", (-100,), 2  # AT_FDCWD, RENAME_EXCHANGE
    elif sys.platform == "darwin":
        name, here, flag = "renamex_np", (), 2  # RENAME_SWAP
    else:
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if call is None:
        return False
    if call(*here, os.fsencode(a), *here, os.fsencode(b), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _flush(directory: Path) -> None:
    """Everything below is on the disk when this returns."""
    for root, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(root, name)
            if not os.path.isfile(path) or os.path.islink(path):
                continue
            try:
                fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
            except PermissionError:  # a kept file of somebody else: nothing of ours is in it
                continue
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        _flush_directory(root)


def _flush_directory(directory: str | Path) -> None:
    with contextlib.suppress(OSError):  # not every system flushes directories
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _flock(fd: int, wait: bool = False) -> bool | None:
    """Whether the lock was taken; None if the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def lock(directory: str | Path) -> Iterator[None]:
    """Holds a directory for this process, so that no other one writes there meanwhile.

    The system releases it when the process ends, however it ends. Where the file system has no
    locks there is a warning and no protection.

    Raises BlockingIOError, which says who holds it, if it is held; also by this process.
    """
    file = Path(directory) / _LOCK
    while True:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | _NOFOLLOW, 0o644)
        taken = _flock(fd)
        if taken is False:
            holder = printable(os.read(fd, 200).decode(errors="replace").strip()) or "a process"
            os.close(fd)
            raise BlockingIOError(
                f"{directory} is in use by {holder}; wait until it ends or choose another directory"
            )
        try:  # it may have been released, and so removed, between the opening and the lock
            if taken is None or os.path.samestat(os.fstat(fd), os.stat(file)):
                break
        except FileNotFoundError:
            pass
        os.close(fd)
    if taken is None:
        warnings.warn(
            f"the file system of {directory} has no locks: do not write there twice at the same "
            "time",
            stacklevel=3,
        )
    _held.add(fd)
    try:
        os.ftruncate(fd, 0)
        os.write(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        if fd in _held:
            file.unlink(missing_ok=True)
            _release(fd)


_held: set[int] = set()  # descriptors of locks


def _release(fd: int) -> None:
    if fd in _held:
        _held.remove(fd)
        os.close(fd)


def _let_go() -> None:
    """In a forked process: only its parent holds the locks."""
    for fd in list(_held):
        _release(fd)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
