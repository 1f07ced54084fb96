"""What the load generator sends: HTTP requests, those that misbehave on purpose among them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hmf_jax.serving.load.reply import Reply

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

FAULTS = {
    "close_queued": "closes the connection as soon as the request is sent",
    "close_prefill": "closes it `wait` seconds later, if nothing has come by then",
    "close_first": "closes it at the first event with tokens",
    "close_middle": "closes it at the second event with tokens",
    "close_last": "closes it at the event that says why the choice ended",
    "close_end": "closes it after the end instead of using it again",
    "never_read": "reads nothing for `wait` seconds, then closes",
    "slow_body": "sends the body at 10 bytes per second",
}

Body = Mapping[str, Any] | bytes


@dataclasses.dataclass(frozen=True)
class Call:
    """One HTTP request.

    Attributes:
      body: JSON object, or bytes that are sent as they are; or a function that makes it from the
        replies to the earlier calls of the same user.
      fault: how the client misbehaves, a name of `FAULTS`.
      wait: seconds, for faults.
      expect: statuses that are right; empty: 200. Where answers are generated 429 and 503 are, too:
        there may be no room.
      seconds: longest time until the answer begins; more is a problem. None: any.
      about: what the call is, for messages and for those who compare replies.
    """

    body: Body | Callable[[Sequence[Reply]], Body] = b""
    path: str = CHAT
    method: str = "POST"
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fault: str | None = None
    wait: float = 0.05
    expect: Sequence[int] = ()
    seconds: float | None = None
    about: Any = None

    def __post_init__(self) -> None:
        if self.fault is not None and self.fault not in FAULTS:
            raise ValueError(f"fault={self.fault!r} is none of {', '.join(FAULTS)}.")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which calls are made, and when.

    Attributes:
      users: the calls of each user, who waits for a reply before the next call.
      connections: most users at a time; None: no limit.
      rate: users per second, who come at random times (a Poisson process); None: all at once.
      seed: of these times.
      retries: how often a call is made again that the server had no room for (429 or 503), after
        what it says in Retry-After, but at most a second.
      timeout: seconds after which a call is given up.
      headers: of all calls, such as {"Authorization": "Bearer KEY"}.
      watch: ask /health ten times per second meanwhile; see `Report.health`.
    """

    users: Sequence[Sequence[Call]]
    connections: int | None = None
    rate: float | None = None
    seed: int = 0
    retries: int = 0
    timeout: float = 600.0
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    watch: bool = False

    def __post_init__(self) -> None:
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate={self.rate!r} must be more than 0 users per second.")
        if self.connections is not None and self.connections < 1:
            raise ValueError(f"connections={self.connections!r} must be 1 or more.")


def encoded(body: Body) -> bytes:
    """The bytes of a body."""
    return body if isinstance(body, bytes) else json.dumps(body).encode()
