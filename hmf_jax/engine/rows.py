"""What a batch of rows carries from program to program, and how its programs are compiled."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hmf_jax.model import HybridLM
from hmf_jax.packed import PackedModel
from hmf_jax.state import ModelState

Appends = tuple[tuple[str, ...], ...]  # `Kind.appends` of each layer

# Why a row has ended; RUNNING: it has not. ERROR: its logits are not finite.
RUNNING, EOS, LENGTH, CAPACITY, STOPPED, ERROR = range(6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What a batch carries from program to program; donated to each of them.

    Attributes:
      state: of the model.
      seen: [B, V] bool, tokens in the row, for the repetition penalty.
      token: [B] int32, the newest token; one that was generated is not yet in the state.
      reason: [B] int32, why the row has ended (`EOS`, ...), 0 while it runs.
      left: [B] int32, tokens that the row may still produce.
      made: [B] int32, tokens that the request has produced.
      generated: [B, V] int32, how often it has produced each; None where nobody asks.
    """

    state: ModelState
    seen: jax.Array
    token: jax.Array
    reason: jax.Array
    left: jax.Array
    made: jax.Array
    generated: jax.Array | None = None


class Top(NamedTuple):
    """The most likely tokens, the first one first: ids and logprobs [..., n]."""

    ids: jax.Array
    logprobs: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """How the results of a program lie on a mesh. Equal ones are one object.

    Attributes:
      rows: `Rows` of shardings.
      other: sharding of everything else: whole on every device.
    """

    rows: Rows
    other: NamedSharding

    @classmethod
    def of(
        cls,
        packed: PackedModel,
        size: int,
        capacity: int,
        pages: tuple[int, int] | None = None,
        marked: bool = False,
    ) -> Layout | None:
        """For so many rows of this model; None without a mesh.

        `pages`: see `HybridLM.init_state`; `marked`: of what `hmf_jax.engine.paged.save` returns.
        """
        key = packed.structure, size, capacity, pages, marked
        if key not in _layouts:
            model = packed.model()
            found = None
            if model.mesh is not None:
                found = cls._of(model, model.abstract_state(size, capacity, pages=pages))
                if marked:
                    rows = map_appended(lambda x: None, found.rows, model.appends)
                    found = cls(rows, found.other)
            _layouts[key] = found
        return _layouts[key]

    @classmethod
    def _of(cls, model: HybridLM, state: ModelState) -> Layout:
        assert model.mesh is not None
        whole: Any = NamedSharding(model.mesh, PartitionSpec())
        return cls(Rows(jax.tree.map(lambda x: x.sharding, state), *[whole] * 5), whole)


_layouts: dict[Any, Layout | None] = {}


class Program:
    """A pure function of and to `Rows`, and what it was compiled to: a program for each layout.

    Args:
      function: returns `Rows` first.
      others: how many arrays, or trees of them, it returns after them.
      options: of `jax.jit`.
    """

    def __init__(self, function: Callable[..., Any], others: int, **options: Any):
        self._function, self._options, self._others = function, options, others
        self._compiled: dict[tuple[Layout | None, bool], Any] = {}
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function, as part of whatever is being traced."""
        return self._function(*args, **kwargs)

    def on(self, layout: Layout | None, generated: bool = False) -> Any:
        """The function compiled for this layout, of `Rows` with or without `generated`."""
        key = layout, generated
        if key not in self._compiled:
            options = dict(self._options)
            if layout is not None:
                counts = layout.other if generated else None
                rows = dataclasses.replace(layout.rows, generated=counts)
                others = (layout.other,) * self._others
                options["out_shardings"] = (rows, *others) if others else rows
            self._compiled[key] = jax.jit(self._function, **options)
        return self._compiled[key]

    def _cache_size(self) -> int:
        """How many programs there are."""
        return sum(program._cache_size() for program in self._compiled.values())


def program(others: int, **options: Any) -> Callable[..., Program]:
    """Makes a `Program` of a function."""
    return functools.partial(Program, others=others, **options)


def map_appended(do: Callable[[jax.Array], Any], rows: Rows, appends: Appends) -> Rows:
    """`do` to the arrays of each layer that `appends` names."""
    layers = tuple(
        dataclasses.replace(layer, **{name: do(getattr(layer, name)) for name in names})
        for layer, names in zip(rows.state.layers, appends, strict=True)
    )
    return dataclasses.replace(rows, state=dataclasses.replace(rows.state, layers=layers))


def as_dicts(ids: np.ndarray, logprobs: np.ndarray) -> list[dict[int, float]]:
    """The most likely tokens of each place, [n, k] each: {token: logprob}, the first one first."""
    pairs = zip(ids.tolist(), logprobs.tolist(), strict=True)
    return [dict(zip(*pair, strict=True)) for pair in pairs]
