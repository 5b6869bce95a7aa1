"""Torch-Pruning and `spa` remove the same channels of the same layers: what is left must be the same network.

    python benchmarks/cross_check.py [NAME ...] [--layers 12] [--write docs/cross-check.md] [--json FILE]

Needs `torch` and `torch-pruning==1.6.1`. The models are those of Torch-Pruning's own tests that need no torchvision
(written anew here, after the file that is named), those of `networks.py` for the torchvision models that its tests
load, and `small_networks.py`. For each layer of a model with weights, two units of its outputs are removed:

- `spa` says which channels a unit has, and rewrites the exported file;
- Torch-Pruning gets exactly these channels (`DependencyGraph.get_pruning_group`), prunes the module, which is exported.

Both files then have to have the same number of parameters, the same multiply-accumulates, and the same outputs in ONNX
Runtime. Torch-Pruning is given what its users give it: nothing but the module and an input.
"""

from __future__ import annotations

import argparse
import copy
import io
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure  # also makes `spa` importable
import networks
import numpy as np
import onnxruntime as ort
import torch
from torch import nn

import spa.pipeline as spa
from benchmarks import small_networks
from benchmarks.torch_modules import wired
from spa.finish import is_exact
from spa.graph import load, save
from spa.groups import Analysis, Group
from spa.removal import Mask, kept_without, removals
from spa.rewrite import rewritten
from spa.verify import compare, masked, zeroed

Row = dict[str, Any]
STATES = {
    "agree": "the same parameters, MACs and outputs",
    "spa only": "Torch-Pruning cannot",
    "peer only": "`spa` cannot",
    "differ": "both can, with different results",
    "output": "the layer's outputs are the model's: `spa` keeps them",
    "neither": "nobody can",
}
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Subject:
    """A model and where it is from."""

    source: str
    build: Callable[[], Any]
    inputs: Callable[[], tuple[Any, ...]]


def _test(name: str) -> str:
    return f"tests/test_{name}.py"


def _block(cin: int, mid: int, cout: int) -> Any:
    return nn.Sequential(
        nn.Conv2d(cin, mid, 1), nn.BatchNorm2d(mid), nn.GELU(), nn.Conv2d(mid, cout, 1), nn.BatchNorm2d(cout)
    )


def _point(cin: int, cout: int) -> Any:
    return nn.Sequential(nn.Conv2d(cin, cout, 1), nn.BatchNorm2d(cout))


def _wide_and_deep() -> Any:
    deep = nn.Sequential(
        nn.Linear(32, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 1),
    )
    return wired(
        lambda m, x: m.last(torch.cat([m.wide(x), m.deep(x)], -1)).sigmoid(),
        deep=deep, wide=nn.Linear(32, 3), last=nn.Linear(4, 1),
    )  # fmt: skip


def _concat_split() -> Any:
    def forward(m: Any, x: Any) -> Any:
        y = m.side(x)
        x1, x2 = torch.split(m.main(x), (m.join[0].in_channels - m.side[-1].num_features, m.join[0].out_channels), 1)
        return m.join(torch.cat([x1, y], 1)) + x2

    return wired(forward, main=_block(10, 10, 20), side=_block(10, 10, 10), join=_point(20, 10))


def _split() -> Any:
    def forward(m: Any, x: Any) -> Any:
        c1, c2 = m.one[0].in_channels, m.two[0].in_channels
        x1, x2, x3 = torch.split(m.main(x), [c1, c1, c2], 1)
        return m.one(x1), m.one(x2), m.two(x3)

    return wired(forward, main=_block(16, 16, 64), one=_point(16, 16), two=_point(32, 16))


def _reshape() -> Any:
    def forward(m: Any, x: Any) -> Any:
        y = m.first(x).relu().view(-1, m.up1.in_channels, 4, 4)
        return m.last(torch.flatten(m.up2(m.up1(y).relu()).relu(), 1))

    return wired(
        forward, first=nn.Linear(64, 512), up1=nn.ConvTranspose2d(32, 16, 4, 2, 1),
        up2=nn.ConvTranspose2d(16, 8, 4, 2, 1), last=nn.Linear(8 * 256, 10),
    )  # fmt: skip


