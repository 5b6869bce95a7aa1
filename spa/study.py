"""From a choice of method to scores, and from a pruned model to a compensated one: what needs calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from spa.budget.select import Align, MinKeep, Selection, select
from spa.budget.targets import Target
from spa.cache import Cache
from spa.calibration import Calibration
from spa.calibration.trials import held_out
from spa.compensate.closed import refit_readers, shift_means
from spa.compensate.norm import recalibrate
from spa.compensate.rotation import Mixer, Rotation, find_rotations
from spa.compensate.walk import refit_sites
from spa.cost import Metric
from spa.criteria import CRITERIA, normalise
from spa.errors import TargetError
from spa.evidence import Evidence, Vector
from spa.executors.collect import Setup
from spa.executors.segments import Segments
from spa.gradients import Gradients
from spa.groups import Analysis, Group
from spa.measured import Measured
from spa.methods import Method
from spa.options import Scope, choose
from spa.progress import Progress, silent
from spa.removal import Mask, kept_without
from spa.rewrite import rewritten
from spa.sensitivity import curves, divergence, few, outputs
from spa.sites import constant_of, exchange
from spa.stitch import stitch
from spa.twin import Twin

SAMPLES = 256
"""On which the outputs of the pruned model are compared with the original's."""
FEW = 64
"""... where the weights come without any forward pass, and comparing would take longest."""
LARGEST = 64 << 20
"""Bytes of the original's outputs that are kept for the next query."""


@dataclass(frozen=True)
class Scored:
    """What selection needs."""

    scores: Mapping[str, Vector]
    """Importance of each unit, per group."""
    curves: Mapping[str, Vector] | None
    """Loss after the first k units of a group have left."""


@dataclass(frozen=True)
class Fit:
    """How well the pruned model does what the original does, on calibration samples."""

    calibration: str
    """What the samples are."""
    samples: int
    note: str
    error_before: float
    """Squared error of the outputs relative to their variance, before compensation."""
    error_after: float
    """... and after it."""
    recalibrated: bool
    """Whether norms were re-estimated."""


Removed = Sequence[tuple[Group, Sequence[int]]]


@dataclass(frozen=True)
class Query:
    """What is wanted, whatever the method."""

    analysis: Analysis
    targets: Sequence[Target]
    scope: Scope
    kinds: Sequence[str]
    ignore: Sequence[str]
    align: Align
    min_keep: MinKeep | None
    loss: Any = "auto"
    """Of which derivatives are taken, see `spa.gradients`."""
    widths: Mapping[str, Sequence[int]] | None = None
    """Units worth keeping per group, see `spa.budget.select`."""
    extend: Callable[[Analysis], Analysis] = field(default=lambda analysis: analysis)
    """Gives the analysis of what is left between steps the metrics that this one has."""


