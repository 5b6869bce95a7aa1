"""Torch-Pruning 1.6.1 without training: criteria, the pruning ratio that meets a share of the MACs, what is left.

    pip install --no-deps torch-pruning==1.6.1

The tool gets what it can use: gradients of all calibration images with their labels, per image where the criterion is
a Hessian (its own accumulation keeps the last image only, so the sums are made here), and batch-norm statistics
re-estimated on the calibration images afterwards.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # its usual name

from benchmarks.accuracy.data import Images
from benchmarks.accuracy.nets import Attention, Shortcut

VERSION = "1.6.1"
CRITERIA = ("l2_global", "l2_uniform", "taylor_global", "hessian_global", "bnscale_global")
STEPS = 12  # of bisection: ratios are found to 1/4096

Gradients = dict[str, torch.Tensor]


def missing() -> str | None:
    """Why the tool cannot run here, or None."""
    try:
        found = metadata.version("torch-pruning")
    except metadata.PackageNotFoundError:
        return f"Torch-Pruning is not installed: pip install --no-deps torch-pruning=={VERSION}"
    if found != VERSION:
        return (
            f"Torch-Pruning {found} is installed, {VERSION} is wanted: pip install --no-deps torch-pruning=={VERSION}"
        )
    return None


@dataclass(frozen=True)
class Cut:
    """How a network is pruned."""

    criterion: str
    """`l2_global`, `l2_uniform`, `taylor_global`, `taylor_uniform`, `hessian_global` or `bnscale_global`."""
    scope: str
    """See `ignored`."""
    macs: float | None = None
    """At most this share of the MACs is left."""
    ratio: float | None = None
    """Or: this share of the channels is removed."""


# -- what is needed of the calibration images --------------------------------------------------------------------------


def gradients(net: nn.Module, images: Images, kind: str) -> Gradients:
    """By parameter: `taylor`, the gradient of the mean loss; `hessian`, the mean squared gradient over images."""
    result = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    batch = 1 if kind == "hessian" else 50
    for k in range(0, len(images), batch):
        x, y = torch.from_numpy(images.x[k : k + batch]), torch.from_numpy(images.y[k : k + batch])
        net.zero_grad()
        F.cross_entropy(net(x), y, reduction="sum").backward()
        for name, p in net.named_parameters():
            if p.grad is not None:
                result[name] += p.grad.square() if kind == "hessian" else p.grad
    net.zero_grad(set_to_none=True)
    return {name: g / len(images) for name, g in result.items()}


@torch.no_grad()
def renormalise(net: nn.Module, images: Images) -> None:
    """Batch-norm statistics of these images, all in one batch, each layer's after those before it."""
    layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = 1.0
        layer.train()
    net(torch.from_numpy(images.x))
    for layer in layers:
        layer.eval()


# -- pruning -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def count_macs(net: nn.Module, x: torch.Tensor) -> int:
    """Multiply-accumulates of convolutions, linear layers and attention for one input; the fixed shortcuts are free."""
    total = 0

    def count(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += output[0].numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            total += output[0].numel() * layer.in_features
        elif isinstance(layer, Attention):
            total += 2 * layer.num_heads * layer.head_dim * output.shape[1] ** 2

    kinds = nn.Conv2d, nn.Linear, Attention
    hooks = [
        m.register_forward_hook(count) for m in net.modules() if isinstance(m, kinds) and not isinstance(m, Shortcut)
    ]
    net(x[:1])
    for hook in hooks:
        hook.remove()
    return total


def ignored(net: nn.Module, scope: str) -> list[nn.Module]:
    """Layers that are left alone, apart from the classifier.

    `all`: none. `inner`: what writes to a residual stream. `mlp`: also attention. `mlp+heads`: as `inner`, for
    transformers.
    """
    named = list(net.named_modules())
    if scope == "all":
        return []
    if scope in ("mlp", "mlp+heads"):
        stream = ("patch_embed", "proj", "fc2") + (("qkv",) if scope == "mlp" else ())
        return [m for name, m in named if name.rpartition(".")[2] in stream]
    if hasattr(net, "steps"):  # a graph: convolutions without an activation are the stream of an inverted residual
        active = {inputs[0] for op, inputs, _, _ in net.steps if op in ("Relu", "Clip")}
        return [net.layers[a["key"]] for op, _, output, a in net.steps if op == "Conv" and output not in active]
    return [m for name, m in named if name == "conv1" or name.endswith(("conv2", "shortcut"))]


def classifier(net: nn.Module) -> nn.Module:
    """The layer whose outputs are the classes."""
    return [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)][-1]