def _other_axis() -> Any:
    def forward(m: Any, x: Any) -> Any:
        y1, y2 = m.one(x), m.two(x)
        y = m.conv1(torch.cat([y1, y2], 2))
        return m.conv2(torch.split(y, [y1.shape[2], y2.shape[2]], 2)[0])

    return wired(
        forward, one=_block(32, 32, 32), two=_block(32, 32, 32), conv1=nn.Conv2d(32, 32, 1), conv2=nn.Conv2d(32, 32, 1)
    )


def _custom_layer() -> Any:
    def forward(m: Any, x: Any) -> Any:
        y = m.first(x).relu()
        y = y / y.pow(2).sum(1, keepdim=True).sqrt()
        return m.last(m.inner(y * m.scale + m.bias))

    net = wired(forward, first=nn.Linear(64, 48), inner=nn.Linear(48, 48), last=nn.Linear(48, 10))
    net.scale, net.bias = nn.Parameter(torch.rand(48) + 0.5), nn.Parameter(torch.rand(48))
    return net


def _two_inputs() -> Any:
    def forward(m: Any, x: Any, y: Any) -> Any:
        x, y = m.one(x).relu(), m.two(y).relu()
        return x, y, m.both(torch.cat([x, y], 1)).relu()

    return wired(forward, one=nn.Linear(128, 32), two=nn.Linear(64, 32), both=nn.Linear(64, 100))


def _cascade() -> Any:
    def forward(m: Any, x: Any) -> Any:
        y = torch.cat([m.one(x), m.two(x)], 1)
        y = torch.cat([y, m.three(x)], 1)
        return m.last(torch.cat([y, m.four(x)], 1))

    return wired(
        forward, one=_block(10, 10, 10), two=_block(10, 20, 20), three=_point(10, 30), four=_point(10, 60),
        last=nn.Conv2d(120, 10, 1),
    )  # fmt: skip


def _lenet() -> Any:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10), nn.ReLU(),
    )  # fmt: skip


def _single() -> Any:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 64, 2, 2), nn.BatchNorm2d(64),
        nn.ReLU(), nn.Conv2d(64, 1, 3, 1, 1), nn.BatchNorm2d(1), nn.ReLU(),
    )  # fmt: skip


def _skip() -> Any:
    def forward(m: Any, x: Any) -> Any:
        y = m.one(x).relu()
        return m.three(m.two(y).relu() + y)

    return wired(forward, one=nn.Linear(128, 64), two=nn.Linear(64, 64), three=nn.Linear(64, 10))


def _random(*shapes: tuple[int, ...]) -> Callable[[], tuple[Any, ...]]:
    return lambda: tuple(torch.randn(*shape) for shape in shapes)


SUBJECTS: dict[str, Subject] = {
    "concat": Subject(_test("concat"), _wide_and_deep, _random((2, 32))),
    "concat-split": Subject(_test("concat_split"), _concat_split, _random((1, 10, 7, 7))),
    "cascaded-concat": Subject(_test("cascaded_concat"), _cascade, _random((1, 10, 7, 7))),
    "split": Subject(_test("split"), _split, _random((1, 16, 7, 7))),
    "reshape": Subject(_test("reshape"), _reshape, _random((1, 64))),
    "concat-other-axis": Subject(_test("non_feature_dim_cat"), _other_axis, _random((1, 32, 7, 7))),
    "custom-layer": Subject(
        _test("customized_layer") + ", without its hand-written pruner", _custom_layer, _random((2, 64))
    ),
    "two-inputs": Subject(_test("multiple_inputs_and_outputs"), _two_inputs, _random((1, 128), (1, 64))),
    "lenet": Subject(_test("dependency_lenet"), _lenet, _random((1, 1, 28, 28))),
    "single-channel": Subject(_test("single_channel_output"), _single, _random((1, 3, 32, 32))),
    "skip": Subject(_test("fully_connected_layers"), _skip, _random((1, 128))),
    **{
        name: Subject(f"torchvision's in {where}", networks.MODULES[name], _random((1, 3, 224, 224)))
        for name, where in (
            ("resnet50", "test_flops, test_pruner"),
            ("mobilenet-v2", "test_backward"),
            ("densenet121", "test_regularization"),
            ("efficientnet-b0", "test_backward"),
            ("convnext-t", "test_unwrapped_parameters (base), without hints"),
            ("vit-b16", "test_serialization, without the number of heads"),
        )
    },
    **{
        name: Subject("small_networks.py", build, _random((1, *size)))
        for name, _, build, size, _ in small_networks.NETWORKS
    },
}


