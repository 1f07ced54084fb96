"""The kinds of layers: `KINDS` is the list of them, and a file of this folder is all of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from flax import nnx

from hmf_jax.mixers.attention import (
    FULL,
    WINDOWED,
    Attention,
    AttentionState,
    SWAConfig,
    WindowState,
)
from hmf_jax.mixers.base import Context, Mixer
from hmf_jax.mixers.bmojo import BMF, BMojo, BMojoConfig, BMojoState
from hmf_jax.mixers.gdn import GDN, GatedDeltaNet, GDNConfig, GDNState
from hmf_jax.mixers.gka import GKA, GatedKalmaNet, GKAConfig, GKAState
from hmf_jax.mixers.kind import BASE, GATE, Kind, Section, Sections
from hmf_jax.mixers.mamba2 import M2, Mamba2, Mamba2Config, Mamba2State
from hmf_jax.mixers.parts import Parts
from hmf_jax.moved import moved
from hmf_jax.options import MOST_LAYERS, Backbone, nearest, shown

__all__ = [
    "BASE",
    "GATE",
    "KINDS",
    "Attention",
    "AttentionState",
    "BMojo",
    "BMojoConfig",
    "BMojoState",
    "Context",
    "GDNConfig",
    "GDNState",
    "GKAConfig",
    "GKAState",
    "GatedDeltaNet",
    "GatedKalmaNet",
    "Kind",
    "Mamba2",
    "Mamba2Config",
    "Mamba2State",
    "Mixer",
    "Parts",
    "SWAConfig",
    "Section",
    "Sections",
    "WindowState",
    "all_sections",
    "check_symbols",
    "fused_symbols",
    "kinds_within",
    "known_symbols",
    "make_mixer",
    "same_parameters",
    "sections_of",
    "split_symbol",
    "start",
]

# Layer symbol -> kind. Everything looks kinds up here, when it needs them.
KINDS: dict[str, Kind] = {kind.symbol: kind for kind in (FULL, WINDOWED, GKA, GDN, M2, BMF)}


def make_mixer(
    symbol: str, config: Backbone, sections: Sections, *, dtype, rngs: nnx.Rngs
) -> Mixer:
    """A new mixer of the kind with this symbol: "*", "SWA", "GKA", "GDN", "M2", "BMF", ..."""
    return KINDS[symbol].make(config, sections, dtype=dtype, rngs=rngs)


def all_sections() -> list[Section]:
    """The sections of config.json that kinds have."""
    return [kind.section for kind in KINDS.values() if kind.section is not None]


def sections_of(
    symbols: Iterable[str], sections: Mapping[str, object], backbone: Backbone
) -> Sections:
    """These sections, and the defaults of what layers of these kinds, or kinds inside them, need.

    Raises ValueError for settings that have no defaults.
    """
    found, needed = dict(sections), [symbol for symbol in KINDS if symbol in set(symbols)]
    for symbol in needed:  # grows while it is read
        section = KINDS[symbol].section
        if section is not None and found.get(section.attribute) is None:
            if section.missing is not None:
                raise ValueError(section.missing)
            found[section.attribute] = section.type(**section.defaults(backbone))
        needed += KINDS[symbol].inner(Sections(found))
    return Sections(found)


def kinds_within(symbols: Iterable[str], sections: Sections) -> list[Kind]:
    """The kinds of these layers and the kinds that they hold inside, each once."""
    found = dict.fromkeys(symbols)
    inner = [within for symbol in found for within in KINDS[symbol].inner(sections)]
    return [KINDS[symbol] for symbol in found | dict.fromkeys(inner)]


def fused_symbols() -> dict[str, tuple[str, str | None]]:
    """The symbols of stage 1: the kind of mixer that is kept, and its teacher in the same layer.

    "*DA" has no teacher: the same attention is its own. "GKA*" learns from attention, "GDN>GKA"
    from another kind; a kind can learn from what it can start from.
    """
    found: dict[str, tuple[str, str | None]] = {f"{BASE}DA": (BASE, None)}
    pairs = [
        (symbol, source)
        for symbol, kind in KINDS.items()
        for source in ((kind.like,) if kind.like else tuple(kind.starts))
    ]
    found |= {f"{symbol}{BASE}": (symbol, BASE) for symbol, source in pairs if source == BASE}
    return found | {f"{source}>{s}": (s, source) for s, source in pairs if source != BASE}


def split_symbol(symbol: str) -> tuple[str, str | None]:
    """The kind of a layer symbol and that of its teacher: "GKA*" -> ("GKA", "*").

    A layer without a teacher of its own is one of a plain symbol, or "*DA".
    """
    return (symbol, None) if symbol in KINDS else fused_symbols().get(symbol, (symbol, None))


def known_symbols() -> list[str]:
    """Every symbol that a layer pattern may have."""
    return [*KINDS, *fused_symbols()]


def check_symbols(symbols: Sequence[str]) -> None:
    """Raises ValueError unless these are the symbols of the layers of a model."""
    if not symbols:
        raise ValueError("layer_kinds is empty; give one symbol per layer")
    if len(symbols) > MOST_LAYERS:
        raise ValueError(f"a model can have at most {MOST_LAYERS} layers, this one has more")
    known = known_symbols()
    for i, symbol in enumerate(symbols):
        if symbol not in known:
            raise ValueError(
                f"layer {i} has the unknown symbol {shown(symbol)}{nearest(symbol, known)}; "
                f"known are {', '.join(known)}"
            )


def same_parameters(one: str, other: str) -> bool:
    """Whether mixers of these kinds have the same parameters: one can be a copy of the other."""
    return one == other or KINDS[one].like == other or KINDS[other].like == one


def start(symbol: str, source: str, sections: Sections) -> Mapping[str, str] | None:
    """Part of a mixer of kind `symbol` -> part of one of kind `source` that it starts from.

    None if there is no way. `GATE` in place of a part stands for a mean of several.
    """
    starts = KINDS[symbol].starts
    for other in (source, KINDS[source].like):
        if other is not None and other in starts:
            return starts[other](sections)
    return None


__getattr__ = moved(__name__, {"RECURRENT": "is gone; hmf_jax.mixers.KINDS lists all kinds"})
