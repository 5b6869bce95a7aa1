"""Small convolutional networks and a mixer as torch modules, one per idea, for the coverage table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.torch_modules import lazy_torch, wired

Network = tuple[str, str, Callable[[], Any], tuple[int, ...], bool]
"""Name, title, how it is built, size of the input without the batch, whether the batch is fixed."""


def _conv(cin: int, cout: int, k: int = 3, stride: int = 1, groups: int = 1) -> Any:
    """Convolution, batch norm, ReLU."""
    nn = lazy_torch().nn
    return nn.Sequential(
        nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(cout), nn.ReLU()
    )


def _head(width: int, classes: int = 10) -> list[Any]:
    nn = lazy_torch().nn
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


# -- convolutional -----------------------------------------------------------------------------------------------------


def plain() -> Any:
    nn = lazy_torch().nn
    return nn.Sequential(_conv(3, 32), nn.MaxPool2d(2), _conv(32, 64), nn.MaxPool2d(2), _conv(64, 64), *_head(64))


def residual() -> Any:
    nn = lazy_torch().nn

    def block(width: int) -> Any:
        last = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        return wired(lambda m, x: (m.last(m.first(x)) + x).relu(), first=_conv(width, width), last=last)

    return nn.Sequential(_conv(3, 32), block(32), _conv(32, 64, 3, 2), block(64), block(64), *_head(64))


def preactivation() -> Any:
    nn = lazy_torch().nn

    def block(width: int) -> Any:
        def half() -> Any:
            return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1, bias=False))

        return wired(lambda m, x: x + m.second(m.first(x)), first=half(), second=half())

    return nn.Sequential(nn.Conv2d(3, 48, 3, 1, 1), block(48), block(48), nn.BatchNorm2d(48), nn.ReLU(), *_head(48))


def dense() -> Any:
    torch = lazy_torch()
    nn = torch.nn

    def layer(cin: int) -> Any:
        body = nn.Sequential(nn.BatchNorm2d(cin), nn.ReLU(), nn.Conv2d(cin, 16, 3, 1, 1, bias=False))
        return wired(lambda m, x: torch.cat([x, m.body(x)], 1), body=body)

    return nn.Sequential(_conv(3, 32), layer(32), layer(48), layer(64), _conv(80, 40, 1), *_head(40))


def inception() -> Any:
    torch = lazy_torch()
    nn = torch.nn

    def block(cin: int) -> Any:
        return wired(
            lambda m, x: torch.cat([m.one(x), m.three(x), m.five(x), m.pool(x)], 1),
            one=_conv(cin, 16, 1),
            three=nn.Sequential(_conv(cin, 16, 1), _conv(16, 32, 3)),
            five=nn.Sequential(_conv(cin, 8, 1), _conv(8, 16, 5)),
            pool=nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv(cin, 16, 1)),
        )

    return nn.Sequential(_conv(3, 32, 3, 2), block(32), block(80), *_head(80))


def grouped() -> Any:
    nn = lazy_torch().nn

    def block(width: int) -> Any:
        body = nn.Sequential(_conv(width, 64, 1), _conv(64, 64, 3, groups=8), _conv(64, width, 1))
        return wired(lambda m, x: m.body(x) + x, body=body)

    return nn.Sequential(_conv(3, 48), block(48), block(48), *_head(48))


def depthwise() -> Any:
    nn = lazy_torch().nn

    def block(width: int) -> Any:
        body = nn.Sequential(_conv(width, 4 * width, 1), _conv(4 * width, 4 * width, 3, groups=4 * width))
        last = nn.Sequential(nn.Conv2d(4 * width, width, 1, bias=False), nn.BatchNorm2d(width))
        return wired(lambda m, x: m.last(m.body(x)) + x, body=body, last=last)

    return nn.Sequential(_conv(3, 24), block(24), block(24), *_head(24))


def shuffle() -> Any:
    torch = lazy_torch()
    nn = torch.nn

    def block(width: int) -> Any:
        half = width // 2

        def forward(m: Any, x: Any) -> Any:
            left, right = x.chunk(2, 1)
            y = torch.cat([left, m.right(right)], 1)
            b, c, h, w = y.shape
            return y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)

        right = nn.Sequential(
            _conv(half, half, 1), nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False), nn.BatchNorm2d(half),
            _conv(half, half, 1),
        )  # fmt: skip
        return wired(forward, right=right)

    return nn.Sequential(_conv(3, 48), block(48), block(48), _conv(48, 64, 1), *_head(64))


def excite() -> Any:
    nn = lazy_torch().nn

    def block(width: int) -> Any:
        gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width // 4, 1), nn.ReLU(), nn.Conv2d(width // 4, width, 1),
            nn.Sigmoid(),
        )  # fmt: skip

        def forward(m: Any, x: Any) -> Any:
            y = m.body(x)
            return x + y * m.gate(y)

        return wired(forward, body=_conv(width, width), gate=gate)

    return nn.Sequential(_conv(3, 48), block(48), block(48), *_head(48))


def _down_up(up: Callable[[int, int], Any]) -> Any:
    torch = lazy_torch()
    nn = torch.nn

    def forward(m: Any, x: Any) -> Any:
        a = m.a(x)
        b = m.b(m.pool(a))
        c = m.c(m.pool(b))
        y = m.d(torch.cat([m.up1(c), b], 1))
        return m.out(m.e(torch.cat([m.up2(y), a], 1)))

    return wired(
        forward, pool=nn.MaxPool2d(2), a=_conv(3, 16), b=_conv(16, 32), c=_conv(32, 64), up1=up(64, 32), up2=up(32, 16),
        d=_conv(64, 32), e=_conv(32, 16), out=nn.Conv2d(16, 2, 1),
    )  # fmt: skip


def unet() -> Any:
    return _down_up(lambda cin, cout: lazy_torch().nn.ConvTranspose2d(cin, cout, 2, 2))


def unet_interpolated() -> Any:
    nn = lazy_torch().nn
    return _down_up(
        lambda cin, cout: nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), nn.Conv2d(cin, cout, 1)
        )
    )


def sampled() -> Any:
    """Upsampling at learned places (DySample): a convolution says where `grid_sample` looks."""
    torch = lazy_torch()
    nn = torch.nn

    def forward(m: Any, x: Any) -> Any:
        y = m.stem(x)
        shift = nn.functional.pixel_shuffle(m.offset(y), 2).permute(0, 2, 3, 1)
        places = torch.linspace(-1, 1, 32)
        grid = torch.stack(torch.meshgrid(places, places, indexing="xy"), -1)
        y = nn.functional.grid_sample(y, grid + 0.1 * shift.tanh(), align_corners=True)
        return m.out(m.after(y))

    return wired(
        forward, stem=nn.Sequential(_conv(3, 32), _conv(32, 96, 3, 2)), offset=nn.Conv2d(96, 8, 1), after=_conv(96, 32),
        out=nn.Conv2d(32, 2, 1),
    )  # fmt: skip


def fpn() -> Any:
    nn = lazy_torch().nn

    def forward(m: Any, x: Any) -> Any:
        a = m.a(x)
        b = m.b(a)
        c = m.c(b)
        p3 = m.l3(c)
        p2 = m.l2(b) + nn.functional.interpolate(p3, scale_factor=2.0)
        p1 = m.l1(a) + nn.functional.interpolate(p2, scale_factor=2.0)
        return m.head(m.s1(p1)), m.head(m.s2(p2)), m.head(m.s3(p3))

    sides = {f"l{k}": nn.Conv2d(width, 32, 1) for k, width in ((1, 32), (2, 48), (3, 64))}
    smooth = {f"s{k}": nn.Conv2d(32, 32, 3, 1, 1) for k in (1, 2, 3)}
    head = nn.Sequential(_conv(32, 32), nn.Conv2d(32, 8, 1))
    return wired(
        forward, a=_conv(3, 32, 3, 2), b=_conv(32, 48, 3, 2), c=_conv(48, 64, 3, 2), head=head, **sides, **smooth
    )


def yolo() -> Any:
    """C2f blocks, SPPF, and a decoupled head whose boxes are means over bins (DFL)."""
    torch = lazy_torch()
    nn = torch.nn

    def c2f(cin: int, cout: int) -> Any:
        def forward(m: Any, x: Any) -> Any:
            left, right = m.first(x).chunk(2, 1)
            deep = right + m.body(right)
            return m.last(torch.cat([left, right, deep], 1))

        half = cout // 2
        return wired(
            forward, first=_conv(cin, cout, 1), last=_conv(3 * half, cout, 1),
            body=nn.Sequential(_conv(half, half), _conv(half, half)),
        )  # fmt: skip

    def sppf(width: int) -> Any:
        def forward(m: Any, x: Any) -> Any:
            a = m.first(x)
            b = m.pool(a)
            return m.last(torch.cat([a, b, m.pool(b)], 1))

        return wired(
            forward, first=_conv(width, width // 2, 1), last=_conv(3 * width // 2, width, 1), pool=nn.MaxPool2d(5, 1, 2)
        )

    def forward(m: Any, x: Any) -> Any:
        small = m.small(x)
        large = m.sppf(m.large(small))
        small = m.join(torch.cat([nn.functional.interpolate(large, scale_factor=2.0), small], 1))
        found = []
        for y, box, kind in ((small, m.box1, m.kind1), (large, m.box2, m.kind2)):
            found.append(torch.cat([box(y), kind(y)], 1).flatten(2))
        boxes, kinds = torch.cat(found, 2).split((4 * 8, 5), 1)
        b, _, n = boxes.shape
        bins = boxes.view(b, 4, 8, n).transpose(2, 1).softmax(1)
        return torch.cat([m.mean(bins).view(b, 4, n), kinds.sigmoid()], 1)

    mean = nn.Conv2d(8, 1, 1, bias=False)
    with torch.no_grad():
        mean.weight.copy_(torch.arange(8.0).view(1, 8, 1, 1))

    def branch(cin: int, cout: int) -> Any:
        return nn.Sequential(_conv(cin, 32), _conv(32, 32), nn.Conv2d(32, cout, 1))

    return wired(
        forward, small=nn.Sequential(_conv(3, 24, 3, 2), c2f(24, 48)),
        large=nn.Sequential(_conv(48, 64, 3, 2), c2f(64, 64)), sppf=sppf(64), join=c2f(112, 48), box1=branch(48, 32),
        box2=branch(64, 32), kind1=branch(48, 5),
        kind2=branch(64, 5), mean=mean,
    )  # fmt: skip


def pixels() -> Any:
    nn = lazy_torch().nn
    return nn.Sequential(
        nn.PixelUnshuffle(2), _conv(12, 48), _conv(48, 64), nn.Conv2d(64, 48, 3, 1, 1), nn.PixelShuffle(2), nn.ReLU(),
        nn.Conv2d(12, 3, 3, 1, 1),
    )  # fmt: skip


def generator() -> Any:
    nn = lazy_torch().nn
    up = (nn.ConvTranspose2d(64, 48, 4, 2, 1), nn.BatchNorm2d(48), nn.ReLU(), nn.ConvTranspose2d(48, 32, 4, 2, 1))
    return nn.Sequential(_conv(8, 64), *up, nn.ReLU(), nn.ConvTranspose2d(32, 3, 3, 1, 1), nn.Tanh())


def temporal() -> Any:
    nn = lazy_torch().nn

    def block(width: int, gap: int) -> Any:
        body = nn.Sequential(
            nn.Conv1d(width, width, 3, padding=gap, dilation=gap), nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=gap, dilation=gap),
        )  # fmt: skip
        return wired(lambda m, x: (x + m.body(x)).relu(), body=body)

    return nn.Sequential(
        nn.Conv1d(6, 32, 5, padding=2), block(32, 1), block(32, 2), block(32, 4), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(32, 5),
    )  # fmt: skip


def volume() -> Any:
    nn = lazy_torch().nn

    def block(cin: int, cout: int) -> Any:
        return nn.Sequential(nn.Conv3d(cin, cout, 3, 1, 1), nn.BatchNorm3d(cout), nn.ReLU())

    return nn.Sequential(
        block(1, 16), nn.MaxPool3d(2), block(16, 32), block(32, 32), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Linear(32, 4),
    )  # fmt: skip


def mixer() -> Any:
    nn = lazy_torch().nn

    def block(tokens: int, width: int) -> Any:
        def mlp(size: int, hidden: int) -> Any:
            return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))

        def forward(m: Any, x: Any) -> Any:
            x = x + m.tokens(m.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + m.channels(m.norm2(x))

        return wired(
            forward, norm1=nn.LayerNorm(width), norm2=nn.LayerNorm(width), tokens=mlp(tokens, 32),
            channels=mlp(width, 192),
        )  # fmt: skip

    def forward(m: Any, x: Any) -> Any:
        y = m.patch(x).flatten(2).transpose(1, 2)
        return m.head(m.norm(m.blocks(y)).mean(1))

    return wired(
        forward, patch=nn.Conv2d(3, 64, 8, 8), blocks=nn.Sequential(block(16, 64), block(16, 64)),
        norm=nn.LayerNorm(64), head=nn.Linear(64, 10),
    )  # fmt: skip


NETWORKS: tuple[Network, ...] = (
    ("plain", "Plain convolutions", plain, (3, 32, 32), False),
    ("residual", "Residual blocks", residual, (3, 32, 32), False),
    ("preactivation", "Pre-activation residual blocks", preactivation, (3, 32, 32), False),
    ("dense", "Dense concatenation", dense, (3, 32, 32), False),
    ("inception", "Inception", inception, (3, 32, 32), False),
    ("grouped", "Grouped convolutions (ResNeXt)", grouped, (3, 32, 32), False),
    ("depthwise", "Depthwise, inverted residuals", depthwise, (3, 32, 32), False),
    ("shuffle", "Channel shuffle (ShuffleNet v2)", shuffle, (3, 32, 32), False),
    ("excite", "Squeeze and excite", excite, (3, 32, 32), False),
    ("unet", "U-Net, transposed convolutions", unet, (3, 32, 32), False),
    ("unet-interpolated", "U-Net, bilinear upsampling", unet_interpolated, (3, 32, 32), False),
    ("sampled", "Upsampling at learned places", sampled, (3, 32, 32), False),
    ("fpn", "FPN, shared head", fpn, (3, 64, 64), False),
    ("yolo", "YOLO: C2f, SPPF, DFL head", yolo, (3, 32, 32), False),
    ("pixels", "Pixel shuffle and unshuffle", pixels, (3, 16, 16), False),
    ("generator", "Transposed convolutions", generator, (8, 8, 8), False),
    ("temporal", "1-D convolutions, dilated", temporal, (6, 40), False),
    ("volume", "3-D convolutions", volume, (1, 8, 16, 16), False),
    ("mixer", "MLP-Mixer", mixer, (3, 32, 32), False),
)