class Study:
    """One query answered by one method.

    Raises:
        TargetError: the options leave nothing to prune.
    """

    def __init__(
        self,
        query: Query,
        method: Method,
        seed: int = 0,
        data: Calibration | None = None,
        setup: Setup | None = None,
        cache: Cache | None = None,
        progress: Progress = silent,
    ) -> None:
        self.query, self.method, self.seed, self.data = query, method, seed, data
        self.analysis = query.analysis
        self.setup, self.cache, self.progress = setup or Setup(), cache or Cache(), progress
        self.groups = self._choose()
        self.measured, self.trial = self._measured()
        derivatives = (
            None
            if data is None
            else Gradients(self.analysis, self.groups, data, query.loss, self.setup, seed, self.cache, progress)
        )
        self.evidence = Evidence(self.analysis, seed, self.measured, derivatives)

    def _measured(self) -> tuple[Measured | None, Calibration | None]:
        """Statistics, and other samples for trials: on those that were fit on, what leaves seems to cost too little."""
        if self.data is None:
            return None, None
        if not self.method.sensitivity:
            return Measured(self.analysis, self.groups, self.data, self.setup, self.cache, self.progress), None
        fit, test = held_out(self.data)
        given = self.data.samples
        return Measured(self.analysis, self.groups, fit, self.setup, self.cache, self.progress, given), test

    def _choose(self) -> list[Group]:
        query, method = self.query, self.method
        if query.kinds or not method.kinds:
            return choose(self.analysis, query.scope, query.kinds, query.ignore)
        try:
            return choose(self.analysis, query.scope, method.kinds, query.ignore)
        except TargetError as error:
            kinds = " and ".join(method.kinds)
            raise TargetError(
                f"method {method.name} is about units of kind {kinds}, and this model has none that can be pruned: "
                "choose kinds with --kinds, or another method"
            ) from error

    def score(self) -> Scored:
        """Importance of every unit of every group."""
        method = self.method
        raw = self._raw()
        if method.allocation not in ("efficient", "knapsack") or self.measured is None or self.trial is None:
            return Scored(normalise(raw, self.groups, method.normalisation), None)
        raw |= {name: rotation.scores(raw[name]) for name, rotation in self.rotations.items()}
        scores = normalise(raw, self.groups, method.normalisation)
        bent = curves(self.analysis, self.groups, raw, self.measured, self.trial, self.rotations, self.progress)
        return Scored(scores, bent)

    def _raw(self) -> dict[str, Vector]:
        """What the criterion says; looked up where that takes a look at samples."""
        method, criterion = self.method, CRITERIA[self.method.criterion]

        def take() -> dict[str, Vector]:
            return {g.name: criterion.score(g, self.evidence, method.aggregation) for g in self.groups}

        if self.data is None or criterion.needs == "weights" or not isinstance(self.query.loss, str):
            return take()
        groups = [[g.name, g.units] for g in self.groups]
        fit = self.data.digest if self.measured is None else self.measured.data.digest
        request = [criterion.name, method.aggregation, self.query.loss, self.seed, groups, fit]
        known = self.cache.get("scores", self.data.digest, request)
        if known is None:
            found = take()
            self.cache.put("scores", self.data.digest, request, {str(k): v for k, v in enumerate(found.values())})
            return found
        return {g.name: known[str(k)] for k, g in enumerate(self.groups)}

    @cached_property
    def rotations(self) -> Mapping[str, Rotation]:
        """Groups whose units are mixed within attention heads when some of them leave."""
        if self.method.compensate not in ("obs", "stitch") or self.measured is None:
            return {}
        return find_rotations(self.groups, self.measured)

    def select(
        self,
        scored: Scored,
        spare: Mapping[Metric, float] | None = None,
        targets: Sequence[Target] | None = None,
    ) -> Selection:
        """Which units leave; `targets` in place of the query's.

        Raises:
            TargetError: a target cannot be reached.
        """
        query = self.query
        chosen = select(
            self.analysis,
            self.groups,
            scored.scores,
            query.targets if targets is None else targets,
            allocation=self.method.allocation,
            align=query.align,
            min_keep=query.min_keep,
            spare=spare,
            curves=scored.curves,
            widths=query.widths,
        )
        return self.refine(chosen)

    def refine(self, chosen: Selection) -> Selection:
        """Exchange units of equal number where the criterion knows better than its single scores."""
        exchange = CRITERIA[self.method.criterion].exchange
        if exchange is None or self.data is None:
            return chosen
        better = [
            (group, tuple(exchange(group, self.evidence, np.array(units, dtype=np.int64)).tolist()))
            for group, units in chosen.removed
        ]
        return replace(chosen, removed=tuple(better))

    def compensate(
        self, kept: Mask, twin: Twin, removed: Removed, ready: Callable[[], object] = lambda: None
    ) -> Fit | None:
        """Change the weights of the pruned model `twin` so that it does what the original does.

        `ready` is called when it has its final structure and most of the work is still to be done.
        """
        method = self.method
        if self.data is None or self.measured is None:
            return None
        probe, reference = self._reference
        before = self._error(reference, twin, probe)
        self.adjust(kept, twin, removed, norms=method.recalibrate == "norm", ready=ready)
        after = self._error(reference, twin, probe)
        again = method.recalibrate == "norm"
        if method.recalibrate == "auto":
            undo = snapshot(twin)
            recalibrate(self.analysis, kept, twin, self.data, self.setup, self.progress)
            new = self._error(reference, twin, probe)
            again = new < after
            if again:
                after = new
            else:
                undo()
        return Fit(self.data.name, self.data.samples, self.data.note, before, after, again)

    def adjust(
        self,
        kept: Mask,
        twin: Twin,
        removed: Removed,
        *,
        draft: bool = False,
        norms: bool = False,
        ready: Callable[[], object] = lambda: None,
    ) -> None:
        """The weights of `compensate` alone: no outputs are compared.

        Args:
            kept: positions that are left.
            twin: the pruned model.
            removed: units that left.
            draft: the closed form (`stitch`) where the method refits on the pruned prefix, which takes long.
            norms: also re-estimate the norms.
            ready: see `compensate`.
        """
        assert self.data is not None
        assert self.measured is not None
        how = self.method.compensate
        if how == "bias":
            shift_means(twin, self.measured, removed)
        elif how == "obs-dense":
            refit_readers(twin, self.measured, removed)
        elif how == "stitch" or (draft and how == "obs"):
            stitch(twin, self.measured, kept, removed, self.rotations)
        elif how == "obs":
            mixer = Mixer(self.measured, self.rotations, kept)
            refit_sites(
                self.analysis, kept, twin, self.data, self.setup, mixer=mixer, ready=ready, progress=self.progress
            )
        if norms:
            recalibrate(self.analysis, kept, twin, self.data, self.setup, self.progress)

    @cached_property
    def _reference(self) -> tuple[Calibration, list[Vector]]:
        """Samples on which the pruned model is compared, and the original's outputs there."""
        assert self.data is not None
        probe = few(self.data, FEW if self.method.compensate == "stitch" else SAMPLES)
        request = [self.setup.batch, self.setup.provider, self.setup.threads]
        known = self.cache.get("outputs", probe.digest, request)
        if known is not None:
            return probe, [known[str(k)] for k in range(len(known))]
        found = outputs(self._parts(self.analysis.coupling.model), probe, self.setup.batch)
        if sum(array.nbytes for array in found) <= LARGEST:
            self.cache.put("outputs", probe.digest, request, {str(k): array for k, array in enumerate(found)})
        return probe, found

    def _parts(self, model: ir.Model) -> Segments:
        return Segments.of(model, self.setup.provider, self.setup.threads)

    def _error(self, reference: list[Vector], twin: Twin, data: Calibration) -> float:
        return divergence(reference, outputs(self._parts(twin.model), data, self.setup.batch))


