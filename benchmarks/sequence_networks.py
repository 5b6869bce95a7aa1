"""Small networks over sequences, graphs and tables as torch modules, one per idea, for the coverage table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.torch_modules import lazy_torch, wired


def _recurrent(kind: str) -> Any:
    nn = lazy_torch().nn
    return wired(
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
    nn = lazy_torch().nn

    def forward(m: Any, x: Any, graph: Any) -> Any:
        x = (graph @ m.first(x)).relu()
        x = (graph @ m.second(x)).relu()
        return m.out(x.mean(1))

    return wired(forward, first=nn.Linear(12, 48), second=nn.Linear(48, 48), out=nn.Linear(48, 3))


def dlrm() -> Any:
    """Dense features and embeddings; their pairwise products go to the top network."""
    torch = lazy_torch()
    nn = torch.nn
    pairs = [(i, j) for i in range(7) for j in range(i)]

    def forward(m: Any, dense: Any, kinds: Any) -> Any:
        x = m.bottom(dense)
        tables = [table(kinds[:, k]) for k, table in enumerate(m.tables)]
        every = torch.stack([x, *tables], 1)
        products = (every @ every.transpose(1, 2))[:, [i for i, _ in pairs], [j for _, j in pairs]]
        return m.top(torch.cat([x, products], 1)).sigmoid()

    return wired(
        forward, bottom=nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()),
        tables=nn.ModuleList(nn.Embedding(50, 32) for _ in range(6)),
        top=nn.Sequential(nn.Linear(32 + len(pairs), 64), nn.ReLU(), nn.Linear(64, 1)),
    )  # fmt: skip


def _rms(width: int) -> Any:
    torch = lazy_torch()
    net = wired(lambda m, x: m.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
    net.weight = torch.nn.Parameter(0.5 + torch.rand(width))
    return net


def _decoder(attend: Callable[[], Any], mlp: Callable[[], Any], width: int = 64, tail: Any = None) -> Any:
    """Two blocks between an embedding and logits."""
    nn = lazy_torch().nn

    def block() -> Any:
        def forward(m: Any, x: Any) -> Any:
            x = x + m.attend(m.norm1(x))
            return x + m.mlp(m.norm2(x))

        return wired(forward, attend=attend(), mlp=mlp(), norm1=_rms(width), norm2=_rms(width))

    return wired(
        lambda m, ids: m.out(m.norm(m.blocks(m.table(ids)))),
        table=nn.Embedding(200, width),
        blocks=nn.Sequential(block(), block()),
        norm=_rms(width),
        out=nn.Linear(width, 200, bias=False),
    )


def _swiglu(linear: Callable[[int, int], Any], width: int = 64, hidden: int = 192) -> Any:
    silu = lazy_torch().nn.functional.silu
    return wired(
        lambda m, x: m.down(silu(m.gate(x)) * m.up(x)),
        gate=linear(width, hidden),
        up=linear(width, hidden),
        down=linear(hidden, width),
    )


def _bare(cin: int, cout: int) -> Any:
    return lazy_torch().nn.Linear(cin, cout, bias=False)


def _attention(linear: Callable[[int, int], Any], turn: Callable[[Any], Any], width: int = 64, heads: int = 4) -> Any:
    size = width // heads

    def forward(m: Any, x: Any) -> Any:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, heads, size).transpose(1, 2) for f in (m.q, m.k, m.v))
        scores = turn(q) @ turn(k).transpose(2, 3) / size**0.5
        return m.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, width))

    return wired(forward, **{name: linear(width, width) for name in "qkvo"})


def lora() -> Any:
    def linear(cin: int, cout: int) -> Any:
        return wired(
            lambda m, x: m.base(x) + 2.0 * m.up(m.down(x)), base=_bare(cin, cout), down=_bare(cin, 8), up=_bare(8, cout)
        )

    return _decoder(lambda: _attention(linear, lambda x: x), lambda: _swiglu(linear))


def rope_interleaved() -> Any:
    torch = lazy_torch()

    def turn(x: Any) -> Any:
        places = torch.arange(x.shape[2], dtype=x.dtype)[:, None]
        angle = places / 10000.0 ** (torch.arange(0, x.shape[3], 2, dtype=x.dtype) / x.shape[3])
        cos, sin = angle.cos(), angle.sin()
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(3)

    return _decoder(lambda: _attention(_bare, turn), lambda: _swiglu(_bare))


def experts() -> Any:
    """All experts run, the router weighs the two best; weights are stacked, [experts, in, out]."""
    torch = lazy_torch()
    nn = torch.nn

    def mixture() -> Any:
        def forward(m: Any, x: Any) -> Any:
            best = m.router(x).softmax(-1).topk(2, -1)
            share = torch.zeros_like(m.router(x)).scatter(-1, best.indices, best.values)
            hidden = torch.einsum("bnd,edh->bneh", x, m.up).relu()
            return torch.einsum("bneh,ehd,bne->bnd", hidden, m.down, share)

        net = wired(forward, router=_bare(64, 4))
        net.up = nn.Parameter(torch.randn(4, 64, 96) / 8)
        net.down = nn.Parameter(torch.randn(4, 96, 64) / 10)
        return net

    return _decoder(lambda: _attention(_bare, lambda x: x), mixture)


def ssm(width: int = 64, heads: int = 4, groups: int = 2, state: int = 16, length: int = 12) -> Any:
    """Mamba-2 in its quadratic form: B and C are shared by the heads of a group, one decay per head."""
    torch = lazy_torch()
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
        net = wired(
            forward, into=_bare(width, inner + channels + heads), norm=_rms(inner), out=_bare(inner, width),
            conv=nn.Conv1d(channels, channels, 4, padding=3, groups=channels),
        )  # fmt: skip
        for name in ("shift", "rate", "skip"):
            setattr(net, name, nn.Parameter(torch.rand(heads)))
        return net

    return _decoder(mix, lambda: _swiglu(_bare))


def cached() -> Any:
    """One step of a decoder with grouped queries: keys and values of the past come in, and go out with one more."""
    torch = lazy_torch()
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

    return wired(
        forward, table=nn.Embedding(200, 64), out=_bare(64, 200), attends=nn.ModuleList(attention() for _ in range(2)),
        mlps=nn.ModuleList(_swiglu(_bare) for _ in range(2)),
        norms=nn.ModuleList(nn.ModuleList([_rms(64), _rms(64)]) for _ in range(2)),
    )  # fmt: skip
