"""Nodes by name: every node gets one, and patterns choose among them."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import onnx

from spa.edge.gates import nearest
from spa.errors import UsageError

__all__ = ["matching", "name_nodes"]


def name_nodes(proto: onnx.ModelProto) -> None:
    """Give nodes of the main graph that have no name, or one that another has, a name of their own."""
    taken: set[str] = set()
    for k, node in enumerate(proto.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{k}"
            while node.name in taken:
                node.name += "_"
        taken.add(node.name)


def matching(proto: onnx.ModelProto, patterns: Sequence[str], option: str) -> list[str]:
    """Names of the nodes whose name or type matches one of the shell patterns.

    Raises:
        UsageError: a pattern matches nothing.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        mine = [
            node.name
            for node in proto.graph.node
            if fnmatch.fnmatchcase(node.name, pattern) or fnmatch.fnmatchcase(node.op_type, pattern)
        ]
        if not mine:
            words = [word for node in proto.graph.node for word in (node.name, node.op_type)]
            raise UsageError(f"{option}: no node has a name or type like {pattern!r}{nearest(pattern, words)}")
        found.update(dict.fromkeys(mine))
    return list(found)
