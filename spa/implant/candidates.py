"""Which convolutions can compute some of their outputs with the middle of their kernel alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.axes import LEAF
from spa.groups import Analysis, Group
from spa.sites import Site, constant_of, site_of

Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Holder:
    """A convolution that can hold implants."""

    site: Site
    pads: tuple[int, ...]
    """Of the 1 x 1 convolution that reads what the middle of the kernel reads."""
    strides: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of its output."""
        return self.site.name

    @property
    def middle(self) -> slice:
        """Columns of the site's matrix that are the middle of the kernel."""
        tap = self.site.taps // 2
        return slice(tap * self.site.channels, (tap + 1) * self.site.channels)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A group whose channels can be put into any order, and the convolutions that make them."""

    group: Group
    holders: tuple[Holder, ...]
    channels: Index
    """[units]: the output of these convolutions that each unit is."""


def candidates(analysis: Analysis, groups: Sequence[Group]) -> tuple[list[Candidate], dict[str, str]]:
    """The groups that can hold implants, and by the output of each k x k convolution why it can not."""
    found: list[Candidate] = []
    refused: dict[str, str] = {}
    owner = {leaf: group for group in groups for leaf in group.leaves}
    holders: dict[str, list[tuple[Holder, Index]]] = {}
    for node in analysis.coupling.model.graph:
        if node.op_type != "Conv" or node.domain not in ("", "ai.onnx"):
            continue
        holder = _holder(node)
        if isinstance(holder, str):
            if holder:
                refused[node.outputs[0].name or ""] = holder
            continue
        leaf = _leaf(analysis, holder.site)
        group = None if leaf is None else owner.get(leaf)
        if leaf is None or group is None:
            refused[holder.name] = "its output channels cannot be chosen freely; see `spa inspect`"
        elif (channels := _channels(analysis, group, leaf)) is None:
            refused[holder.name] = "its output channels are no simple list of units"
        else:
            holders.setdefault(group.name, []).append((holder, channels))
    for group in groups:
        mine = holders.get(group.name, [])
        same = tuple(h for h, channels in mine if np.array_equal(channels, mine[0][1]))
        if mine and group.units > 1:
            found.append(Candidate(group, same, mine[0][1]))
    return found, refused


def _holder(node: ir.Node) -> Holder | str:
    """A convolution as a holder, or why it is none; an empty text where it is 1 x 1 anyway."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = None if weight is None else constant_of(weight)
    kernel = [] if tensor is None else list(tensor.shape.numpy())[2:]
    if tensor is not None and all(k == 1 for k in kernel):
        return ""
    site = site_of(node)
    if site is None or (len(node.inputs) > 2 and node.inputs[2] is not None and site.bias_slot is None):
        return "its weights are shared, quantised or computed"
    if site.groups != 1:
        return "it is grouped"
    if any(k % 2 == 0 for k in site.kernel):
        return "its kernel has an even size"
    rank = len(site.kernel)
    strides = _numbers(node, "strides", [1] * rank)
    dilations = _numbers(node, "dilations", [1] * rank)
    reach = [d * (k - 1) // 2 for d, k in zip(dilations, site.kernel, strict=True)]
    auto = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    if auto.startswith("SAME"):
        if any(s != 1 for s in strides):
            return f"its padding ({auto} with a stride) depends on the size of its input"
        return Holder(site, (0,) * (2 * rank), tuple(strides))
    pads = _numbers(node, "pads", [0] * (2 * rank)) if auto == "NOTSET" else [0] * (2 * rank)
    left = [p - r for p, r in zip(pads, [*reach, *reach], strict=True)]
    if min(left) < 0:
        return "it pads less than half of its kernel"
    return Holder(site, tuple(left), tuple(strides))


def _numbers(node: ir.Node, name: str, default: list[int]) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else default


def _leaf(analysis: Analysis, site: Site) -> int | None:
    """The index space that is the output axis of a convolution, if it is a single one."""
    dims = analysis.coupling.dims(site.weight)
    if dims is None:
        return None
    kind, parts = analysis.coupling.solution.terms[dims[0]]
    return parts[0] if kind == LEAF else None


def _channels(analysis: Analysis, group: Group, leaf: int) -> Index | None:
    """Position of each unit in a leaf, [units]; None unless units and positions of all its leaves go one to one."""
    places = {of: places_in(analysis, group, of) for of in group.leaves}
    return None if any(p is None for p in places.values()) else places[leaf]


def places_in(analysis: Analysis, group: Group, leaf: int) -> Index | None:
    """Position of each unit of a group in one of its leaves, [units]; None unless they go one to one."""
    solution = analysis.coupling.solution
    start, end = int(solution.base[leaf]), int(solution.base[leaf + 1])
    inside = (group.positions >= start) & (group.positions < end)
    if group.units != end - start or not (inside.sum(axis=1) == 1).all():
        return None
    return np.asarray(group.positions[inside] - start)
