"""Generation: requests share the rows of a batch; everything but the programs is plain Python.

    request    what is asked, what comes back
    scheduler  which request runs where, and what the device does next
    slots      which row has which slot and which pages
    prefixes   beginnings of prompts that later ones go on from; radix: the tree of them
    pages      who uses which page
    books      what the scheduler keeps: requests, limits, counts, the turn that is being written
    programs   everything that is compiled, as pure functions
    settings   what the rows were asked for, as arrays
    buffers    the rows on the device: the only part that knows how their memory is laid out
    engine     add, abort, step -> events
    thread     an engine in a thread of its own
    batch      prompts that begin and decode together, without an engine
    failure    where logits that are not finite come from
    api        generate, stream, warmup
    pure       sample, for programs of one's own
    scores     score: log-probabilities of given tokens

Tokens only; text is the business of `hmf_jax.text`. Programs are compiled per bucket: rows and
capacity are rounded up to powers of two, prompts are cut into chunks of `prefill_chunk` tokens, the
last one rounded up to a power of two. Everything else (prompt lengths, sampling settings, end
tokens, limits) is a run-time value; so is num_iter once it differs from the config's.
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
