"""Two sets of rows side by side: `python -m benchmarks.compare before.jsonl after.jsonl`."""

from __future__ import annotations

import argparse

from benchmarks.rows import Row, read


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Compare two runs, or two commits of one file: results.jsonl@a1b2 "
        "results.jsonl@c3d4. A ratio under 1 means the second is faster.",
    )
    parser.add_argument("before", help="file of rows, or file@commit")
    parser.add_argument("after", help="file of rows, or file@commit")
    args = parser.parse_args(argv)
    print("\n".join(compare(read(args.before), read(args.after))))


def compare(before: list[Row], after: list[Row]) -> list[str]:
    """One line per problem that both sides measured, and what only one of them did.

    Where a side measured the same thing twice, its last row counts.
    """
    old, new = ({row.key: row for row in rows} for rows in (before, after))
    lines = [f"{'ms before':>11} {'ms after':>11} {'ratio':>7}  {'error before -> after':<22} what"]
    for key in [key for key in old if key in new]:
        a, b = old[key], new[key]
        errors = f"{_error(a)} -> {_error(b)}"
        lines.append(f"{a.ms:11.3f} {b.ms:11.3f} {b.ms / a.ms:7.3f}  {errors:<22} {b.describe()}")
    for name, mine, other in (("before", old, new), ("after", new, old)):
        lines += [f"only {name}: {row.describe()}" for key, row in mine.items() if key not in other]
    return lines


def _error(row: Row) -> str:
    return "-" if row.relative_error is None else f"{row.relative_error:.1e}"


if __name__ == "__main__":
    main()