def best_of(studies: Sequence[Study]) -> Study:
    """The study whose method does best on samples that it was not fit on; it goes on with all samples."""
    first, losses = studies[0], []
    assert first.data is not None
    fit, test = first.data.split(min(SAMPLES, max(1, first.data.samples // 5)))
    reference = outputs(first._parts(first.analysis.coupling.model), test, first.setup.batch)
    for study in studies:
        trial = Study(study.query, study.method, study.seed, fit, study.setup, study.cache, study.progress)
        selection = trial.select(trial.score())
        kept = kept_without(trial.analysis, selection.removed)
        twin = rewritten(trial.analysis, kept)
        trial.compensate(kept, twin, selection.removed)
        losses.append(trial._error(reference, twin, test))
    return studies[int(np.argmin(losses))]


def snapshot(twin: Twin) -> Callable[[], None]:
    """Remember all weights; the call that is returned brings them back, and makes biases added since void."""
    model = twin.model
    values = [*model.graph.initializers.values(), *(n.outputs[0] for n in model.graph if n.op_type == "Constant")]
    tensors = [(v, constant_of(v)) for v in values]
    kept = [(v, t.numpy().copy()) for v, t in tensors if t is not None and t.dtype.is_floating_point()]

    before = set(twin.made)

    def restore() -> None:
        for value, array in kept:
            exchange(value, array)
        for value, tensor in twin.made.items():
            if value not in before:
                exchange(value, tensor.numpy())

    return restore
