"""Normalisations: a statistic over an axis makes its atoms `statistic` instead of `exact`."""

from __future__ import annotations

from spa.rules.base import FACTOR, Leaving, Op, Rule, Zero, register
from spa.rules.notation import Attr, Einsum, einsum

SCALED = Zero(any_of=(1,), all_of=(2,))
"""normalised * scale + bias: zero where scale and bias are."""

_STAT: Leaving = "stat"


def _batch_norm(op: Op) -> None:
    """A stored statistic is one factor per channel, so that all other axes pass; in training it runs over them.

    Training on constants is how weights are standardised: (1, out channels, in channels x kernel).
    """
    x = op.input(0)
    if op.attr("training_mode", 0) and x is not None and x.constant:
        over: dict[str, Leaving] = {"b": _STAT, "...": _STAT}
        Einsum("b c ..., c, c, c, c -> b c ..., c, c", leaving=over, roles={"c": "channel"})(op)
    elif op.attr("training_mode", 0):
        Einsum("b c ~, c, c, c, c -> b c ~, c, c, c, c", leaving={"b": _STAT}, roles={"c": "channel"})(op)
    else:
        Einsum("b c ..., c, c, c, c -> b c ..., c, c, c, c", roles={"c": "channel"})(op)


register(
    "BatchNormalization",
    Rule(_batch_norm, "b c ..., c, c, c, c -> b c ..., c, c, c, c", Zero(any_of=(1,), all_of=(2,), outputs=(0,))),
)
# statistics run over the trailing dimensions, never over channels; GroupNorm is exported as this between reshapes
register("InstanceNormalization", einsum("b c ..., c, c -> b c ...", zero=SCALED, leaving={"...": _STAT}))
for _since, _scale in ((18, "g"), (21, "(g c)")):
    register(
        "GroupNormalization",
        einsum(
            f"b (g c) ~, {_scale}, {_scale} -> b (g c) ~",
            zero=SCALED,
            leaving={"c": _STAT},
            sizes={"g": Attr("num_groups")},
        ),
        since=_since,
    )


def _layer_norm(op: Op) -> None:
    x = op.input(0)
    rank = len(x.dims) if x else 0
    count = rank - int(op.attr("axis", -1)) % max(rank, 1)
    names = [f"c{k}" for k in range(count)]
    c, ones = " ".join(names), " ".join("1" for _ in names)
    text = f"... {c}, {c}, {c} -> ... {c}, ... {ones}, ... {ones}"
    Einsum(text, leaving=dict.fromkeys(names, _STAT), roles=dict.fromkeys(names, "hidden"))(op)


_LAYER_NORM = Rule(_layer_norm, "... c, c, c -> ... c, with a statistic over c", SCALED)
register("LayerNormalization RMSNormalization SimplifiedLayerNormalization", _LAYER_NORM)

_HIDDEN = {"c": "hidden"}
register(
    "SkipLayerNormalization",
    einsum(
        "... c, ... c, c, c, c -> ... c, ... 1, ... 1, ... c",
        zero=Zero(any_of=(2,), all_of=(3,), outputs=(0,)),
        leaving={"c": _STAT},
        roles=_HIDDEN,
    ),
    domain="com.microsoft",
)
register(
    "SkipSimplifiedLayerNormalization",
    einsum(
        "... c, ... c, c, c -> ... c, ... 1, ... 1, ... c",
        zero=Zero(any_of=(2,), outputs=(0,)),
        leaving={"c": _STAT},
        roles=_HIDDEN,
    ),
    domain="com.microsoft",
)
register(
    "EmbedLayerNormalization",
    einsum(
        "~, ~, ~ c, ~ c, ~ c, c, c, ~, ~ -> ~ c, ~, ~ c",
        zero=Zero(any_of=(5,), all_of=(6,), outputs=(0,)),
        leaving={"c": _STAT},
        roles=_HIDDEN,
    ),
    domain="com.microsoft",
)
register(
    "QEmbedLayerNormalization",
    einsum(
        f"~, ~, ~ c, ~ c, ~ c, c, c{', ~' * 11} -> ~ c, ~",
        zero=Zero(any_of=(5,), all_of=(6,), outputs=(0,)),
        leaving={"c": _STAT},
        roles=_HIDDEN,
        points={5: 16, 6: 17},
    ),
    domain="com.microsoft",
)


def _over_axes(op: Op) -> None:
    """LpNormalization, MeanVarianceNormalization: a statistic over the named axes, everything passes."""
    x = op.input(0)
    rank = len(x.dims) if x else 0
    axes = op.attr("axes") or ([0, 2, 3] if op.node.op_type == "MeanVarianceNormalization" else [op.attr("axis", -1)])
    normalised = {int(a) % rank for a in axes}
    names = [f"d{k}" for k in range(rank)]
    text = f"{' '.join(names)} -> {' '.join(names)}"
    Einsum(text, leaving={n: _STAT for k, n in enumerate(names) if k in normalised})(op)


register("LpNormalization MeanVarianceNormalization", Rule(_over_axes, "all axes pass, a statistic over `axes`"))


def _lrn(op: Op) -> None:
    x = op.input(0)
    Einsum("... -> ...")(op)
    if x is not None and len(x.dims) > 1:
        op.freeze(x.dims[1], "LRN mixes neighbouring channels")


register("LRN", Rule(_lrn, "all axes pass, the channel axis is frozen", FACTOR))
