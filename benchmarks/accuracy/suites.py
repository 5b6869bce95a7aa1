"""The suites: which networks, data, targets and methods; every suite yields rows as they are measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.accuracy import data, evaluate
from benchmarks.accuracy.data import Array, Images
from benchmarks.accuracy.rows import OURS, PEER, PUBLISHED, Row
from benchmarks.paths import cache

SCREENING_IMAGES = 2000
FINALISTS = 3
HALF = "500"

CIFAR_TARGETS = (0.8, 0.7, 0.6, 0.5)
IMAGENET_TARGETS = (0.85, 0.7)
DEIT_REMOVED = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
DEIT_TARGETS = (0.8, 0.7, 0.6)
TEXT_TARGETS = (0.8, 0.6)

OURS_BY_SUITE = {
    "cifar": ("obspa", "obspa@bn", "obspa@noise"),
    "imagenet": ("obspa",),
    "deit": ("vbp", "obspa", "ob2c"),
    "text": ("obspa", "flap", "l2"),
}
"""Ours; the first is the one that is compared. What stands behind an @ are made-up calibration samples in place of real
ones, behind a + the compensation of a criterion that is no method, as in `hap+obs` (widths by loss per cost). `l2` is
plain magnitude: a criterion, nothing is reconstructed."""
DATA_FREE = frozenset({"l1", "l2"})

CIFAR_NETWORKS = ("resnet20_cifar10_bn", "resnet56_cifar10_bn")
IMAGENET_NETWORKS = {"mobilenetv2_1.0_224_imagenet": "mobilenetv2", "squeezenet1.1_imagenet": "squeezenet"}
DEIT = "deit_tiny_patch16_224_imagenet"
MINILM, STORIES = "minilm_l6_v2_sentence", "stories260K_rotate_half_ts"

# DeiT-T right after pruning MLP neurons by activation variance, without fine-tuning: arXiv 2507.12988, table 10.
DEIT_PUBLISHED_DENSE = 72.02
DEIT_PUBLISHED = (71.67, 70.95, 70.05, 68.87, 67.37, 64.76, 61.12, 55.64, 49.77, 39.58)


@dataclass(frozen=True)
class Options:
    """Of one run."""

    seeds: int = 3
    targets: tuple[float, ...] = ()
    """Shares of the MACs instead of the suite's own."""
    methods: tuple[str, ...] = ()
    ours: bool = True
    peers: bool = True
    quick: bool = False
    networks: tuple[str, ...] = ()
    store: Any = None
    """`peers.Store`; None if the peer does not run."""

    def methods_of(self, suite: str) -> tuple[str, ...]:
        return self.methods or OURS_BY_SUITE[suite]

    def chosen(self, names: Sequence[str]) -> list[str]:
        return [n for n in names if not self.networks or any(part in n for part in self.networks)]


# -- ours --------------------------------------------------------------------------------------------------------------


def _ours(base: Row, path: Path, calibration: Mapping[str, Array], kinds: tuple[str, ...], score: Score) -> Row:
    """Prune with `spa` and measure; what it refuses is an error of the row."""
    import spa
    from spa.methods import METHODS

    method, _, source = base.method.partition("@")
    method, _, compensation = method.partition("+")
    named = method == "auto" or method in METHODS
    how: dict[str, Any] = {"calibration": source or calibration, "method" if named else "criterion": method}
    if compensation:
        how |= {"compensate": compensation, "allocation": "efficient", "normalisation": "none"}
    if method in DATA_FREE:
        del how["calibration"]
    else:
        how["cache"] = cache() / "statistics"  # all targets of a network and seed look at the same samples
    with tempfile.TemporaryDirectory(prefix="spa-accuracy-") as folder:
        out = Path(folder) / "pruned.onnx"
        try:
            result: Any = spa.prune(path, target=base.target, output=out, seed=base.seed, kinds=kinds, **how)
        except Exception as error:  # a method that fails is a row of the table, not the end of the run
            return replace(base, error=f"{type(error).__name__}: {error}")
        macs = result.report.macs
        return replace(base, value=score(out), reached=macs.after / macs.before)


Score = Callable[[Path], float]


