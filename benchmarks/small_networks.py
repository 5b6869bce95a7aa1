"""Small networks as torch modules, one per idea: what the coverage table exports beside the library `transformers`.

torch is imported when a network is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Network = tuple[str, str, Callable[[], Any], tuple[int, ...], bool]
"""Name, title, how it is built, size of the input without the batch, whether the batch is fixed."""


def _torch() -> Any:
    import torch

    return torch


def _conv(cin: int, cout: int, k: int = 3, stride: int = 1, groups: int = 1) -> Any:
    """Convolution, batch norm, ReLU."""
    nn = _torch().nn
    return nn.Sequential(
        nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(cout), nn.ReLU()
    )


def _head(width: int, classes: int = 10) -> list[Any]:
    nn = _torch().nn
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def _wired(forward: Callable[..., Any], **parts: Any) -> Any:
    """A module with these parts, whose forward pass is `forward(module, *inputs)`."""
    nn = _torch().nn

    class Wired(nn.Module):  # type: ignore[misc,name-defined]  # torch is looked up at run time
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

        def forward(self, *inputs: Any) -> Any:
            return forward(self, *inputs)

    return Wired()


# -- convolutional -----------------------------------------------------------------------------------------------------


def plain() -> Any:
    nn = _torch().nn
    return nn.Sequential(_conv(3, 32), nn.MaxPool2d(2), _conv(32, 64), nn.MaxPool2d(2), _conv(64, 64), *_head(64))


def residual() -> Any:
    nn = _torch().nn

    def block(width: int) -> Any:
        last = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        return _wired(lambda m, x: (m.last(m.first(x)) + x).relu(), first=_conv(width, width), last=last)

    return nn.Sequential(_conv(3, 32), block(32), _conv(32, 64, 3, 2), block(64), block(64), *_head(64))


def preactivation() -> Any:
    nn = _torch().nn

    def block(width: int) -> Any:
        def half() -> Any:
            return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1, bias=False))

        return _wired(lambda m, x: x + m.second(m.first(x)), first=half(), second=half())

    return nn.Sequential(nn.Conv2d(3, 48, 3, 1, 1), block(48), block(48), nn.BatchNorm2d(48), nn.ReLU(), *_head(48))


def dense() -> Any:
    torch = _torch()
    nn = torch.nn

    def layer(cin: int) -> Any:
        body = nn.Sequential(nn.BatchNorm2d(cin), nn.ReLU(), nn.Conv2d(cin, 16, 3, 1, 1, bias=False))
        return _wired(lambda m, x: torch.cat([x, m.body(x)], 1), body=body)

    return nn.Sequential(_conv(3, 32), layer(32), layer(48), layer(64), _conv(80, 40, 1), *_head(40))


def inception() -> Any:
    torch = _torch()
    nn = torch.nn

    def block(cin: int) -> Any:
        return _wired(
            lambda m, x: torch.cat([m.one(x), m.three(x), m.five(x), m.pool(x)], 1),
            one=_conv(cin, 16, 1),
            three=nn.Sequential(_conv(cin, 16, 1), _conv(16, 32, 3)),
            five=nn.Sequential(_conv(cin, 8, 1), _conv(8, 16, 5)),
            pool=nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv(cin, 16, 1)),
        )

    return nn.Sequential(_conv(3, 32, 3, 2), block(32), block(80), *_head(80))


def grouped() -> Any:
    nn = _torch().nn

    def block(width: int) -> Any:
        body = nn.Sequential(_conv(width, 64, 1), _conv(64, 64, 3, groups=8), _conv(64, width, 1))
        return _wired(lambda m, x: m.body(x) + x, body=body)

    return nn.Sequential(_conv(3, 48), block(48), block(48), *_head(48))


def depthwise() -> Any:
    nn = _torch().nn

    def block(width: int) -> Any:
        body = nn.Sequential(_conv(width, 4 * width, 1), _conv(4 * width, 4 * width, 3, groups=4 * width))
        last = nn.Sequential(nn.Conv2d(4 * width, width, 1, bias=False), nn.BatchNorm2d(width))
        return _wired(lambda m, x: m.last(m.body(x)) + x, body=body, last=last)

    return nn.Sequential(_conv(3, 24), block(24), block(24), *_head(24))


def shuffle() -> Any:
    torch = _torch()
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
        return _wired(forward, right=right)

    return nn.Sequential(_conv(3, 48), block(48), block(48), _conv(48, 64, 1), *_head(64))


def excite() -> Any:
    nn = _torch().nn

    def block(width: int) -> Any:
        gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width // 4, 1), nn.ReLU(), nn.Conv2d(width // 4, width, 1),
            nn.Sigmoid(),
        )  # fmt: skip

        def forward(m: Any, x: Any) -> Any:
            y = m.body(x)
            return x + y * m.gate(y)

        return _wired(forward, body=_conv(width, width), gate=gate)

    return nn.Sequential(_conv(3, 48), block(48), block(48), *_head(48))


def _down_up(up: Callable[[int, int], Any]) -> Any:
    torch = _torch()
    nn = torch.nn

    def forward(m: Any, x: Any) -> Any:
        a = m.a(x)
        b = m.b(m.pool(a))
        c = m.c(m.pool(b))
        y = m.d(torch.cat([m.up1(c), b], 1))
        return m.out(m.e(torch.cat([m.up2(y), a], 1)))

    return _wired(
        forward, pool=nn.MaxPool2d(2), a=_conv(3, 16), b=_conv(16, 32), c=_conv(32, 64), up1=up(64, 32), up2=up(32, 16),
        d=_conv(64, 32), e=_conv(32, 16), out=nn.Conv2d(16, 2, 1),
    )  # fmt: skip


def unet() -> Any:
    return _down_up(lambda cin, cout: _torch().nn.ConvTranspose2d(cin, cout, 2, 2))


def unet_interpolated() -> Any:
    nn = _torch().nn
    return _down_up(
        lambda cin, cout: nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), nn.Conv2d(cin, cout, 1)
        )
    )


def sampled() -> Any:
    """Upsampling at learned places (DySample): a convolution says where `grid_sample` looks."""
    torch = _torch()
    nn = torch.nn

    def forward(m: Any, x: Any) -> Any:
        y = m.stem(x)
        shift = nn.functional.pixel_shuffle(m.offset(y), 2).permute(0, 2, 3, 1)
        places = torch.linspace(-1, 1, 32)
        grid = torch.stack(torch.meshgrid(places, places, indexing="xy"), -1)
        y = nn.functional.grid_sample(y, grid + 0.1 * shift.tanh(), align_corners=True)
        return m.out(m.after(y))

    return _wired(
        forward, stem=nn.Sequential(_conv(3, 32), _conv(32, 96, 3, 2)), offset=nn.Conv2d(96, 8, 1), after=_conv(96, 32),
        out=nn.Conv2d(32, 2, 1),
    )  # fmt: skip


def fpn() -> Any:
    nn = _torch().nn

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
    return _wired(
        forward, a=_conv(3, 32, 3, 2), b=_conv(32, 48, 3, 2), c=_conv(48, 64, 3, 2), head=head, **sides, **smooth
    )


def yolo() -> Any:
    """C2f blocks, SPPF, and a decoupled head whose boxes are means over bins (DFL)."""
    torch = _torch()
    nn = torch.nn

    def c2f(cin: int, cout: int) -> Any:
        def forward(m: Any, x: Any) -> Any:
            left, right = m.first(x).chunk(2, 1)
            deep = right + m.body(right)
            return m.last(torch.cat([left, right, deep], 1))

        half = cout // 2
        return _wired(
            forward, first=_conv(cin, cout, 1), last=_conv(3 * half, cout, 1),
            body=nn.Sequential(_conv(half, half), _conv(half, half)),
        )  # fmt: skip

    def sppf(width: int) -> Any:
        def forward(m: Any, x: Any) -> Any:
            a = m.first(x)
            b = m.pool(a)
            return m.last(torch.cat([a, b, m.pool(b)], 1))

        return _wired(
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

    return _wired(
        forward, small=nn.Sequential(_conv(3, 24, 3, 2), c2f(24, 48)),
        large=nn.Sequential(_conv(48, 64, 3, 2), c2f(64, 64)), sppf=sppf(64), join=c2f(112, 48), box1=branch(48, 32),
        box2=branch(64, 32), kind1=branch(48, 5),
        kind2=branch(64, 5), mean=mean,
    )  # fmt: skip


def pixels() -> Any:
    nn = _torch().nn
    return nn.Sequential(
        nn.PixelUnshuffle(2), _conv(12, 48), _conv(48, 64), nn.Conv2d(64, 48, 3, 1, 1), nn.PixelShuffle(2), nn.ReLU(),
        nn.Conv2d(12, 3, 3, 1, 1),
    )  # fmt: skip


def generator() -> Any:
    nn = _torch().nn
    up = (nn.ConvTranspose2d(64, 48, 4, 2, 1), nn.BatchNorm2d(48), nn.ReLU(), nn.ConvTranspose2d(48, 32, 4, 2, 1))
    return nn.Sequential(_conv(8, 64), *up, nn.ReLU(), nn.ConvTranspose2d(32, 3, 3, 1, 1), nn.Tanh())


def temporal() -> Any:
    nn = _torch().nn

    def block(width: int, gap: int) -> Any:
        body = nn.Sequential(
            nn.Conv1d(width, width, 3, padding=gap, dilation=gap), nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=gap, dilation=gap),
        )  # fmt: skip
        return _wired(lambda m, x: (x + m.body(x)).relu(), body=body)

    return nn.Sequential(
        nn.Conv1d(6, 32, 5, padding=2), block(32, 1), block(32, 2), block(32, 4), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(32, 5),
    )  # fmt: skip


def volume() -> Any:
    nn = _torch().nn

    def block(cin: int, cout: int) -> Any:
        return nn.Sequential(nn.Conv3d(cin, cout, 3, 1, 1), nn.BatchNorm3d(cout), nn.ReLU())

    return nn.Sequential(
        block(1, 16), nn.MaxPool3d(2), block(16, 32), block(32, 32), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Linear(32, 4),
    )  # fmt: skip


def mixer() -> Any:
    nn = _torch().nn

    def block(tokens: int, width: int) -> Any:
        def mlp(size: int, hidden: int) -> Any:
            return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))

        def forward(m: Any, x: Any) -> Any:
            x = x + m.tokens(m.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + m.channels(m.norm2(x))

        return _wired(
            forward, norm1=nn.LayerNorm(width), norm2=nn.LayerNorm(width), tokens=mlp(tokens, 32),
            channels=mlp(width, 192),
        )  # fmt: skip

    def forward(m: Any, x: Any) -> Any:
        y = m.patch(x).flatten(2).transpose(1, 2)
        return m.head(m.norm(m.blocks(y)).mean(1))

    return _wired(
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


# -- sequences, graphs, tables -----------------------------------------------------------------------------------------


def _recurrent(kind: str) -> Any:
    nn = _torch().nn
    return _wired(
        lambda m, x: m.out(m.net(m.table(x))[0]),
        table=nn.Embedding(200, 32),
        net=getattr(nn, kind)(32, 48, num_layers=2, batch_first=True),
        out=nn.Linear(48, 7),
    )


def lstm() -> Any:
    return _recurrent("LSTM")


def gru() -> Any:
    return _recurrent("GRU")


def gcn() -> Any:
    nn = _torch().nn

    def forward(m: Any, x: Any, graph: Any) -> Any:
        x = (graph @ m.first(x)).relu()
        x = (graph @ m.second(x)).relu()
        return m.out(x.mean(1))

    return _wired(forward, first=nn.Linear(12, 48), second=nn.Linear(48, 48), out=nn.Linear(48, 3))


def dlrm() -> Any:
    """Dense features and embeddings; their pairwise products go to the top network."""
    torch = _torch()
    nn = torch.nn
    pairs = [(i, j) for i in range(7) for j in range(i)]

    def forward(m: Any, dense: Any, kinds: Any) -> Any:
        x = m.bottom(dense)
        tables = [table(kinds[:, k]) for k, table in enumerate(m.tables)]
        every = torch.stack([x, *tables], 1)
        products = (every @ every.transpose(1, 2))[:, [i for i, _ in pairs], [j for _, j in pairs]]
        return m.top(torch.cat([x, products], 1)).sigmoid()

    return _wired(
        forward, bottom=nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()),
        tables=nn.ModuleList(nn.Embedding(50, 32) for _ in range(6)),
        top=nn.Sequential(nn.Linear(32 + len(pairs), 64), nn.ReLU(), nn.Linear(64, 1)),
    )  # fmt: skip


def _rms(width: int) -> Any:
    torch = _torch()
    net = _wired(lambda m, x: m.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
    net.weight = torch.nn.Parameter(0.5 + torch.rand(width))
    return net


def _decoder(attend: Callable[[], Any], mlp: Callable[[], Any], width: int = 64, tail: Any = None) -> Any:
    """Two blocks between an embedding and logits."""
    nn = _torch().nn

    def block() -> Any:
        def forward(m: Any, x: Any) -> Any:
            x = x + m.attend(m.norm1(x))
            return x + m.mlp(m.norm2(x))

        return _wired(forward, attend=attend(), mlp=mlp(), norm1=_rms(width), norm2=_rms(width))

    return _wired(
        lambda m, ids: m.out(m.norm(m.blocks(m.table(ids)))),
        table=nn.Embedding(200, width),
        blocks=nn.Sequential(block(), block()),
        norm=_rms(width),
        out=nn.Linear(width, 200, bias=False),
    )


def _swiglu(linear: Callable[[int, int], Any], width: int = 64, hidden: int = 192) -> Any:
    silu = _torch().nn.functional.silu
    return _wired(
        lambda m, x: m.down(silu(m.gate(x)) * m.up(x)),
        gate=linear(width, hidden),
        up=linear(width, hidden),
        down=linear(hidden, width),
    )


def _bare(cin: int, cout: int) -> Any:
    return _torch().nn.Linear(cin, cout, bias=False)


def _attention(linear: Callable[[int, int], Any], turn: Callable[[Any], Any], width: int = 64, heads: int = 4) -> Any:
    size = width // heads

    def forward(m: Any, x: Any) -> Any:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, heads, size).transpose(1, 2) for f in (m.q, m.k, m.v))
        scores = turn(q) @ turn(k).transpose(2, 3) / size**0.5
        return m.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, width))

    return _wired(forward, **{name: linear(width, width) for name in "qkvo"})


def lora() -> Any:
    def linear(cin: int, cout: int) -> Any:
        return _wired(
            lambda m, x: m.base(x) + 2.0 * m.up(m.down(x)), base=_bare(cin, cout), down=_bare(cin, 8), up=_bare(8, cout)
        )

    return _decoder(lambda: _attention(linear, lambda x: x), lambda: _swiglu(linear))


def rope_interleaved() -> Any:
    torch = _torch()

    def turn(x: Any) -> Any:
        places = torch.arange(x.shape[2], dtype=x.dtype)[:, None]
        angle = places / 10000.0 ** (torch.arange(0, x.shape[3], 2, dtype=x.dtype) / x.shape[3])
        cos, sin = angle.cos(), angle.sin()
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(3)

    return _decoder(lambda: _attention(_bare, turn), lambda: _swiglu(_bare))


def experts() -> Any:
    """All experts run, the router weighs the two best; weights are stacked, [experts, in, out]."""
    torch = _torch()
    nn = torch.nn

    def mixture() -> Any:
        def forward(m: Any, x: Any) -> Any:
            best = m.router(x).softmax(-1).topk(2, -1)
            share = torch.zeros_like(m.router(x)).scatter(-1, best.indices, best.values)
            hidden = torch.einsum("bnd,edh->bneh", x, m.up).relu()
            return torch.einsum("bneh,ehd,bne->bnd", hidden, m.down, share)

        net = _wired(forward, router=_bare(64, 4))
        net.up = nn.Parameter(torch.randn(4, 64, 96) / 8)
        net.down = nn.Parameter(torch.randn(4, 96, 64) / 10)
        return net

    return _decoder(lambda: _attention(_bare, lambda x: x), mixture)


def ssm(width: int = 64, heads: int = 4, groups: int = 2, state: int = 16, length: int = 12) -> Any:
    """Mamba-2 in its quadratic form: B and C are shared by the heads of a group, one decay per head."""
    torch = _torch()
    nn = torch.nn
    inner, size = 2 * width, 2 * width // heads

    def mix() -> Any:
        def forward(m: Any, x: Any) -> Any:
            b, n, _ = x.shape
            z, mixed, dt = m.into(x).split((inner, inner + 2 * groups * state, heads), 2)
            mixed = nn.functional.silu(m.conv(mixed.transpose(1, 2))[..., :length].transpose(1, 2))
            y, keys, queries = mixed.split((inner, groups * state, groups * state), 2)
            keys, queries = (t.view(b, n, groups, state).repeat_interleave(heads // groups, 2) for t in (keys, queries))
            dt = nn.functional.softplus(dt + m.shift)
            decay = (-m.rate.exp() * dt).cumsum(1).transpose(1, 2)
            mask = torch.tril(torch.ones(length, length))
            weight = (decay[..., :, None] - decay[..., None, :]).masked_fill(mask == 0, -1e9).exp()
            scores = torch.einsum("bnhs,bmhs->bhnm", queries, keys) * weight * dt.transpose(1, 2)[:, :, None, :]
            heads_ = y.view(b, n, heads, size)
            out = torch.einsum("bhnm,bmhd->bnhd", scores, heads_) + m.skip[:, None] * heads_
            return m.out(m.norm(out.reshape(b, n, inner) * nn.functional.silu(z)))

        channels = inner + 2 * groups * state
        net = _wired(
            forward, into=_bare(width, inner + channels + heads), norm=_rms(inner), out=_bare(inner, width),
            conv=nn.Conv1d(channels, channels, 4, padding=3, groups=channels),
        )  # fmt: skip
        for name in ("shift", "rate", "skip"):
            setattr(net, name, nn.Parameter(torch.rand(heads)))
        return net

    return _decoder(mix, lambda: _swiglu(_bare))


def cached() -> Any:
    """One step of a decoder with grouped queries: keys and values of the past come in, and go out with one more."""
    torch = _torch()
    nn = torch.nn

    def attention() -> Any:
        return nn.ModuleDict({"q": _bare(64, 64), "k": _bare(64, 32), "v": _bare(64, 32), "o": _bare(64, 64)})

    def step(m: Any, x: Any, key: Any, value: Any) -> Any:
        b, n, _ = x.shape
        q = m["q"](x).view(b, n, 4, 16).transpose(1, 2)
        key = torch.cat([key, m["k"](x).view(b, n, 2, 16).transpose(1, 2)], 2)
        value = torch.cat([value, m["v"](x).view(b, n, 2, 16).transpose(1, 2)], 2)
        wide = [t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (key, value)]
        y = (q @ wide[0].transpose(2, 3) / 4.0).softmax(-1) @ wide[1]
        return m["o"](y.transpose(1, 2).reshape(b, n, 64)), key, value

    def forward(m: Any, ids: Any, key0: Any, value0: Any, key1: Any, value1: Any) -> Any:
        x, past = m.table(ids), []
        for attend, mlp, norms, (key, value) in zip(
            m.attends, m.mlps, m.norms, ((key0, value0), (key1, value1)), strict=True
        ):
            y, key, value = step(attend, norms[0](x), key, value)
            x = x + y
            x = x + mlp(norms[1](x))
            past += [key, value]
        return m.out(x), *past

    return _wired(
        forward, table=nn.Embedding(200, 64), out=_bare(64, 200), attends=nn.ModuleList(attention() for _ in range(2)),
        mlps=nn.ModuleList(_swiglu(_bare) for _ in range(2)),
        norms=nn.ModuleList(nn.ModuleList([_rms(64), _rms(64)]) for _ in range(2)),
    )  # fmt: skip
