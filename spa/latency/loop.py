"""Solve, measure, correct, solve again: until the measured latency is what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from spa.errors import TargetError

TOLERANCE = 0.03
"""How far the measured latency may be from what was asked for, relative to it."""
OVER = 0.01
"""... on the slow side, while it can still be made faster."""
MEASUREMENTS = 8
"""At most."""
_AIM = 0.985
"""Where between the two the next solution should be."""
_SOLVED = 40
_NARROW = 1.002
"""Requests closer to each other differ by less than can be measured."""
_REACHABLE = 1.03
"""Where a request cannot be met, the next one is larger by this factor."""

S = TypeVar("S")


@dataclass(frozen=True)
class Attempt:
    """One turn of the loop; all as a share of the dense model's latency."""

    requested: float
    """Given to the solver."""
    predicted: float
    """By the table, for its solution."""
    measured: float


@dataclass(frozen=True)
class Converged(Generic[S]):
    """What the loop found."""

    solution: S
    measured: float
    """Share of the dense model's latency."""
    attempts: tuple[Attempt, ...]


def converge(
    goal: float,
    solve: Callable[[float], S],
    predicted: Callable[[S], float],
    measure: Callable[[S], float],
    key: Callable[[S], Hashable],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Converged[S]:
    """The solution whose measured latency is within `TOLERANCE` of the goal, or else the slowest one that is below it.

    Args:
        goal: share of the dense model's latency.
        solve: a solution for which the table predicts at most so much.
        predicted: what the table says of a solution, as a share of the dense model's latency.
        measure: what a solution takes, as such a share.
        key: equal for equal solutions, which are measured once.
        progress: called with (measurements, most).

    Raises:
        TargetError: of `solve`; or nothing that was measured is near or below the goal: says what the best one takes.
    """
    known: dict[Hashable, tuple[S, float, float]] = {}
    attempts: list[Attempt] = []
    below: tuple[float, float] | None = None  # (requested, measured) of the slowest solution that is fast enough
    above: tuple[float, float] | None = None  # ... of the fastest that is not
    request, floor, failure = goal * _AIM, 0.0, None
    for _ in range(_SOLVED):
        if len(attempts) >= MEASUREMENTS:
            break
        try:
            solution = solve(request)
        except TargetError as error:
            failure, floor = error, request
            if above is not None or below is not None or request >= 1:
                break
            request = min(request * _REACHABLE, 1.0)
            continue
        label = key(solution)
        if label not in known:
            progress(len(attempts), MEASUREMENTS)
            known[label] = (solution, measure(solution), predicted(solution))
            attempts.append(Attempt(request, known[label][2], known[label][1]))
        measured = known[label][1]
        if -TOLERANCE <= measured / goal - 1 <= OVER:
            break
        if measured <= goal:
            below = max(below or (0.0, 0.0), (request, measured))
        else:
            above = min(above or (float("inf"), 0.0), (request, measured))
        if (following := _next(goal, below, above, floor)) is None:
            break
        request = following
    progress(MEASUREMENTS, MEASUREMENTS)
    if not known and failure is not None:
        raise failure
    near = [found for found in known.values() if found[1] <= goal * (1 + TOLERANCE)]
    if not near:
        least = min(measured for _, measured, _ in known.values())
        raise TargetError(
            f"latency={goal:.3g} of the original's cannot be reached: the best that was measured is {least:.3g}; "
            "try --scope all, a smaller --min-keep, or a larger target"
        )
    solution, measured, _ = min(near, key=lambda found: (abs(found[1] - goal), -found[2]))  # of equals the largest
    return Converged(solution, measured, tuple(attempts))


def _next(
    goal: float, below: tuple[float, float] | None, above: tuple[float, float] | None, floor: float
) -> float | None:
    """What to request next; None if nothing is left between what is known."""
    if below is None and above is not None:
        request = above[0] * min(goal * _AIM / above[1], 0.97)
        return request if request > floor * 1.0001 else None
    if above is None and below is not None:
        return min(below[0] * max(goal * _AIM / below[1], 1.02), 1.0) if below[0] < 1 else None
    if below is None or above is None:  # neither: nothing was measured
        return None
    if above[0] <= below[0] * _NARROW:
        return None
    share = (goal * _AIM - below[1]) / max(above[1] - below[1], 1e-9)
    return below[0] + min(max(share, 0.15), 0.85) * (above[0] - below[0])
