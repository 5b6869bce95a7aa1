"""A deformable convolution (v2: with a mask) that both exporters of torch write as the operator DeformConv.

torch has the operator only in torchvision, and its exporters know it only there.
"""

from __future__ import annotations

from typing import Any

from benchmarks.torch_modules import lazy_torch, wired

OPSET = 19
"""The first that has DeformConv."""


def sampled(x: Any, weight: Any, offset: Any, mask: Any) -> Any:
    """A 3 x 3 kernel whose taps read at `offset` beside their places, times `mask`.

    Args:
        x: [n, c, h, w].
        weight: [o, c, 3, 3].
        offset: [n, 18, h, w], in pixels: down and right, for each tap.
        mask: [n, 9, h, w].
    """
    torch = lazy_torch()
    height, width = x.shape[2:]
    rows = torch.arange(height, dtype=x.dtype)[:, None]
    columns = torch.arange(width, dtype=x.dtype)[None, :]
    out = 0.0
    for k in range(9):
        down = rows + (k // 3 - 1) + offset[:, 2 * k]
        right = columns + (k % 3 - 1) + offset[:, 2 * k + 1]
        places = torch.stack([2 * right / (width - 1) - 1, 2 * down / (height - 1) - 1], -1)
        read = torch.nn.functional.grid_sample(x, places, padding_mode="zeros", align_corners=True)
        out = out + torch.einsum("oc,nchw->nohw", weight[:, :, k // 3, k % 3], read * mask[:, k : k + 1])
    return out


def _operator(x: Any, weight: Any, offset: Any, bias: Any, mask: Any) -> Any:
    """`sampled` plus a bias, as one operator where it is exported."""
    torch = lazy_torch()
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            "DeformConv",
            (x, weight, offset, bias, mask),
            {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
            dtype=x.dtype,
            shape=(x.shape[0], weight.shape[0], *x.shape[2:]),
            version=OPSET,
        )

    class DeformConv(torch.autograd.Function):  # type: ignore[misc,name-defined]  # torch is looked up at run time
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, offset: Any, bias: Any, mask: Any) -> Any:
            if torch.onnx.is_in_onnx_export():  # what is computed inside would be traced, too
                return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])
            return sampled(x, weight, offset, mask) + bias[:, None, None]

        @staticmethod
        def symbolic(g: Any, x: Any, weight: Any, offset: Any, bias: Any, mask: Any) -> Any:
            found = g.op("DeformConv", x, weight, offset, bias, mask, kernel_shape_i=[3, 3], pads_i=[1, 1, 1, 1])
            rows = weight.type().sizes()[0]
            sizes = x.type().sizes()
            return found.setType(x.type().with_sizes([sizes[0], rows, *sizes[2:]])) if sizes else found

    return DeformConv.apply(x, weight, offset, bias, mask)


def _layer(cin: int, cout: int) -> Any:
    """The places and the mask come from the input itself."""
    torch = lazy_torch()
    nn = torch.nn

    def forward(m: Any, x: Any) -> Any:
        y = _operator(x, m.weight, m.offset(x), m.bias, m.mask(x).sigmoid())
        return m.norm(y).relu()

    net = wired(forward, offset=nn.Conv2d(cin, 18, 3, 1, 1), mask=nn.Conv2d(cin, 9, 3, 1, 1), norm=nn.BatchNorm2d(cout))
    net.weight = nn.Parameter(torch.randn(cout, cin, 3, 3) / (3 * cin**0.5))
    net.bias = nn.Parameter(torch.randn(cout) / 10)
    return net


def deformable() -> Any:
    """Two plain convolutions, two deformable ones, a classifier."""
    nn = lazy_torch().nn

    def plain(cin: int, cout: int, stride: int) -> Any:
        return nn.Sequential(nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU())

    return nn.Sequential(
        plain(3, 24, 2), plain(24, 32, 1), _layer(32, 48), _layer(48, 64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