# -- the peer ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Peer:
    """One network for the peer, with calibration and test images of one seed."""

    options: Options
    suite: str
    data: str
    path: Path
    build: Callable[[Path], Any]
    calibration: Images
    test: Images
    seed: int
    dense: float

    def gradients(self, kind: str) -> Any:
        from benchmarks.accuracy import peers

        if kind not in ("taylor", "hessian"):
            return None
        settings = {"gradients": kind, "model": data.sha256(self.path), **self._calibration()}
        return self.options.store.gradients(
            settings, lambda: peers.gradients(self.build(self.path), self.calibration, kind)
        )

    def _calibration(self) -> dict[str, Any]:
        what = self.data if self.suite == "cifar" else HALF
        return {"data": what, "seed": self.seed, "images": len(self.calibration)}

    def rows(self, cut: Any, renormalise: Sequence[bool], screening: bool = False) -> Iterator[Row]:
        """The network pruned once, measured with each choice of the batch-norm statistics."""
        import torch

        from benchmarks.accuracy import nets, peers

        found: list[Any] = []

        def make(again: bool) -> dict[str, Any]:
            x = torch.from_numpy(self.calibration.x[:2])
            try:
                if not found:
                    net = self.build(self.path)
                    nets.check(net, self.path, self.test.x[:4])
                    grads = self.gradients(cut.criterion.partition("_")[0])
                    found.append(peers.search(net, x, cut, grads, {}))
            except ValueError as error:
                return {"error": str(error)}
            pruned = found[0].net
            if again:
                peers.renormalise(pruned, self.calibration)
            with tempfile.TemporaryDirectory(prefix="spa-accuracy-") as folder:
                out = Path(folder) / "pruned.onnx"
                peers.export(pruned, x, out)
                value = evaluate.top1(out, self.test)
            return {"value": value, "reached": found[0].macs, "ratio": found[0].ratio}

        for again in sorted(renormalise):  # raw first: the statistics are changed in place
            settings = {**peers.settings_of(cut), "model": data.sha256(self.path), "again": again}
            needs = again or cut.criterion.startswith(("taylor", "hessian"))
            settings |= self._calibration() if needs else {}
            settings |= {"test": [self.suite, self.data, len(self.test), self.seed if self.suite != "cifar" else 0]}
            row = self.options.store.row(settings, lambda again=again: make(again))
            target = f"macs={cut.macs:g}" if cut.macs is not None else f"units={1 - cut.ratio:g}"
            yield Row(
                self.suite, self.path.stem, self.data, PEER,
                f"{cut.criterion} {cut.scope}" + (" bn" if again else ""), target, self.seed, self.dense,
                row.get("value"), row.get("reached"), len(self.test), row.get("error", ""), screening,
            )  # fmt: skip


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------------


def cifar(options: Options) -> Iterator[Row]:
    """ResNet-20 and ResNet-56, on the images as published and on the larger recompressed set."""
    targets = options.targets or CIFAR_TARGETS
    for name in options.chosen(CIFAR_NETWORKS):
        path = data.model(name)
        for kind in data.CIFAR_SETS:
            test = data.cifar_test(kind).first(SCREENING_IMAGES if options.quick else None)
            dense = evaluate.top1(path, test)
            if options.ours:
                for seed in range(options.seeds):
                    calibration = {"input": data.cifar_calibration(kind, seed).x}
                    for share in targets:
                        for method in options.methods_of("cifar"):
                            base = Row("cifar", name, kind, OURS, method, f"macs={share:g}", seed, dense, None,
                                       examples=len(test))  # fmt: skip
                            yield _ours(base, path, calibration, (), lambda out, t=test: evaluate.top1(out, t))
            if options.peers:
                yield from _cifar_peer(options, path, kind, test, dense, targets)


def _cifar_peer(
    options: Options, path: Path, kind: str, test: Images, dense: float, targets: Sequence[float]
) -> Iterator[Row]:
    """Everything on part of the images with the first seed; the best three per target on all, with all seeds."""
    from benchmarks.accuracy import nets, peers

    def peer(seed: int, images: Images, before: float) -> _Peer:
        calibration = data.cifar_calibration(kind, seed)
        return _Peer(options, "cifar", kind, path, nets.resnet, calibration, images, seed, before)

    part = test.first(SCREENING_IMAGES)
    screening = peer(0, part, dense if len(part) == len(test) else evaluate.top1(path, part))
    for share in targets:
        tried: list[tuple[float, Any, bool]] = []
        for criterion in peers.CRITERIA:
            for scope in ("inner", "all"):
                cut = peers.Cut(criterion, scope, share)
                for row, again in zip(screening.rows(cut, (False, True), True), (False, True), strict=True):
                    yield row
                    if row.value is not None:
                        tried.append((row.value, cut, again))
        tried.sort(key=lambda t: -t[0])
        for seed in range(options.seeds):
            full = peer(seed, test, dense)
            for _, cut, again in tried[:FINALISTS]:
                yield from full.rows(cut, (again,))


# -- ImageNet ----------------------------------------------------------------------------------------------------------


