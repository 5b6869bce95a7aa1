"""What a group's leaving costs the outputs: told on samples that nothing was fit on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

import spa
from spa.calibration.trials import MOST, PART, held_out, needed
from spa.executors.segments import Segments
from spa.methods import METHODS
from spa.removal import kept_without
from spa.rewrite import rewritten
from spa.sensitivity import SHARES, divergence, lowest, outputs
from spa.stitch import stitch
from spa.study import Query, Study
from tests.net import Net

CHANNELS = 64


def pooled() -> onnx.ModelProto:
    """One observation per image of the channels behind the global pooling."""
    net = Net()
    x = net.input("x", "n", 3, 8, 8)
    y = net("Relu", net("Conv", x, net.weight("w", CHANNELS, 3, 3, 3), net.weight("b", CHANNELS)))
    y = net("Flatten", net("GlobalAveragePool", y))
    return net.model(**{net("Gemm", y, net.weight("v", CHANNELS, 10)): ("n", 10)})


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (count, 3, 8, 8)).astype(np.float32)


def study(samples: int) -> Study:
    graph = spa.load(pooled())
    analysis = spa.analyze(graph)
    data = spa.load_calibration({"x": images(samples, 0)}, graph.model)
    return Study(Query(analysis, (), "all", (), (), 1, None), METHODS["obspa"], data=data)


@pytest.mark.parametrize("samples", [75, 1000])
def test_few_samples_do_not_make_channels_free(samples: int) -> None:
    """The curve agrees with new images, also where a refit explains all samples it sees: 60 of them, 64 channels."""
    found = study(samples)
    scored = found.score()
    assert scored.curves is not None
    assert found.measured is not None
    (group,) = found.groups
    new = spa.load_calibration({"x": images(4000, 1)}, found.analysis.coupling.model)
    reference = outputs(Segments.of(found.analysis.coupling.model), new, 64)
    for share in SHARES:
        units = lowest(scored.scores[group.name], share)
        removed = [(group, units.tolist())]
        kept = kept_without(found.analysis, removed)
        twin = rewritten(found.analysis, kept)
        stitch(twin, found.measured, kept, removed, {})
        error = divergence(reference, outputs(Segments.of(twin.model), new, 64))
        assert scored.curves[group.name][len(units)] == pytest.approx(error, rel=0.35)


@pytest.mark.parametrize("samples", [1, PART - 1, PART, 64, 10_000])
def test_samples_for_trials(samples: int) -> None:
    data = spa.load_calibration({"x": images(samples, 0)}, spa.load(pooled()).model)
    fit, test = held_out(data)
    if samples < PART:
        assert fit is test is data
    else:
        assert fit.samples + test.samples == samples
        assert test.samples == min(MOST, samples // PART)


def test_a_batch_that_the_graph_fixes_is_held_out_whole() -> None:
    net = Net()
    y = net("Gemm", net("Relu", net("Gemm", net.input("x", 4, 3), net.weight("w", 3, 8))), net.weight("v", 8, 2))
    model = net.model(**{y: (4, 2)})
    graph = spa.load(model).model
    x = np.random.default_rng(0).normal(0, 1, (16, 3)).astype(np.float32)
    assert held_out(spa.load_calibration({"x": x}, graph))[0].samples == 16
    fit, test = held_out(spa.load_calibration({"x": np.concatenate([x, x[:4]])}, graph))
    assert (fit.samples, test.samples) == (16, 4)


@pytest.mark.parametrize("fixed", [None, 4, 7])
def test_as_many_as_are_needed(fixed: int | None) -> None:
    """No fewer would do, and so many do."""
    graph = spa.load(pooled()).model

    def fit(samples: int) -> int:
        data = spa.load_calibration({"x": images(samples, 0)}, graph)
        return held_out(replace(data, fixed=fixed))[0].samples

    step = fixed or 1
    for wanted in range(step, 60 * step, 3 * step):
        asked = needed(wanted, fixed)
        assert fit(-(-asked // step) * step) >= wanted
        assert asked == step or fit((asked - 1) // step * step) < wanted


def test_too_few_samples_are_counted() -> None:
    """The refusal tells those that are held out, and what it asks for is enough."""
    wide = Net()
    y = wide("Relu", wide("Gemm", wide.input("x", "n", 8), wide.weight("w", 8, 400)))
    model = wide.model(**{wide("Gemm", y, wide.weight("v", 400, 10)): ("n", 10)})
    x = np.random.default_rng(0).normal(0, 1, (100, 8)).astype(np.float32)

    def prune(samples: int) -> None:
        spa.prune(model, target="macs=0.7", method="obspa", calibration={"x": x[:samples]})

    with pytest.raises(spa.UsageError, match=r"32 samples give 32 observations .* \(8 more are held out\)") as refused:
        prune(40)
    asked = int(str(refused.value).split("at least ")[1].split()[0])
    prune(asked)


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network under other names, in another alphabetical order; inputs and outputs keep theirs."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    kept = {v.name for v in (*out.graph.input, *out.graph.output)} | {""}
    made = [name for node in out.graph.node for name in node.output] + [w.name for w in out.graph.initializer]
    new = {name: f"v{997 * k % 1009}" for k, name in enumerate(n for n in made if n not in kept)}
    for node in out.graph.node:
        node.name = f"node of {node.name}"[::-1]
        for names in (node.input, node.output):
            names[:] = [new.get(n, n) for n in names]
    for weight in out.graph.initializer:
        weight.name = new.get(weight.name, weight.name)
    del out.graph.value_info[:]
    return out


def weights(model: onnx.ModelProto) -> list[np.ndarray]:
    """In the order in which nodes read them."""
    known = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}
    return [known[name] for node in model.graph.node for name in node.input if name in known]


def test_names_change_nothing() -> None:
    """Which positions of images are looked at does not depend on what tensors are called, nor does anything else."""
    net = Net()
    y = net.input("x", "n", 3, 24, 24)
    for k, channels in enumerate((16, 24, 24)):
        inputs = 3 if k == 0 else (16, 24)[k - 1]
        y = net("Relu", net("Conv", y, net.weight(f"w{k}", channels, inputs, 3, 3), net.weight(f"b{k}", channels)))
    y = net("Flatten", net("GlobalAveragePool", y))
    model = net.model(**{net("Gemm", y, net.weight("v", 24, 10)): ("n", 10)})
    x = np.random.default_rng(0).normal(0, 1, (100, 3, 24, 24)).astype(np.float32)
    found = [
        weights(spa.prune(m, target="macs=0.6", method="obspa", calibration={"x": x}).model)
        for m in (model, renamed(model))
    ]
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)
