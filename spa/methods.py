"""Published methods as named triples of criterion, budget rule and compensation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from spa.budget.select import Allocation
from spa.criteria import AGGREGATIONS, CRITERIA, NORMALISATIONS, Aggregation, Normalisation
from spa.errors import UsageError

Compensation = Literal["none", "bias", "obs", "obs-dense", "stitch"]
Recalibration = Literal["none", "norm", "auto"]
CHOICES: Mapping[str, Sequence[str]] = {
    "criterion": list(CRITERIA),
    "aggregation": AGGREGATIONS,
    "normalisation": NORMALISATIONS,
    "allocation": get_args(Allocation),
    "compensate": get_args(Compensation),
    "recalibrate": get_args(Recalibration),
}
"""What each part of a method may be."""


@dataclass(frozen=True)
class Method:
    """What a name stands for; every part can be overridden."""

    text: str
    """One line, with the source."""
    criterion: str
    aggregation: Aggregation = "mean"
    normalisation: Normalisation = "none"
    allocation: Allocation = "global"
    compensate: Compensation = "none"
    recalibrate: Recalibration = "none"
    sensitivity: bool = False
    """Weigh the losses of groups by what trials show at the model's outputs."""
    kinds: tuple[str, ...] = ()
    """Kinds of units it was made for; all if empty."""
    name: str = ""
    """Of the method, or of the criterion where parts were chosen one by one."""

    @property
    def needs_data(self) -> str:
        """Which part of it needs calibration samples; empty if none does."""
        if CRITERIA[self.criterion].needs != "weights":
            return f"criterion {self.criterion}"
        for part, value in (("compensate", self.compensate), ("recalibrate", self.recalibrate)):
            if value != "none":
                return f"{part}={value}"
        return "weighing layers" if self.sensitivity else ""

    def settings(self) -> dict[str, Any]:
        """For the plan."""
        body = asdict(self)
        return {"method": self.name} | {k: body[k] for k in body if k not in ("text", "kinds", "name")}


_TABLE: dict[str, Method] = {
    "spa-l1": Method(
        "SPA with group L1 (arXiv 2403.18955), norms re-estimated",
        "l1",
        "sum",
        "sum",
        recalibrate="norm",
    ),
    "obspa": Method(
        "exact structured OBS, widths by loss per cost, refit on the pruned prefix",
        "obspa",
        allocation="efficient",
        compensate="obs",
        recalibrate="none",
        sensitivity=True,
    ),
    "obspa-paper": Method(
        "SPA's OBSPA as in the paper (arXiv 2403.18955): same share of each group, update, norms re-estimated",
        "obspa-paper",
        "sum",
        "sum",
        "uniform",
        "obs-dense",
        "norm",
    ),
    "vbp": Method(
        "Variance-Based Pruning (arXiv 2507.12988): MLP neurons by raw variance, means to biases",
        "variance",
        compensate="bias",
        kinds=("neuron",),
    ),
    "flap": Method(
        "FLAP (arXiv 2312.11983): standardised fluctuation, means to biases",
        "fluctuation",
        normalisation="gaussian",
        compensate="bias",
    ),
    "ob2c": Method(
        "DVBP and OB2C (arXiv 2608.17657): denoised variance, closed-form weights and bias",
        "feature-moment",
        compensate="obs-dense",
    ),
    "fisher-obs": Method(
        "Fisher information of gates (arXiv 2204.09656), widths by loss per cost, refit on the pruned prefix",
        "fisher",
        allocation="efficient",
        compensate="obs",
    ),
    "kwon": Method(
        "Kwon et al. (arXiv 2204.09656): Fisher information of heads and neurons, rearranged, then tuned (here: refit)",
        "fisher",
        allocation="efficient",
        compensate="obs-dense",
        kinds=("head", "kv-head", "neuron"),
    ),
    "hap": Method(
        "HAP (arXiv 2101.08940) on gates: second derivatives, one threshold, norms re-estimated",
        "hap",
        recalibrate="norm",
    ),
    "knapsack": Method(
        "Knapsack Pruning (arXiv 2002.08258): loss by first-order Taylor, coupled layers as one, best widths",
        "taylor-filters",
        "sum",
        allocation="knapsack",
    ),
    "michel": Method(
        "Michel et al. (arXiv 1905.10650): heads by the gradient of their gate",
        "heads",
        kinds=("head", "kv-head"),
    ),
    "minitron-width": Method(
        "Minitron's width pruning (arXiv 2407.14679): activation norms, same share of each group",
        "activation",
        allocation="uniform",
    ),
    "2ssp": Method(
        "2SSP's first stage (arXiv 2501.17771): neurons by activation norm, same share of each group",
        "activation-l2",
        allocation="uniform",
        kinds=("neuron",),
    ),
    "amp": Method("AMP (arXiv 2504.21174): contributions, same share of each group", "amp", allocation="uniform"),
    "cfsp": Method("CFSP's fine stage (COLING 2025), same share of each group", "cfsp", allocation="uniform"),
}
METHODS = {name: replace(method, name=name) for name, method in _TABLE.items()}
"""`auto` is no entry: it tries several of these and keeps the one with the least loss on held-out samples."""

AUTO = ("obspa", "ob2c", "flap")
"""What `auto` tries."""


PLAIN = Method("l2 norm of weights, nothing compensated", "l2", normalisation="mean", name="l2")


def resolve(name: str | None, **parts: str | None) -> list[Method]:
    """The methods to try, with the given parts in place of theirs: one, or several for `auto`.

    Raises:
        UsageError: a name is unknown.
    """
    given = {key: value for key, value in parts.items() if value is not None}
    for key, value in given.items():
        known = CHOICES[key]
        if value not in known:
            raise UsageError(f"unknown {key} {value!r}; choose one of {', '.join(known)}")
    if name is None:
        return [replace(PLAIN, **{**given, "name": given.get("criterion", "l2")})]  # type: ignore[arg-type]  # names and values were checked
    if name != "auto" and name not in METHODS:
        hint = f" ({name} is a criterion: --criterion {name})" if name in CHOICES["criterion"] else ""
        raise UsageError(f"unknown method {name!r}{hint}; choose one of {', '.join(METHODS)}, or auto")
    names = AUTO if name == "auto" else (name,)
    return [replace(METHODS[n], **{**given, "name": n}) for n in names]  # type: ignore[arg-type]  # names and values were checked
