"""If, Loop, Scan: their bodies are programs of their own that also read values of the graph around them.

Where carried values live is settled by iteration: they stay on the host if the body keeps them there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from spa.interpreter.base import Kernel, Node, Unsupported, axis_of, operator

Places = list[bool]
Hosts = Mapping[str, list[bool]]


@dataclass(frozen=True)
class Control:
    """How an operator with subgraphs is compiled."""

    places: Callable[[ir.Node, Places], Places]
    """Per input: where it is read, given where it is."""
    inputs: Callable[[ir.Node, str, Places], Places]
    """Per input of a body: where it is."""
    settle: Callable[[ir.Node, Places, Hosts], Places]
    """The places again, given where the bodies leave their outputs."""
    results: Callable[[ir.Node, Places, Hosts], Places]
    """Per output: where it is."""
    build: Callable[[Node, Sequence[Any], Places], Kernel]


def _placed(values: Sequence[Any], wanted: Sequence[bool], have: Sequence[bool], node: Node) -> list[Any]:
    """Values that are on the host moved to the device where they are wanted there."""
    return [v if w or not h else node.state.place(v) for v, w, h in zip(values, wanted, have, strict=True)]


def _split(node: Node, keys: Sequence[Any]) -> dict[str, list[int]]:
    """Per body the positions of its captured values among those of the step."""
    index = {key: k for k, key in enumerate(keys)}
    return {name: [index[key] for key in body.captured] for name, body in node.bodies.items()}


# -- If --------------------------------------------------------------------------------------------------------------


def _if_results(_: ir.Node, __: Places, hosts: Hosts) -> Places:
    return [all(pair) for pair in zip(*hosts.values(), strict=True)]


def _if(node: Node, keys: Sequence[Any], hosts: Places) -> Kernel:
    then, other = node.bodies["then_branch"], node.bodies["else_branch"]
    picks = _split(node, keys)

    def run(condition: Any, *captured: Any) -> tuple[Any, ...]:
        name, body = ("then_branch", then) if bool(condition) else ("else_branch", other)
        return tuple(_placed(body([captured[k] for k in picks[name]], []), hosts, body.host, node))

    return run


# -- Loop ------------------------------------------------------------------------------------------------------------


def _loop_places(_: ir.Node, places: Places) -> Places:
    return [True, True, *places[2:]]


def _loop_settle(_: ir.Node, places: Places, hosts: Hosts) -> Places:
    after = hosts["body"][1 : len(places) - 1]
    return [True, True, *(a and b for a, b in zip(places[2:], after, strict=True))]


def _loop_results(_: ir.Node, places: Places, hosts: Hosts) -> Places:
    return [*places[2:], *hosts["body"][len(places) - 1 :]]


def _loop(node: Node, keys: Sequence[Any], hosts: Places) -> Kernel:
    body = node.bodies["body"]
    count = len(node.ir.inputs) - 2
    wanted = hosts[:count]
    given = node.has(0)

    def run(limit: Any, condition: Any, *rest: Any) -> tuple[Any, ...]:
        carried, captured = list(rest[:count]), rest[count:]
        scans: list[list[Any]] = [[] for _ in body.outputs[count + 1 :]]
        most = int(limit) if given and limit is not None else None
        alive = condition is None or bool(condition)
        turn = 0
        while alive and (most is None or turn < most):
            results = body(captured, [torch.tensor(turn), torch.tensor(True), *carried])
            alive = bool(results[0])
            carried = _placed(results[1 : count + 1], wanted, body.host[1 : count + 1], node)
            for rows, value in zip(scans, results[count + 1 :], strict=True):
                rows.append(value)
            turn += 1
        return (*carried, *(_stacked(node, rows, count + k) for k, rows in enumerate(scans)))

    return run


def _stacked(node: Node, rows: list[Any], output: int) -> Any:
    if rows:
        return torch.stack(rows)
    dtype = node.out_dtype(output)
    shape = node.facts.shape(node.ir.outputs[output]) or (0,)
    sizes = [0, *(d if isinstance(d, int) else 0 for d in shape[1:])]
    return torch.empty(sizes, dtype=node.state.held(dtype) if dtype else torch.float32, device=node.state.device)


# -- Scan ------------------------------------------------------------------------------------------------------------


def _scan_split(node: ir.Node) -> int:
    """How many inputs are states."""
    return len(node.inputs) - node.attributes["num_scan_inputs"].as_int()


def _scan_settle(node: ir.Node, places: Places, hosts: Hosts) -> Places:
    states = _scan_split(node)
    return [p and (k >= states or hosts["body"][k]) for k, p in enumerate(places)]


def _scan_results(node: ir.Node, places: Places, hosts: Hosts) -> Places:
    states = _scan_split(node)
    return [*places[:states], *hosts["body"][states:]]


def _scan(node: Node, keys: Sequence[Any], hosts: Places) -> Kernel:
    if node.version < 9:
        raise Unsupported("Scan over batches, before opset 9")
    body = node.bodies["body"]
    states = _scan_split(node.ir)
    inputs = len(node.ir.inputs)
    outs = len(body.outputs) - states
    in_axes = node.attr("scan_input_axes") or [0] * (inputs - states)
    out_axes = node.attr("scan_output_axes") or [0] * outs
    back = node.attr("scan_input_directions") or [0] * (inputs - states)
    reverse = node.attr("scan_output_directions") or [0] * outs

    def run(*values: Any) -> tuple[Any, ...]:
        carried, scanned, captured = list(values[:states]), values[states:inputs], values[inputs:]
        parts = [x.unbind(axis_of(a, x.dim())) for x, a in zip(scanned, in_axes, strict=True)]
        parts = [p[::-1] if b else p for p, b in zip(parts, back, strict=True)]
        rows: list[list[Any]] = [[] for _ in range(outs)]
        for items in zip(*parts, strict=True):
            results = body(captured, [*carried, *items])
            carried = _placed(results[:states], hosts[:states], body.host[:states], node)
            for row, value in zip(rows, results[states:], strict=True):
                row.append(value)
        stacks = []
        for k, row in enumerate(rows):
            if not row:
                stacks.append(_stacked(node, row, states + k))
                continue
            axis = axis_of(out_axes[k], row[0].dim() + 1)
            stacks.append(torch.stack(row[::-1] if reverse[k] else row, axis))
        return (*carried, *stacks)

    return run


CONTROL: dict[str, Control] = {
    "If": Control(lambda _, p: [True, *p[1:]], lambda _, __, ___: [], lambda _, p, __: p, _if_results, _if),
    "Loop": Control(_loop_places, lambda _, __, p: [True, True, *p[2:]], _loop_settle, _loop_results, _loop),
    "Scan": Control(lambda _, p: p, lambda _, __, p: p, _scan_settle, _scan_results, _scan),
}


@operator("If Loop Scan")
def _unused(node: Node) -> Kernel:
    raise NotImplementedError(node.ir.op_type)  # compiled through CONTROL; registered so that it is listed
