"""What the library asks of a kind of layer: its `Kind`, and the `Section` of its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from hmf_jax.convert.rows import Row
from hmf_jax.mixers.base import Mixer
from hmf_jax.mixers.parts import Parts
from hmf_jax.options import Backbone

BASE = "*"  # the symbol of full attention: what every layer of a Transformer is
GATE = "gate"  # as the start of a gate: (W_O^T + R(W_V)) / 2, see hmf_jax.priming.stage0


class Sections(Mapping[str, Any]):
    """Settings of kinds by attribute name: {"gka": GKAConfig(...)}. Frozen and hashable."""

    def __init__(self, sections: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()):
        self._sections = {k: v for k, v in sorted(dict(sections).items()) if v is not None}

    def __getitem__(self, name: str) -> Any:
        return self._sections[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sections)

    def __len__(self) -> int:
        return len(self._sections)

    def __hash__(self) -> int:
        return hash(tuple(self._sections.items()))

    def __repr__(self) -> str:
        return f"Sections({self._sections})"


@dataclasses.dataclass(frozen=True)
class Section:
    """The settings of a kind: an attribute of `HybridConfig`, and a section of config.json.

    Attributes:
      attribute: "gka" of `HybridConfig.gka`.
      key: "gka_config" in config.json.
      type: a frozen dataclass; its fields are the keys of the section.
      missing: the error where a layer needs settings and there are none; None: the defaults do.
      ask: the error of priming where they are not given, although the defaults would do.
      geometry: backbone -> copies of its options that the original keeps in the section, under its
        own names. They are checked when they are read, and written again.
      derived: (backbone, number of layers) -> more copies; no shape depends on them, so they are
        written and never compared.
      take: the top level of config.json -> this section as it is stored there, or None. Removes
        what it reads from the top level. Default: the value of `key`.
      read: the section as stored -> the same under the names of the fields.
      write: the settings -> keys to write besides the fields, or in place of them.
      defaults: backbone -> values of fields that are not given, where they are not those of `type`.
      patch: another key of the top level; what it holds is put over this section.
    """

    attribute: str
    key: str
    type: type
    missing: str | None = None
    ask: str | None = None
    geometry: Callable[[Backbone], Mapping[str, Any]] = lambda backbone: {}
    derived: Callable[[Backbone, int], Mapping[str, Any]] = lambda backbone, layers: {}
    take: Callable[[dict[str, Any]], Any] | None = None
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda stored: stored
    write: Callable[[Any], Mapping[str, Any]] = lambda settings: {}
    defaults: Callable[[Backbone], Mapping[str, Any]] = lambda backbone: {}
    patch: str | None = None


Start = Callable[[Sections], Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """Everything that the library asks of a kind of layer.

    A kind is one file of this folder and one line in `hmf_jax.mixers.KINDS`. Where a function takes
    `sections`, those are the settings of all kinds that a model has; a kind looks up its own.

    Attributes:
      symbol: in the layer pattern, "GKA".
      label: for people, "Gated KalmaNet".
      name: of its module in checkpoints: "model.layers.0.<name>.q_proj.weight".
      make: (backbone, sections, *, dtype, rngs) -> a new mixer.
      rows: (backbone, sections) -> its parameters in checkpoints, see `hmf_jax.convert.rows`.
      section: its settings; None: it has none.
      details: sections -> what else to tell people about it, "30 Chebyshev iterations".
      aliases: what the settings of other kinds may call it; the first one is written.
      inner: sections -> the symbols of kinds that it holds inside.
      like: the symbol of another kind with the same parameters. Each can start as a copy of the
        other, and checkpoints may keep the other's `name`.
      starts: symbol of a kind -> what its parameters make of this kind in stage 0 of priming: a
        function sections -> {part of this mixer: part of the other mixer, or `GATE`}. Parts that
        are not named are fresh. A kind that is not here cannot be started from.
      compose: (parts, sections, state, whole) -> one state [1, ...] of the rows' states [N, ...];
        `whole` is the state after an ordinary pass over the whole context, or None. Default: the
        mean of everything.
      fuses: whether `compose` can also add states up (ssm="fuse"), or has nothing to add up.
      sees: (sections, length) -> most keys that a token of a row of `length` tokens attends to.
      uses: (sections, parameter) -> how often a token's forward pass multiplies by that parameter.
      solves: whether it runs a solver, that `num_iter` and `solver` of a call are about.
      appends: names of the arrays of its state that have an entry per token, [B, capacity, ...]:
        what is at an index is never changed by later tokens, so going back to an earlier token only
        shortens them. All other arrays have a fixed size, and are copied to be gone back to.
      layer_type: what `layer_types` of the base models calls such a layer; None: they have none.
      base_name: of its module in checkpoints of base models; None: that of attention.
      base_rows: (backbone, sections, `Family.layout`) -> its parameters in checkpoints of base
        models; None: they are those of `rows`.
      base_keys: sections -> keys of config.json that a base model with such layers has.
    """

    symbol: str
    label: str
    name: str
    make: Callable[..., Mixer]
    rows: Callable[[Backbone, Sections], list[Row]]
    section: Section | None = None
    details: Callable[[Sections], str] = lambda sections: ""
    aliases: tuple[str, ...] = ()
    inner: Callable[[Sections], tuple[str, ...]] = lambda sections: ()
    like: str | None = None
    starts: Mapping[str, Start] = dataclasses.field(default_factory=dict)
    compose: Callable[[Parts, Sections, Any, Any], Any] = lambda parts, sections, state, whole: (
        parts.soup(state)
    )
    fuses: bool = False
    sees: Callable[[Sections, int], int] = lambda sections, length: 0
    uses: Callable[[Sections, str], int] = lambda sections, parameter: 1
    solves: bool = False
    appends: tuple[str, ...] = ()
    layer_type: str | None = None
    base_name: str | None = None
    base_rows: Callable[[Backbone, Sections, str], list[Row]] | None = None
    base_keys: Callable[[Sections], Mapping[str, Any]] = lambda sections: {}

    @property
    def grows(self) -> bool:
        """Whether its state has an entry per token; if not, its size is fixed."""
        return bool(self.appends)
