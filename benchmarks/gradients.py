"""What interpreting an ONNX file costs: gradients of a ResNet-56 next to the same network written by hand in torch.

    python benchmarks/gradients.py [--images 512] [--batch 64] [--repeats 5] [--depth 56] [--device cpu] [--json FILE]

The network (CIFAR-10 size, random weights) is exported to ONNX with its BatchNormalization nodes, read back and
interpreted. One repeat is forward and backward over all images, of the one and of the other in turn, so that both meet
the same machine; the figures are the medians, and the ratio is that of the medians. `eval` and `train` are the modes
of BatchNormalization, `gates` differentiates gates on all prunable units instead of the weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import table, write
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (as everybody calls it)

from spa.graph import load
from spa.groups import analyze_model
from spa.interpreter import Gates, Interpreter, untie

PROMISE = 1.5


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        same = c_in == c_out
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))


class ResNet(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        each = (depth - 2) // 6
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [16] * each + [32] * each + [64] * each
        before = [16, *widths[:-1]]
        self.blocks = nn.Sequential(*(Block(a, b, 1 + (a != b)) for a, b in zip(before, widths, strict=True)))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))


def exported(module: nn.Module) -> Interpreter:
    """The module as an ONNX file, read back."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            module, (torch.zeros(2, 3, 32, 32),), path, dynamo=False, input_names=["x"], output_names=["logits"],
            dynamic_axes={"x": {0: "n"}}, training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
        )  # fmt: skip
        graph = load(path)
        untie(graph.model)  # exporters write equal vectors once, and an untrained network has many
        return Interpreter(graph)


def passes(
    forward: Callable[[Tensor], Tensor], clear: Callable[[], Any], images: Tensor, labels: Tensor, batch: int
) -> float:
    """Seconds of forward and backward over all images."""
    clear()
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        F.cross_entropy(forward(x), y, reduction="sum").backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    hand = ResNet(options.depth).eval()
    ours = exported(hand).eval().to(options.device)
    hand = hand.to(options.device)
    images = torch.randn(options.images, 3, 32, 32, device=options.device)
    labels = torch.randint(0, 10, (options.images,), device=options.device)
    with torch.no_grad():
        gap = float((hand(images[:8]) - ours({"x": images[:8]})["logits"]).abs().max())
    if gap > 1e-4:
        sys.exit(f"the two networks differ by {gap}")
    gates = Gates(analyze_model(ours.model), device=options.device)
    rows, results = [], []
    for mode in ("eval", "train", "gates"):
        for module in (hand, ours):
            module.train(mode == "train")
        by_gates = mode == "gates"
        for parameter in ours.parameters():
            parameter.requires_grad_(not by_gates)
        sides: dict[str, Callable[[], float]] = {
            "hand": lambda: passes(hand, hand.zero_grad, images, labels, options.batch),
            "ours": lambda by=by_gates: passes(
                lambda x: ours({"x": x}, gates=gates if by else None)["logits"],
                ours.zero_grad,
                images,
                labels,
                options.batch,
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(options.repeats + 1):
            for name, side in sides.items() if turn % 2 else reversed(sides.items()):
                seconds = side()
                if turn:  # the first one warms up
                    times[name].append(seconds)
        low = {name: statistics.median(values) for name, values in times.items()}
        ratio = low["ours"] / low["hand"]
        rows.append(
            [mode, f"{low['hand']:.2f}", f"{low['ours']:.2f}", f"{ratio:.2f}", "yes" if ratio <= PROMISE else "NO"]
        )
        results.append({"mode": mode, "ratio": ratio, "times": times})
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
        write(options.json, {"options": {k: str(v) for k, v in vars(options).items()}, "results": results})
    print(table(("mode", "by hand s", "interpreted s", "ratio", f"within {PROMISE} x"), rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
