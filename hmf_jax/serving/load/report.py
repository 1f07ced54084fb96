"""What a load came to: the numbers, under the names that `vllm bench serve` gives them."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hmf_jax.serving.load.reply import Reply

LATENCIES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token after the first",
    "itl": "Inter-token latency",
    "gap": "Gap between two events",
    "e2el": "End-to-end latency",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """All replies of a load.

    Attributes:
      replies: by user, in the order of the plan.
      duration: seconds from the first call to the last reply.
      health: replies of /health meanwhile; empty unless the plan watches.
    """

    replies: list[list[Reply]]
    duration: float
    health: list[Reply] = dataclasses.field(default_factory=list)

    @property
    def all(self) -> list[Reply]:
        """The replies in one list."""
        return list(itertools.chain.from_iterable(self.replies))

    @property
    def problems(self) -> list[str]:
        """What broke the protocol, one line each, with the call's `about`."""
        return [
            f"{reply.call.about or reply.call.path}: {problem}"
            for reply in [*self.all, *self.health]
            for problem in reply.problems
        ]

    def numbers(self, goodput: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Everything as one JSON object; latencies in milliseconds, rates per second.

        Only complete answers count, and for latencies those that were streamed (end-to-end: all).

        Args:
          goodput: limits in milliseconds by latency ("ttft", "tpot", "itl": its mean, "gap": the
            longest, "e2el"); `request_goodput` counts the requests that kept all of them.

        Raises ValueError for a limit of another name.
        """
        if unknown := set(goodput or ()) - set(LATENCIES):
            raise ValueError(
                f"goodput has limits for {', '.join(LATENCIES)}, not for {', '.join(unknown)}."
            )
        good = [reply for reply in self.all if reply.ok]
        seconds = max(self.duration, 1e-9)
        inputs = sum(reply.prompt_tokens for reply in good)
        outputs = sum(reply.output_tokens for reply in good)
        cached = sum(reply.cached_tokens for reply in good)
        numbers: dict[str, Any] = {
            "requests": len(self.all),
            "completed": len(good),
            "failed": sum(not (reply.ok or reply.left) for reply in self.all),
            "refused": sum(r.refused + (r.status in (429, 503)) for r in self.all),
            "closed_by_client": sum(reply.left for reply in self.all),
            "status_codes": {
                str(k): n for k, n in sorted(Counter(r.status for r in self.all).items())
            },
            "duration": self.duration,
            "total_input_tokens": inputs,
            "total_output_tokens": outputs,
            "cached_tokens": cached,
            "request_throughput": len(good) / seconds,
            "input_throughput": inputs / seconds,
            "prefill_throughput": (inputs - cached) / seconds,
            "output_throughput": outputs / seconds,
            "total_token_throughput": (inputs + outputs) / seconds,
        }
        if goodput:
            kept = sum(_keeps(reply, goodput) for reply in good)
            numbers["request_goodput"] = kept / seconds
            numbers["goodput_fraction"] = kept / max(len(good), 1)
        for name in LATENCIES:
            values = [value for reply in good for value in latencies(reply)[name]]
            numbers |= percentiles(name, values)
        if self.health:
            numbers["max_health_ms"] = max(r.ended - r.sent for r in self.health) * 1e3
        numbers["problems"] = self.problems
        return numbers

    def table(self, goodput: Mapping[str, float] | None = None) -> str:
        """The numbers for people."""
        numbers = self.numbers(goodput)
        codes = ", ".join(f"{code}: {n}" for code, n in numbers["status_codes"].items())
        lines = [
            ("Requests", f"{numbers['requests']}"),
            ("Completed", f"{numbers['completed']}"),
            ("Failed", f"{numbers['failed']}"),
            ("Refused for lack of room", f"{numbers['refused']}"),
            ("Closed by the client", f"{numbers['closed_by_client']}"),
            ("Status codes", codes),
            ("Duration (s)", f"{numbers['duration']:.2f}"),
            ("Input tokens", f"{numbers['total_input_tokens']}"),
            ("  from the prefix cache", f"{numbers['cached_tokens']}"),
            ("Output tokens", f"{numbers['total_output_tokens']}"),
            ("Requests/s", f"{numbers['request_throughput']:.2f}"),
            ("Output tokens/s", f"{numbers['output_throughput']:.1f}"),
            ("Input tokens/s", f"{numbers['input_throughput']:.1f}"),
            ("  without cached ones", f"{numbers['prefill_throughput']:.1f}"),
        ]
        if goodput:
            lines.append(("Goodput (requests/s)", f"{numbers['request_goodput']:.2f}"))
        if self.health:
            lines.append(("Slowest /health (ms)", f"{numbers['max_health_ms']:.1f}"))
        out = [f"{name:<40}{value:>12}" for name, value in lines]
        columns = ("mean", "median", "p90", "p99", "max")
        out += ["", f"{'Latency (ms)':<40}" + "".join(f"{name:>11}" for name in columns)]
        for name, title in LATENCIES.items():
            if f"mean_{name}_ms" in numbers:
                row = (numbers[f"{column}_{name}_ms"] for column in columns)
                out.append(f"{title:<40}" + "".join(f"{value:>11.1f}" for value in row))
        if problems := numbers["problems"]:
            out += ["", f"Against the protocol ({len(problems)}):", *problems[:20]]
        return "\n".join(out)


def latencies(reply: Reply) -> dict[str, list[float]]:
    """Milliseconds of one complete reply by name; lists that are empty where it has none.

    "itl" is told per token: an event brings the tokens of one step or of several, which share the
    time since the event before. With several choices it is the time between tokens of any.
    """
    end = [(reply.ended - reply.sent) * 1e3]
    if not reply.times:
        return {"ttft": [], "tpot": [], "itl": [], "gap": [], "e2el": end}
    gaps = [(b - a) * 1e3 for a, b in itertools.pairwise(reply.times)]
    counted = list(zip(gaps, reply.counts[1:], strict=True))
    after = sum(n for _, n in counted)
    return {
        "ttft": [(reply.times[0] - reply.sent) * 1e3],
        "tpot": [sum(gaps) / after] if after else [],
        "itl": [gap / n for gap, n in counted for _ in range(n)],
        "gap": gaps,
        "e2el": end,
    }


def percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """mean, median, standard deviation, percentiles and maximum under vLLM's names."""
    if not values:
        return {}
    ordered = sorted(values)
    told = {
        "mean": statistics.fmean(ordered),
        "median": statistics.median(ordered),
        "std": statistics.pstdev(ordered),
        "max": ordered[-1],
    }
    told |= {f"p{p}": _percentile(ordered, p) for p in (90, 95, 99)}
    return {f"{key}_{name}_ms": value for key, value in told.items()}


def _percentile(ordered: Sequence[float], p: float) -> float:
    place = (len(ordered) - 1) * p / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _keeps(reply: Reply, limits: Mapping[str, float]) -> bool:
    told = latencies(reply)

    def worst(name: str) -> Iterable[float]:
        values = told[name]
        return [statistics.fmean(values)] if name == "itl" and values else values

    return all(value <= limit for name, limit in limits.items() for value in worst(name))
