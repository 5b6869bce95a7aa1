"""What derivatives say about a model, each taken once, kept, and found again in the cache. Needs torch when asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spa.cache import Cache
from spa.calibration import Calibration
from spa.executors.collect import Setup
from spa.groups import Analysis, Group
from spa.progress import Progress, silent

if TYPE_CHECKING:
    from spa.interpreter.statistics import Task

Array = NDArray[np.float64]
SAMPLES = 256
"""Second derivatives look at so many of the samples at most."""
TEMPERATURE = 200.0
"""By which GraSP divides the logits (its reference code)."""


@dataclass
class Gradients:
    """Derivatives of a loss over calibration samples.

    Every property raises UsageError without torch, or where the loss does not fit the model or the samples, and
    UnsupportedModelError for operators that cannot be differentiated.
    """

    analysis: Analysis
    groups: Sequence[Group]
    data: Calibration
    loss: Any = "auto"
    """See `spa.interpreter.objective`; a callable is never found in the cache."""
    setup: Setup = field(default_factory=Setup)
    seed: int = 0
    cache: Cache = field(default_factory=Cache)
    progress: Progress = silent

    @cached_property
    def gates(self) -> Mapping[str, NDArray[np.float32]]:
        """dL_s / dz_u for each sample s and unit u, [samples, units] per group; groups without a gate are left out."""
        from spa.interpreter import statistics

        return self._kept("gates", lambda: statistics.gate_gradients(self._task), "names")

    @cached_property
    def relevance(self) -> Mapping[str, NDArray[np.float32]]:
        """Relevance of each unit for each sample's class, [samples, units] per group; no loss plays a part."""
        from spa.interpreter import relevance

        return self._kept("relevance", lambda: relevance.gate_relevance(self._task), "names")

    @cached_property
    def curvature(self) -> Mapping[str, tuple[Array, Array]]:
        """d2L / dz_u^2 of the mean loss and its standard error, [units] each per group."""
        from spa.interpreter import statistics

        return self._pairs("gate-curvature", lambda: statistics.gate_curvature(self._few))

    @cached_property
    def weights(self) -> Mapping[str, Array]:
        """dL / dw of the mean loss, by weight."""
        from spa.interpreter import statistics

        return self._kept("weight-gradients", lambda: statistics.weight_gradients(self._task))

    def hessian_gradients(self, temperature: float = 1.0) -> Mapping[str, Array]:
        """H g of the mean loss, by weight."""
        from spa.interpreter import statistics

        return self._kept(
            f"hessian-gradients/{temperature:g}", lambda: statistics.hessian_gradients(self._task, temperature)
        )

    def traces(self, axes: Mapping[str, int]) -> Mapping[str, tuple[Array, Array]]:
        """Traces of the Hessian over slices along an axis of each weight, and their standard errors."""
        from spa.interpreter import statistics

        return self._pairs(f"traces/{sorted(axes.items())}", lambda: statistics.weight_curvature(self._few, axes))

    @cached_property
    def flow(self) -> Mapping[str, Array]:
        """Synaptic flow of each weight."""
        from spa.interpreter import statistics

        return self._kept("flow", lambda: statistics.synaptic_flow(self._task))

    @cached_property
    def _few(self) -> Task:
        data = self.data
        return self._task if data.samples <= SAMPLES else replace(self._task, data=data.split(SAMPLES)[1])

    @cached_property
    def _task(self) -> Task:
        from spa.interpreter.statistics import Task

        def tell(done: int, total: int) -> None:
            self.progress("differentiate", done, total)

        provider = "cuda" if self.setup.provider == "cuda" else "cpu"
        return Task(self.analysis, self.groups, self.data, self.loss, self.seed, self.setup.batch, provider, tell)

    def _kept(self, kind: str, take: Any, what: str = "") -> Mapping[str, Any]:
        if not isinstance(self.loss, str):
            found: Mapping[str, Any] = take()
            return found
        request = [kind, self.loss, self.seed, [g.name for g in self.groups] if what else None]
        known = self.cache.get("gradients", self.data.digest, request)
        if known is None:
            known = take()
            self.cache.put("gradients", self.data.digest, request, known)
        return known

    def _pairs(self, kind: str, take: Any) -> Mapping[str, tuple[Array, Array]]:
        def flat() -> dict[str, Array]:
            return {
                f"{part}{name}": array
                for name, found in take().items()
                for part, array in (("v", found.value), ("e", found.error))
            }

        known = self._kept(kind, flat, "names")
        return {name[1:]: (known[name], known["e" + name[1:]]) for name in known if name.startswith("v")}
