"""How long turns take, and what the device waits for."""

from hmf_jax.engine.timings import Timing, Timings
from hmf_jax.engine.turn import Chunk, Turn


def test_turns_and_gaps():
    times = iter([1.0, 2.0, 3.0, 5.0, 5.5, 8.0, 20.0, 21.0])
    timings = Timings(lambda: next(times))
    decode, prefill = Turn(0, steps=8), Turn(1, chunk=Chunk(0, 0, 0, 4, 64, (), False))
    timings.enqueued(True)  # at 1: nothing was to do before
    timings.enqueued(False)  # at 2, while the first one runs
    timings.collected(decode)  # at 3
    timings.collected(prefill)  # at 5
    timings.enqueued(True)  # at 5.5: the device has waited
    timings.collected(decode._replace(chunk=prefill.chunk))  # at 8
    timings.rest()
    timings.enqueued(True)  # at 20: somebody came
    timings.collected(Turn(3))  # at 21
    assert timings.take() == [
        Timing("decode", 2.0, 0.0),
        Timing("prefill", 2.0, 0.0),
        Timing("mixed", 2.5, 0.5),
        Timing("copy", 1.0, 0.0),
    ]
    assert timings.take() == []
