"""Reading files that anybody may have written: JSON, names that are shown, checksums."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

CHECKSUMS = "checksums.sha256"
_CHECKSUMS_LIMIT = 1 << 26  # bytes
_LAST_LINE = "# end\n"  # a comment for sha256sum: without it the rest of the file was lost
_DEPTH = 100


def printable(text: object, limit: int = 200) -> str:
    """Text from a file as it may be shown: one line, no control characters or terminal escapes.

    What cannot be printed becomes an escape sequence in plain text; at most `limit` characters.
    """
    text = str(text)
    shown = (c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    more = f"... ({len(text):,} characters)" if len(text) > limit else ""
    return "".join(shown) + more


def listed(names: Collection[str], limit: int = 20) -> str:
    """Names from a file, separated by commas; at most `limit` of them."""
    shown = ", ".join(printable(name) for name in list(names)[:limit])
    return shown + (f" and {len(names) - limit:,} more" if len(names) > limit else "")


def summary(title: str, problems: Sequence[str], limit: int = 50) -> str:
    """An error that lists problems, each on its own line if there are several."""
    if len(problems) == 1:
        return f"{title} {problems[0]}"
    more = [f"and {len(problems) - limit:,} more"] if len(problems) > limit else []
    return "\n  ".join([title, *problems[:limit], *more])


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    lines = str(error).strip().split("\n")
    return printable(lines[0] or type(error).__name__)


def inside(directory: Path, name: str) -> Path:
    """The path of a file that another file names, which must lie in the directory.

    Raises ValueError for names and symbolic links that lead out of it. Links of the Hugging Face
    cache are followed: they lead from snapshots/REVISION to the blobs of the same repository.
    """
    path, parts = directory / name, re.split(r"[/\\\\]", name)
    try:
        too_long = max(len(os.fsencode(part)) for part in parts) > 255
    except UnicodeEncodeError:
        too_long = True
    if Path(name).is_absolute() or ".." in parts or "\0" in name or too_long:
        raise ValueError(f"{directory}: {printable(name)} is not the name of a file in it")
    root, real = (Path(os.path.realpath(p)) for p in (directory, path))
    roots = [root]
    if "snapshots" in root.parts:
        roots += [p.parent / "blobs" for p in (root, *root.parents) if p.name == "snapshots"]
    if not any(real.is_relative_to(os.path.realpath(allowed)) for allowed in roots):
        raise ValueError(
            f"{directory}: {printable(name)} is a symbolic link that leads out of the directory; "
            "copy the file or use a hard link"
        )
    return path


def read_json(file: str | Path, *, limit: int = 1 << 24) -> dict[str, Any]:
    """The JSON object in a file that anybody may have written.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: one line that names the file: more than `limit` bytes, not JSON in UTF-8, not an
        object, nested more than 100 deep, a key twice, or numbers that are not finite.
    """
    file = Path(file)
    if not file.is_file():
        if file.exists():
            raise ValueError(f"{file} is not a regular file")
        raise FileNotFoundError(f"{file} does not exist")
    with file.open("rb") as f:
        raw = f.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"{file} is too large: more than {limit:,} bytes")
    return parse_json(raw, file)


def parse_json(raw: bytes, file: object) -> dict[str, Any]:
    """`read_json` of bytes that were read from `file`, which errors name."""
    if raw.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` in the "
            "repository it comes from"
        )
    try:
        data = strict_json(raw.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"{file} is not valid JSON ({e}); download it again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object, found {type(data).__name__}")
    level: list[Any] = [data]
    for _ in range(_DEPTH):
        inner = (x.values() if isinstance(x, dict) else x for x in level)
        level = [y for x in inner for y in x if isinstance(y, dict | list)]
    if level:
        raise ValueError(f"{file} is nested too deeply: more than {_DEPTH} levels")
    return data


def strict_json(text: str) -> Any:
    """JSON without what its readers understand differently: double keys, NaN, infinite numbers.

    Raises ValueError, which says what is wrong but not where; RecursionError.
    """
    return json.loads(
        text, object_pairs_hook=_unique, parse_constant=_not_finite, parse_float=_finite
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key '{printable(twice)}' is there twice")
    return found


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{printable(text, 20)} is not a finite number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _not_finite(text)


def write_checksums(directory: str | Path) -> None:
    """Writes checksums.sha256 (for `sha256sum -c`) of all files below a directory."""
    directory = Path(directory)
    names = sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and path.relative_to(directory).as_posix() != CHECKSUMS
    )
    lines = zip(_digests(directory, names), names, strict=True)
    text = "".join(f"{digest}  {name}\n" for digest, name in lines) + _LAST_LINE
    (directory / CHECKSUMS).write_text(text, encoding="utf-8")


def check_checksums(directory: str | Path) -> bool:
    """Compares all files that checksums.sha256 names; False if the directory has none.

    Raises ValueError, one line that names the files, if one is missing or has changed.
    """
    directory = Path(directory)
    file = directory / CHECKSUMS
    if not file.is_file():
        return False
    if file.stat().st_size > _CHECKSUMS_LIMIT:
        raise ValueError(f"{file} is too large: more than {_CHECKSUMS_LIMIT:,} bytes")
    wanted: dict[str, str] = {}
    damaged = ValueError(f"{file} is damaged; restore {directory} from a copy")
    *lines, last = file.read_text(encoding="utf-8", errors="replace").splitlines(True) or [""]
    if last != _LAST_LINE:
        raise damaged
    for line in lines:
        found = re.fullmatch(r"([0-9a-f]{64})  ([^/\\].*)\n", line)
        if found is None or ".." in Path(found[2]).parts:
            raise damaged
        wanted[found[2]] = found[1]
    missing = [name for name in wanted if not (directory / name).is_file()]
    names = [name for name in wanted if name not in missing]
    digests = zip(names, _digests(directory, names), strict=True)
    changed = [name for name, digest in digests if digest != wanted[name]]
    problems = [f"{printable(n)} is missing" for n in missing]
    problems += [f"{printable(n)} has changed since it was saved" for n in changed]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{directory}: {', '.join(problems[:3])}{more}; restore it from a copy (or, if the "
            f"change is yours, remove its line from {CHECKSUMS})"
        )
    return True


def _digests(directory: Path, names: list[str]) -> list[str]:
    def digest(name: str) -> str:
        with (directory / name).open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(digest, names))