# -- one layer ---------------------------------------------------------------------------------------------------------


def _export(net: Any, inputs: tuple[Any, ...], path: Path) -> None:
    """As it is: batch norms kept, names of parameters kept."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        torch.onnx.export(
            net, inputs, buffer, dynamo=False, opset_version=17, do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE, input_names=[f"in{k}" for k in range(len(inputs))],
        )  # fmt: skip
        path.write_bytes(buffer.getvalue())


def _layers(net: Any) -> Iterator[tuple[str, Any, int]]:
    """Name, layer, and the axis of its weight that holds its outputs."""
    for name, part in net.named_modules():
        if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            yield name, part, 0
        elif isinstance(part, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
            yield name, part, 1


def _found(analysis: Analysis, tensor: str, axis: int) -> Group | None:
    """The largest group that the outputs of a layer are in."""
    mine = [g for g in analysis.groups if any(m.tensor == tensor and m.axis == axis for m in g.members)]
    return max(mine, key=lambda g: g.units, default=None)


def _cut(analysis: Analysis, group: Group, tensor: str, axis: int, path: Path) -> tuple[list[int], Mask]:
    """Remove two units; the channels of the layer that left, and what is kept."""
    units = sorted({0, group.units // 2})[: max(1, min(2, group.units - 1))]
    kept = kept_without(analysis, [(group, units)])
    value = next(v for v in analysis.coupling.weights if v.name == tensor)
    dims = analysis.coupling.dims(value)
    assert dims is not None
    gone = np.flatnonzero(~analysis.coupling.solution.keep(dims[axis], kept)).tolist()
    save(rewritten(analysis, kept).model, path, external=False)
    return gone, kept


def _proof(analysis: Analysis, kept: Mask, ours: Path, theirs: Path) -> str:
    """Which of the two is what the original does without these channels."""
    model, exact = analysis.coupling.model, is_exact(analysis, kept)
    reference = zeroed(model, removals(analysis, kept)) if exact else masked(analysis, kept)
    right = [compare(reference, path, exact=exact, original=model).passed for path in (ours, theirs)]
    words = {True: "equals", False: "does NOT equal"}
    return f"; the original with these channels masked: `spa`'s {words[right[0]]} it, the other's {words[right[1]]} it"


def _peer(net: Any, inputs: tuple[Any, ...], name: str, gone: list[int], path: Path) -> str:
    """Torch-Pruning removes these channels; why not, or nothing."""
    import torch_pruning as tp

    pruned = copy.deepcopy(net)
    layer = dict(pruned.named_modules())[name]
    kinds = {nn.Linear: "linear", nn.ConvTranspose1d: "conv", nn.ConvTranspose2d: "conv"}
    function = getattr(tp, f"prune_{kinds.get(type(layer), 'conv')}_out_channels")
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.out_channels > 1:
        function = tp.prune_depthwise_conv_out_channels
    try:
        graph = tp.DependencyGraph().build_dependency(pruned, example_inputs=inputs)
        group = graph.get_pruning_group(layer, function, idxs=gone)
        if not graph.check_pruning_group(group):
            return "refused: a layer would be empty"
        group.prune()
        pruned(*inputs)
        _export(pruned, inputs, path)
    except Exception as error:  # whatever it raises is its answer
        return measure.brief(error)
    return ""


def _same(one: Path, other: Path, inputs: tuple[Any, ...]) -> str:
    """What differs between two files; nothing if they are the same network."""
    first, second = spa.analyze(one), spa.analyze(other)
    if first.parameters != second.parameters:
        return f"parameters: spa {first.parameters:,}, Torch-Pruning {second.parameters:,}"
    if first.macs != second.macs:
        return f"MACs: spa {first.macs:,}, Torch-Pruning {second.macs:,}"
    feeds = {f"in{k}": x.numpy() for k, x in enumerate(inputs)}
    answers = [
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds) for path in (one, other)
    ]
    for a, b in zip(*answers, strict=True):
        if a.shape != b.shape:
            return f"outputs of shape {list(a.shape)} and {list(b.shape)}"
        gap = float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-12))
        if not gap <= TOLERANCE:
            return f"outputs differ by {gap:.1e}"
    return ""


def check(name: str, most: int) -> Iterator[Row]:
    """One row per layer, `most` of them, spread over the model."""
    subject = SUBJECTS[name]
    net = networks.module(subject.build)
    torch.manual_seed(1)
    inputs = subject.inputs()
    with tempfile.TemporaryDirectory(prefix="spa-cross-") as folder:
        whole, ours, theirs = (Path(folder) / f"{part}.onnx" for part in ("whole", "ours", "theirs"))
        _export(net, inputs, whole)
        analysis = spa.analyze(load(whole))
        layers = list(_layers(net))
        picks = np.unique(np.linspace(0, len(layers) - 1, min(most, len(layers))).astype(int))
        for layer, part, axis in (layers[k] for k in picks):
            tensor = f"{layer}.weight"
            row: Row = {"model": name, "layer": layer, "state": "agree", "why": ""}
            group = _found(analysis, tensor, axis)
            if group is None:
                reasons = [f.reason.text for f in analysis.frozen if f.tensor == tensor and f.axis == axis]
                row["state"] = "output" if "graph output" in reasons else "neither"
                row["why"] = "; ".join(reasons) or "one output, which is all it has"
                if part.weight.shape[axis] == 1:
                    row["state"] = "neither"
                elif row["state"] == "neither" and not _peer(net, inputs, layer, [0], theirs):
                    row["state"] = "peer only"
            else:
                gone, kept = _cut(analysis, group, tensor, axis, ours)
                row["kind"] = group.kind
                if refused := _peer(net, inputs, layer, gone, theirs):
                    row["state"], row["why"] = "spa only", refused
                elif difference := _same(ours, theirs, inputs):
                    row["state"], row["why"] = "differ", difference + _proof(analysis, kept, ours, theirs)
            yield row


# -- output ------------------------------------------------------------------------------------------------------------


_HEAD = """# Cross-check with Torch-Pruning