def imagenet(options: Options) -> Iterator[Row]:
    """MobileNetV2 and SqueezeNet: 500 images to calibrate, the other 500 to test."""
    targets = options.targets or IMAGENET_TARGETS
    for name in options.chosen(tuple(IMAGENET_NETWORKS)):
        path = data.model(name)
        for seed in range(options.seeds):
            calibration, test = data.imagenet_halves(IMAGENET_NETWORKS[name], seed)
            dense = evaluate.top1(path, test)
            for share in targets:
                if options.ours:
                    for method in options.methods_of("imagenet"):
                        base = Row("imagenet", name, HALF, OURS, method, f"macs={share:g}", seed, dense, None,
                                   examples=len(test))  # fmt: skip
                        feeds = {"input": calibration.x}
                        yield _ours(base, path, feeds, (), lambda out, t=test: evaluate.top1(out, t))
                if options.peers:
                    from benchmarks.accuracy import nets, peers

                    peer = _Peer(options, "imagenet", HALF, path, nets.graph_net, calibration, test, seed, dense)
                    for criterion in ("l2_global", "l2_uniform", "taylor_global", "hessian_global"):
                        for scope in ("inner", "all") if "mobilenet" in name else ("all",):
                            yield from peer.rows(peers.Cut(criterion, scope, share), (False,))


# -- vision transformer ------------------------------------------------------------------------------------------------


def deit(options: Options) -> Iterator[Row]:
    """DeiT-tiny: MLP neurons alone, a share of each at a time, and then all kinds together."""
    if not options.chosen((DEIT,)):
        return
    path = data.model(DEIT)
    removed = () if options.targets else DEIT_REMOVED[1::4] if options.quick else DEIT_REMOVED
    published = dict(zip(DEIT_REMOVED, DEIT_PUBLISHED, strict=True))
    for gone in removed:
        yield Row("deit", DEIT, "neurons", PUBLISHED, "vbp", f"units={1 - gone:g}", 0, DEIT_PUBLISHED_DENSE,
                  published[gone], examples=50000)  # fmt: skip
    for seed in range(options.seeds):
        calibration, test = data.imagenet_halves("torch", seed)
        dense = evaluate.top1(path, test, 25)
        points = [("neurons", f"units={1 - gone:g}", gone) for gone in removed]
        points += [("all kinds", f"macs={share:g}", share) for share in options.targets or DEIT_TARGETS]
        for what, target, share in points:
            if options.ours:
                for method in options.methods_of("deit"):
                    base = Row("deit", DEIT, what, OURS, method, target, seed, dense, None, examples=len(test))
                    kinds = ("neuron",) if what == "neurons" else ()
                    feeds = {"input": calibration.x}
                    yield _ours(base, path, feeds, kinds, lambda out, t=test: evaluate.top1(out, t, 25))
            if options.peers:
                from benchmarks.accuracy import nets, peers

                peer = _Peer(options, "deit", what, path, nets.transformer, calibration, test, seed, dense)
                for criterion in ("l2_global", "l2_uniform", "taylor_global", "taylor_uniform"):
                    if what == "neurons":
                        yield from peer.rows(peers.Cut(criterion, "mlp", ratio=share), (False,))
                        continue
                    for scope in ("mlp", "mlp+heads"):
                        yield from peer.rows(peers.Cut(criterion, scope, macs=share), (False,))


# -- texts -------------------------------------------------------------------------------------------------------------


def text(options: Options) -> Iterator[Row]:
    """A sentence encoder (rank correlation) and a small language model (perplexity): our methods, no peer."""
    if not options.ours:
        return
    targets = options.targets or TEXT_TARGETS
    for name in options.chosen((MINILM, STORIES)):
        path = data.model(name)
        if name == MINILM:
            pairs = data.sts("test")
            what, count = "sts-b", len(pairs.score)
            score: Score = partial(evaluate.similarity, pairs=pairs)
        else:
            ids = data.stories("eval")[: 64 if options.quick else None]
            what, count = "tinystories", len(ids)
            score = partial(evaluate.perplexity, ids=ids)
        dense = score(path)
        for seed in range(options.seeds if name == MINILM else 1):
            feeds = data.sentences(512, seed) if name == MINILM else {_first_input(path): data.stories("calib")}
            for share in targets:
                for method in options.methods_of("text"):
                    base = Row("text", name, what, OURS, method, f"macs={share:g}", seed, dense, None, examples=count)
                    yield _ours(base, path, feeds, (), score)


def _first_input(path: Path) -> str:
    run: Any = evaluate.session(path)
    name: str = run.input_name
    return name


SUITES: dict[str, Callable[[Options], Iterator[Row]]] = {
    "cifar": cifar,
    "imagenet": imagenet,
    "deit": deit,
    "text": text,
}
