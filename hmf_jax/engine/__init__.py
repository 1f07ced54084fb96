"""Generation: many requests share a device; everything but the programs is plain Python.

    request    what is asked, what comes back
    turn       what the device does in one go, what comes of it, what requests hear
    scheduler  which request runs where, and what the next turn is
    slots      which row has which slot and which pages
    prefixes   beginnings of prompts that later ones go on from; radix: the tree of them
    pages      who uses which page
    books      what the scheduler keeps: requests, limits, counts, the turn that is being written
    device     runs turns; storage: the arrays, which it alone knows; host: the way to its memory
    programs   everything that is compiled, as pure functions; paged: those over slots and pages
    rows       what a batch carries from program to program
    settings   what the rows were asked for, as arrays
    engine     add, abort, step -> events
    timings    how long turns take
    thread     an engine in a thread of its own
    replay     runs of the scheduler from a file, without a device
    batch      prompts that begin and decode together: no scheduler, no pages
    failure    where logits that are not finite come from
    api        generate, stream, warmup
    pure       sample, for programs of one's own
    scores     score: log-probabilities of given tokens

Tokens only; text is the business of `hmf_jax.text`. Programs are compiled for few sizes. An engine
pads the last piece of a prompt to 64, 256, 1024, ... tokens; one program decodes, however long the
rows are. A batch has a power of two of rows, and pads to powers of two. Everything else (lengths of
prompts, sampling settings, end tokens, limits) is a run-time value; so is num_iter, in a batch once
it differs from the config's.
"""

from hmf_jax.engine.api import (
    enable_compilation_cache,
    generate,
    stream,
    warmup,
)
from hmf_jax.engine.books import Ask, Limits, Stats
from hmf_jax.engine.engine import Engine
from hmf_jax.engine.pure import sample
from hmf_jax.engine.request import (
    GREEDY,
    Output,
    Request,
    Tokens,
    capacity_for,
    check_prompts,
    check_room,
    requests,
)
from hmf_jax.engine.scheduler import Scheduler
from hmf_jax.engine.scores import score
from hmf_jax.engine.settings import Context, Processor
from hmf_jax.engine.thread import EngineThread
from hmf_jax.engine.turn import Event, Finished, New, Scored, Started

__all__ = [
    "GREEDY",
    "Ask",
    "Context",
    "Engine",
    "EngineThread",
    "Event",
    "Finished",
    "Limits",
    "New",
    "Output",
    "Processor",
    "Request",
    "Scheduler",
    "Scored",
    "Started",
    "Stats",
    "Tokens",
    "capacity_for",
    "check_prompts",
    "check_room",
    "enable_compilation_cache",
    "generate",
    "requests",
    "sample",
    "score",
    "stream",
    "warmup",
]