<!-- Written by `python benchmarks/cross_check.py`; see the top of that file. -->

The same channels of the same layers are removed by `spa` (from the exported file) and by Torch-Pruning 1.6.1 (from the
module, which is exported afterwards). Both results are counted by the same counter and run in ONNX Runtime. Models of
Torch-Pruning's own tests are written anew after the file that is named; of larger models a few layers are taken, evenly
spread. Torch-Pruning gets no hints, such as numbers of heads.
"""


def page(rows: list[Row]) -> str:
    """docs/cross-check.md."""
    counts = {name: Counter(row["state"] for row in rows if row["model"] == name) for name in SUBJECTS}
    total = Counter(row["state"] for row in rows)
    lines = [
        _HEAD,
        "| model | written after | layers | " + " | ".join(STATES) + " |",
        "|---|---|--:|" + "--:|" * len(STATES),
    ]
    for name, count in counts.items():
        if count:
            cells = " | ".join(str(count[state] or "") for state in STATES)
            lines.append(f"| {name} | {SUBJECTS[name].source} | {sum(count.values())} | {cells} |")
    cells = " | ".join(str(total[state] or "") for state in STATES)
    lines.append(f"| all | | {len(rows)} | {cells} |")
    lines += ["", *(f"- **{state}**: {meaning}" for state, meaning in STATES.items()), ""]
    for state in ("spa only", "peer only", "differ", "neither"):
        reasons = Counter((row["model"], row["why"]) for row in rows if row["state"] == state)
        if reasons:
            lines += [f"*{state}*:", ""]
            lines += [f"- {model}, {n} layers: {why}" for (model, why), n in reasons.items()]
            lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--layers", type=int, default=12, help="per model at most")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    for name in options.names or SUBJECTS:
        for row in check(name, options.layers):
            rows.append(row)
            print(f"{name:18} {row['layer']:28} {row.get('kind', '-'):8} {row['state']:9} {row['why']}", flush=True)
    text = page(rows)
    print("\n" + text)
    if options.write is not None:
        options.write.write_text(text + "\n")
    measure.write(options.json, {"rows": rows})
    return 1 if any(row["state"] == "differ" and "`spa`'s does NOT" in row["why"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