def _importance(criterion: str) -> Callable[[Any], Any]:
    from torch_pruning.pruner import importance as tp

    kind = criterion.partition("_")[0]
    scorers = {
        "l2": lambda: tp.GroupMagnitudeImportance(p=2),
        "taylor": tp.GroupTaylorImportance,
        "hessian": tp.GroupHessianImportance,
        "bnscale": tp.BNScaleImportance,
    }
    scorer = scorers[kind]()

    class Items(list[Any]):
        """A group without the fixed shortcuts, which are no weights."""

    def score(group: Any) -> Any:
        return scorer(Items(item for item in group if not isinstance(item.dep.target.module, Shortcut)))

    return score


def pruned(net: nn.Module, x: torch.Tensor, cut: Cut, ratio: float, grads: Gradients | None) -> nn.Module:
    """A copy without `ratio` of its channels."""
    from torch_pruning.pruner import BasePruner

    net = copy.deepcopy(net)
    for name, p in net.named_parameters():
        p.requires_grad_(True)
        if grads is not None:
            p.grad = grads[name].clone()
    attention = [m for m in net.modules() if isinstance(m, Attention)] if cut.scope == "mlp+heads" else []
    heads = {m.qkv: m.num_heads for m in attention}
    pruner = BasePruner(
        net, x[:1], _importance(cut.criterion),
        global_pruning=cut.criterion.endswith("_global"), pruning_ratio=ratio,
        ignored_layers=[*ignored(net, cut.scope), classifier(net)],
        num_heads=heads, prune_num_heads=bool(heads), prune_head_dims=False, head_pruning_ratio=ratio if heads else 0.0,
        in_channel_groups={}, out_channel_groups={},
    )  # fmt: skip
    pruner.step()
    for m in attention:
        m.num_heads = pruner.num_heads[m.qkv]
    for p in net.parameters():
        p.grad = None
    return net.eval()


@dataclass(frozen=True)
class Found:
    """A network pruned to a share of the MACs."""

    net: nn.Module
    ratio: float
    macs: float
    """Share that is left."""


def search(net: nn.Module, x: torch.Tensor, cut: Cut, grads: Gradients | None, known: dict[float, float]) -> Found:
    """The most MACs at or below the share that bisection of the ratio finds; `known` gets every ratio tried.

    Raises:
        ValueError: no ratio meets it.
    """
    full = count_macs(net, x)

    def attempt(ratio: float) -> float:
        if ratio not in known:
            try:
                known[ratio] = count_macs(pruned(net, x, cut, ratio, grads), x) / full
            except Exception:  # whole layers gone: what torch then raises differs from operator to operator
                known[ratio] = 0.0
        return known[ratio]

    if cut.ratio is not None:
        best = cut.ratio
    else:
        assert cut.macs is not None
        low, high = 0.0, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if attempt(middle) <= cut.macs else (middle, high)
        met = {share: ratio for ratio, share in known.items() if 0 < share <= cut.macs}
        if not met:
            raise ValueError(f"no ratio leaves a network that runs with at most {cut.macs:.0%} of the MACs")
        best = met[max(met)]
    result = pruned(net, x, cut, best, grads)
    return Found(result, best, count_macs(result, x) / full)


def export(net: nn.Module, x: torch.Tensor, path: Path) -> None:
    """Write it as ONNX with a free batch size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"input": {0: "N"}}
        torch.onnx.export(net, (x[:2],), str(path), dynamo=False, input_names=["input"], dynamic_axes=axes)


# -- remembered results ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """Rows and gradients on disk, by a digest of everything they depend on."""

    folder: Path
    fresh: bool = False

    def row(self, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Remembered, or made and remembered."""
        path = self.folder / f"{_digest(settings)}.json"
        if path.is_file() and not self.fresh:
            body: dict[str, Any] = json.loads(path.read_text())["row"]
            return body
        row = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": settings, "row": row}))
        return row

    def gradients(self, settings: dict[str, Any], make: Callable[[], Gradients]) -> Gradients:
        path = self.folder / f"{_digest(settings)}.npz"
        if path.is_file() and not self.fresh:
            with np.load(path) as z:
                return {name: torch.from_numpy(z[name]) for name in z.files}
        result = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{name: g.numpy() for name, g in result.items()})
        return result


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settings_of(cut: Cut) -> dict[str, Any]:
    """For a digest."""
    return {"tool": f"torch-pruning {VERSION}", **asdict(cut)}
