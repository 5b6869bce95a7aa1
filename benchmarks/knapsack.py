"""How long widths by knapsacks take, and how far they are from a lower bound and from their targets.

    python benchmarks/knapsack.py [--units 10000] [--groups 40 200] [--targets macs=0.45,params=0.5] [--json FILE]

Chains of 1 x 1 convolutions, so that every cost is a product of two widths; images shrink on the way, so that early
layers cost operations and late ones parameters. Scores are of different scale in each layer. Widths are single units
(`--align 1`): the largest problem that so many units make.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from measure import ROOT  # puts the project on the path
from onnx import TensorProto, helper, numpy_helper

import spa
from spa.budget import parse_targets, select

assert ROOT


def chain(groups: int, width: int) -> onnx.ModelProto:
    """`groups` layers of `width` channels each between an input and an output of 8."""
    rng = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for k in range(groups + 1):
        shape = (8 if k == groups else width, 8 if k == 0 else width, 1, 1)
        weights.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), f"w{k}"))
        stride = 2 if k and k % (groups // 4) == 0 and k < groups else 1
        nodes.append(helper.make_node("Conv", [name, f"w{k}"], [f"y{k}"], name=f"conv{k}", strides=[stride, stride]))
        name = f"y{k}"
        if k < groups:
            nodes.append(helper.make_node("Relu", [name], [f"r{k}"], name=f"relu{k}"))
            name = f"r{k}"
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 8, s, s]) for n, s in (("x", 32), (name, 4))]
    graph = helper.make_graph(nodes, "chain", info[:1], info[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def measured(groups: int, units: int, targets: str) -> dict[str, Any]:
    """One problem, solved once."""
    analysis = spa.analyze(chain(groups, units // groups))
    rng = np.random.default_rng(1)
    scores = {g.name: rng.gamma(0.7, size=g.units) * rng.lognormal() for g in analysis.groups}
    cpu, wall = time.process_time(), time.perf_counter()
    found = select(analysis, analysis.groups, scores, parse_targets(targets), allocation="knapsack", align=1)
    spent = time.process_time() - cpu, time.perf_counter() - wall
    best = found.optimality
    assert best is not None
    return {
        "groups": groups,
        "units": sum(g.units for g in analysis.groups),
        "targets": targets,
        "cpu_seconds": spent[0],
        "wall_seconds": spent[1],
        "gap_to_bound": best.gap,
        "below_greedy": 1 - best.loss / best.efficient,
        "reached": best.reached,
        "knapsacks": best.rounds,
        "settled": best.settled,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--groups", type=int, nargs="+", default=[40, 200])
    parser.add_argument("--targets", default="macs=0.45,params=0.5")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    rows = []
    for groups in given.groups:
        row = measured(groups, given.units, given.targets)
        rows.append(row)
        used = ", ".join(f"{100 * share:.2f} % of {text}" for text, share in row["reached"].items())
        print(
            f"{row['units']} units in {groups} groups, {given.targets}: {row['cpu_seconds']:.2f} s CPU "
            f"({row['wall_seconds']:.2f} s), loss within {100 * row['gap_to_bound']:.2f} % of a lower bound and "
            f"{100 * row['below_greedy']:.1f} % below greedy; used {used}"
        )
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
