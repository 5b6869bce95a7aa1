"""What one kind of run does: the steps it needs, when values are let go, and where gates multiply."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spa.errors import UsageError
from spa.interpreter.base import State
from spa.interpreter.program import ABSENT, Compiler, Key, Scope, Step, execute

Read = tuple[ir.Node, int]
"""A node and one of its input slots."""
Timed = tuple[Step, tuple[int, ...]]


@dataclass(eq=False)
class Plan:
    """A run of the main program that gives certain values."""

    size: int
    steps: list[Timed]
    leaves: list[tuple[int, Key]]
    """Slots of parameters and constants that this run reads."""
    outputs: list[int]
    factors: list[int]
    """Slots of the multipliers, in the order of the reads they were planned for."""
    given: dict[ir.Value, int]
    """Slots of the graph's inputs."""
    segments: list[Segment] = field(default_factory=list)

    def env(self) -> list[Any]:
        """An empty environment."""
        return [None] * self.size

    def needs(self, value: ir.Value) -> bool:
        """Whether an input is read by this run."""
        return value in self.given

    def slot(self, value: ir.Value) -> int | None:
        """Where an input goes, None if it is not read."""
        return self.given.get(value)

    def run(self, env: list[Any], state: State) -> None:
        """Fill in the outputs."""
        if not self.segments or not torch.is_grad_enabled():
            execute(self.steps, env)
            return
        for segment in self.segments:
            segment.run(env, state)


@dataclass(eq=False)
class Segment:
    """Steps whose activations are computed again in the backward pass."""

    steps: list[Timed]
    enters: list[int]
    """Slots that they read and did not write."""
    leaves: list[int]
    """Slots that are read after them."""
    after: tuple[int, ...]
    """Slots that nobody reads after them."""

    def run(self, env: list[Any], state: State) -> None:
        """Run the steps on `env`, keeping only what enters."""
        recompute = _again(self, len(env), state)
        results = checkpoint(recompute, *[env[k] for k in self.enters], use_reentrant=False)
        for slot, value in zip(self.leaves, results, strict=True):
            env[slot] = value
        for slot in self.after:
            env[slot] = None


def _again(segment: Segment, size: int, state: State) -> Callable[..., tuple[Any, ...]]:
    """The segment as a function; later calls keep the mode of the first one and leave statistics alone."""
    calls, training = 0, state.training

    def compute(*values: Any) -> tuple[Any, ...]:
        nonlocal calls
        calls += 1
        env: list[Any] = [None] * size
        for slot, value in zip(segment.enters, values, strict=True):
            env[slot] = value
        before = state.training, state.update
        state.training, state.update = training, calls == 1
        try:
            execute(segment.steps, env)
        finally:
            state.training, state.update = before
        return tuple(env[slot] for slot in segment.leaves)

    return compute


def plan_for(compiler: Compiler, main: Scope, names: Sequence[str], reads: Sequence[Read], segments: int) -> Plan:
    """The plan of a run that gives the values called `names`, with a multiplier at each of `reads`.

    Raises: UsageError if a value or a read does not exist.
    """
    outputs = [_slot_of(compiler, main, name) for name in names]
    steps, factors, size = _gated(main, reads)
    wanted = set(outputs)
    chosen: list[Step] = []
    for step in reversed(steps):
        if wanted & set(step.writes):
            chosen.append(step)
            wanted.update(step.reads)
    chosen.reverse()
    last: dict[int, int] = {}
    for k, step in enumerate(chosen):
        last.update(dict.fromkeys((*step.reads, *step.writes), k))
    keep = {ABSENT, *outputs}
    timed = [
        (s, tuple({*s.reads, *s.writes} - keep - {x for x in (*s.reads, *s.writes) if last[x] != k}))
        for k, s in enumerate(chosen)
    ]
    leaves = [(slot, key) for key, slot in compiler.leaves.items() if slot in wanted]
    given = {v: s for v in main.compiler.model.graph.inputs if (s := _given_slot(main, v)) in wanted and s is not None}
    plan = Plan(size, timed, leaves, outputs, factors, given)
    if segments > 1 and len(timed) > segments:
        kept = {slot for slot, _ in leaves} | set(factors)
        plan.segments = _segments(timed, segments, set(outputs), kept)
    return plan


