"""A run of the scheduler as lines of JSON, which can be done again without model and device.

    engine = Engine(model, 8, capacity=4096, record=file.write)

    python -m hmf_jax.engine.replay FILE          # the same turns again, or the first that differs

A line is one call of the scheduler: `limits` first, then `submit`, `cancel`, `plan` with the turn
that came of it, `commit` with what the device produced, `reset`, `grow` and `fail`. Prompts are
token ids, so a recording has what users wrote.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from hmf_jax.engine.books import Ask, Limits
from hmf_jax.engine.scheduler import Scheduler
from hmf_jax.engine.turn import Chunk, Event, First, Load, Result, Save, Turn

_PARTS: dict[str, Any] = {"saves": Save, "loads": Load, "cuts": Save, "firsts": First}


def turn_to_json(turn: Turn) -> str:
    """One line, without what is not in the turn."""
    return json.dumps(_short(turn))


def turn_from_json(line: str) -> Turn:
    """The turn that `turn_to_json` made a line of."""
    return _turn(json.loads(line))


class Recorder(Scheduler):
    """A scheduler that tells what is done with it.

    Args:
      limits, clock: see `Scheduler`.
      write: gets each line, with its end.
    """

    def __init__(
        self,
        limits: Limits,
        write: Callable[[str], Any],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(limits, clock=clock)
        self._write = write
        self._say(limits=dataclasses.asdict(limits))

    def submit(self, id: int, ask: Ask) -> None:
        super().submit(id, ask)
        numbers = {"prompt": list(map(int, ask.prompt)), "cuts": list(map(int, ask.cuts))}
        self._say(submit=id, ask={**vars(ask), **numbers})

    def cancel(self, id: int) -> None:
        super().cancel(id)
        self._say(cancel=id)

    def plan(self, steps: int) -> Turn | None:
        turn = super().plan(steps)
        self._say(plan=steps, turn=None if turn is None else _short(turn))
        return turn

    def commit(self, turn: Turn | None, result: Result | None) -> list[Event]:
        if turn is None or result is None:
            self._say(commit=None)
        else:
            tokens = [list(map(int, row)) for row in result.tokens]
            self._say(commit=turn.number, tokens=tokens, reasons=list(map(int, result.reasons)))
        return super().commit(turn, result)

    def reset_prefixes(self) -> int:
        self._say(reset=True)
        return super().reset_prefixes()

    def grow(self, capacity: int, pages: int) -> None:
        super().grow(capacity, pages)
        self._say(grow=[capacity, pages])

    def fail(self) -> list[Event]:
        self._say(fail=True)
        return super().fail()

    def _say(self, **line: Any) -> None:
        self._write(json.dumps(line) + "\n")


def replay(lines: Iterable[str]) -> int:
    """Does again what a `Recorder` wrote.

    Returns:
      How many turns there were.

    Raises:
      ValueError: lines that are not a recording; a turn that differs from the recorded one.
    """
    scheduler: Scheduler | None = None
    turns: dict[int, Turn] = {}
    count = 0
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            if scheduler is None:
                scheduler = Scheduler(Limits(**line["limits"]))
            elif (turn := _again(scheduler, line, turns)) is not None:
                turns[turn.number] = turn
                count += 1
        except (KeyError, TypeError, json.JSONDecodeError) as e:
            raise ValueError(f"line {number} is not one of a recording: {e!r}") from e
        except _Different as e:
            raise ValueError(f"line {number}: {e}") from e
    return count


class _Different(Exception):
    """A turn is not the recorded one."""


def _again(scheduler: Scheduler, line: dict[str, Any], turns: dict[int, Turn]) -> Turn | None:
    if "submit" in line:
        scheduler.submit(line["submit"], Ask(**line["ask"]))
    elif "cancel" in line:
        scheduler.cancel(line["cancel"])
    elif "plan" in line:
        turn, then = scheduler.plan(line["plan"]), line["turn"]
        if turn != (then if then is None else _turn(then)):
            now = None if turn is None else turn_to_json(turn)
            raise _Different(f"the turn is now {now}, was {json.dumps(then)}")
        return turn
    elif "grow" in line:
        scheduler.grow(*line["grow"])
    elif "reset" in line:
        scheduler.reset_prefixes()
    elif "fail" in line:
        scheduler.fail()
    elif line["commit"] is None:
        scheduler.commit(None, None)
    else:
        none = [[0.0] * len(row) for row in line["tokens"]]
        result = Result(line["tokens"], none, line["reasons"])
        scheduler.commit(turns[line["commit"]], result)
    return None


def _short(turn: Turn) -> dict[str, Any]:
    defaults = Turn._field_defaults
    return {k: v for k, v in turn._asdict().items() if k not in defaults or v != defaults[k]}


def _turn(line: dict[str, Any]) -> Turn:
    parts = {name: _tuples(value) for name, value in line.items()}
    for name, kind in _PARTS.items():
        if name in parts:
            parts[name] = tuple(kind(*one) for one in parts[name])
    if "chunk" in parts:
        parts["chunk"] = Chunk(*parts["chunk"])
    return Turn(**parts)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def main(arguments: list[str]) -> int:
    """The command; what it returns is its exit code."""
    if len(arguments) != 1:
        print("usage: python -m hmf_jax.engine.replay FILE", file=sys.stderr)
        return 2
    try:
        with open(arguments[0], encoding="utf-8") as file:
            count = replay(file)
    except (OSError, ValueError) as e:
        print(f"{arguments[0]}: {e}", file=sys.stderr)
        return 1
    print(f"{count} turns, the same")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