def _given_slot(main: Scope, value: ir.Value) -> int | None:
    return main.slots.get((value, False), main.slots.get((value, True)))


def _slot_of(compiler: Compiler, main: Scope, name: str) -> int:
    for value, host in main.slots:
        if value.name == name and host == (compiler.on_host(value) and value not in compiler.constants):
            return main.slots[value, host]
    for value in (*compiler.constants, *compiler.parameters):
        if value.name == name:
            return main.read(value, False)
    raise UsageError(f"the model has no value '{name}' in its main graph.")


def _gated(main: Scope, reads: Sequence[Read]) -> tuple[list[Step], list[int], int]:
    """The steps with multiplications before the nodes that read, and the slots of the multipliers."""
    if not reads:
        return main.steps, [], main.size
    size = main.size
    at: dict[ir.Node, list[tuple[int, int]]] = {}
    factors = []
    for node, slot in reads:
        factors.append(size)
        at.setdefault(node, []).append((slot, size))
        size += 1
    out: list[Step] = []
    for step in main.steps:
        for slot, factor in at.pop(step.node, ()) if step.node is not None else ():
            source = step.reads[slot]
            out.append(Step(_multiply, (source, factor), (size,), what="a gate"))
            step = Step(step.kernel, (*step.reads[:slot], size, *step.reads[slot + 1 :]), step.writes, step.node)
            size += 1
        out.append(step)
    if at:
        node = next(iter(at))
        raise UsageError(f"gates at node '{node.name}', which is no node of this model's main graph that is computed.")
    return out, factors, size


def _multiply(x: Tensor, factor: Tensor) -> Tensor:
    samples = factor.shape[0] if factor.dim() else 1
    if samples not in (1, x.shape[0]):  # the batch and axes after it are one axis: row-major
        factor = factor.repeat_interleave(x.shape[0] // samples, 0)
    return x * (factor if factor.dtype == x.dtype else factor.to(x.dtype))


def _segments(steps: list[Timed], count: int, outputs: set[int], kept: set[int]) -> list[Segment]:
    """Cut where little has to be kept, near equal lengths; the last part is kept as it is."""
    written: list[set[int]] = [set(s.writes) for s, _ in steps]
    last: dict[int, int] = {}
    first: dict[int, int] = {}
    for k, (step, _) in enumerate(steps):
        last.update(dict.fromkeys(step.reads, k))
        for slot in step.writes:
            first.setdefault(slot, k)
    alive = [0] * (len(steps) + 1)
    for slot, start in first.items():
        for k in range(start + 1, last.get(slot, start) + 1):
            alive[k] += 1
    reach = max(1, len(steps) // count // 3)
    cuts = [0]
    for part in range(1, count):
        middle = part * len(steps) // count
        options = range(max(cuts[-1] + 1, middle - reach), min(len(steps), middle + reach + 1))
        if options:
            cuts.append(min(options, key=lambda k: (alive[k], abs(k - middle))))
    cuts.append(len(steps))
    out = []
    for start, end in itertools.pairwise(cuts):
        mine = set().union(*written[start:end]) - {ABSENT}
        enters = {r for s, _ in steps[start:end] for r in s.reads} - mine - {ABSENT}
        leaves = {s for s in mine if last.get(s, -1) >= end or s in outputs}
        gone = tuple(s for s in enters - kept - outputs if last[s] < end)
        local = [(s, tuple(set(f) - leaves)) for s, f in steps[start:end]]
        out.append(Segment(local, sorted(enters), sorted(leaves), gone))
    return out
