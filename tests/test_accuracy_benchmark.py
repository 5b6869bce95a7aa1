"""The accuracy benchmark: its figures against independent ones, its splits and tables, its modules against files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import data, evaluate
from benchmarks.accuracy.report import tables
from benchmarks.accuracy.rows import OURS, PEER, Row, best, comparisons, demanded, key_of, means

HERE = (data.ROOT / "data" / "models").is_dir()
needs_data = pytest.mark.skipif(not HERE, reason=f"no trained networks in {data.ROOT}; set SPA_DATA to their folder")


def row(tool: str, method: str, value: float | None, seed: int = 0, target: str = "macs=0.5", **more: object) -> Row:
    return Row("cifar", "net_x", "jpeg", tool, method, target, seed, 90.0, value, 0.5, 10, **more)  # type: ignore[arg-type]  # fields of several types


# -- rows --------------------------------------------------------------------------------------------------------------


def test_a_method_is_judged_by_its_mean_over_seeds() -> None:
    rows = [row(PEER, "a", 60, 0), row(PEER, "a", 70, 1), row(PEER, "b", 66, 0), row(PEER, "b", 66, 1)]
    found = best(means(rows, PEER, key_of(rows[0])))
    assert found is not None
    assert (found.method, found.value, found.drop) == ("b", 66, 24)
    assert {m.method: m.spread for m in means(rows, PEER, key_of(rows[0]))} == pytest.approx({"a": 50**0.5, "b": 0})


def test_a_method_with_fewer_seeds_or_a_failure_or_screening_only_is_not_the_best() -> None:
    rows = [row(PEER, "a", 60, seed) for seed in (0, 1)]
    rows += [row(PEER, "once", 80), row(PEER, "failed", None, error="no"), row(PEER, "part", 85, screening=True)]
    found = best(means(rows, PEER, key_of(rows[0])))
    assert found is not None
    assert found.method == "a"


def test_the_comparison_is_of_drops_and_of_the_named_method() -> None:
    rows = [row(OURS, "x", 84), row(OURS, "better", 89), row(PEER, "a", 60)]
    (compared,) = comparisons(rows, {"cifar": "x"})
    assert compared.ratio == pytest.approx(0.2)
    assert compared.demanded == 0.25
    assert compared.met is True
    (missed,) = comparisons([row(OURS, "x", 80), row(PEER, "a", 60)], {"cifar": "x"})
    assert missed.met is False
    (alone,) = comparisons([row(OURS, "x", 84)], {"cifar": "x"})
    assert alone.ratio is None
    assert alone.met is None


@pytest.mark.parametrize(
    ("suite", "target", "want"),
    [("cifar", "macs=0.8", 0.5), ("cifar", "macs=0.7", 0.5), ("cifar", "macs=0.6", 0.25), ("cifar", "macs=0.5", 0.25),
     ("imagenet", "macs=0.7", 0.5), ("deit", "macs=0.7", None)],
)  # fmt: skip
def test_demands(suite: str, target: str, want: float | None) -> None:
    assert demanded(suite, target) == want


def test_tables_name_failures_and_verdicts() -> None:
    rows = [row(OURS, "x", 84), row(PEER, "a inner", 60), row(OURS, "y", None, error="UsageError: why")]
    text = tables(rows, {"cifar": "x"})
    assert "0.20" in text
    assert "0.25 met" in text
    assert "UsageError: why" in text


# -- figures -----------------------------------------------------------------------------------------------------------


def test_spearman_is_scipys_with_ties() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 60).astype(float), rng.normal(size=60)
    assert evaluate.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def _model(path: Path, table: np.ndarray) -> Path:
    """Logits of the next token are the row of this token."""
    node = helper.make_node("Gather", ["table", "ids"], ["logits"])
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "t"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", "t", table.shape[1]])],
        [onnx.numpy_helper.from_array(table.astype(np.float32), "table")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_perplexity_of_a_bigram_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(5, 5))
    chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ids = rng.integers(0, 5, (11, 7))
    nll = [-np.log(chance[a, b]) for line in ids for a, b in itertools.pairwise(line)]
    found = evaluate.perplexity(_model(tmp_path / "m.onnx", logits), ids, batch=4)
    assert found == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert evaluate.perplexity(_model(tmp_path / "u.onnx", np.zeros((5, 5))), ids) == pytest.approx(5)


# -- data --------------------------------------------------------------------------------------------------------------


def test_calibration_and_test_halves_are_disjoint_and_swap() -> None:
    splits = [data.halves(1000, seed) for seed in range(4)]
    for calibration, test in splits:
        assert len(calibration) == len(test) == 500
        assert set(calibration) | set(test) == set(range(1000))
    for first, second in (splits[:2], splits[2:]):
        assert np.array_equal(first[0], second[1])
        assert np.array_equal(first[1], second[0])
    assert set(splits[0][0] % 2) == {0}
    assert set(splits[2][0] % 2) == {0, 1}


@needs_data
def test_seeds_choose_different_calibration_images() -> None:
    a, again, b = (data.cifar_calibration("lossless", seed) for seed in (0, 0, 1))
    assert np.array_equal(a.x, again.x)
    assert a.x.shape == (1000, 3, 32, 32)
    assert not np.array_equal(a.x, b.x)


@needs_data
def test_the_published_accuracy_is_measured() -> None:
    test = data.cifar_test("lossless")
    assert evaluate.top1(data.model("resnet20_cifar10_bn"), test) == pytest.approx(91.72, abs=0.2)


def test_without_data_there_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "ROOT", tmp_path)
    assert command.main(["cifar", "--only", "ours"]) == 2
    message = capsys.readouterr().err
    assert "SPA_DATA" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("arguments", [["nothing"], ["--targets", "2"], ["--targets", "x"], ["--seeds", "0"]])
def test_wrong_options_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2


# -- the peer's modules ------------------------------------------------------------------------------------------------


@pytest.fixture
def torch() -> Iterator[Any]:
    """Torch on one thread."""
    module: Any = pytest.importorskip("torch")
    before = module.get_num_threads()
    module.set_num_threads(1)
    yield module
    module.set_num_threads(before)


@needs_data
@pytest.mark.parametrize(
    ("name", "build", "shape"),
    [("resnet20_cifar10_bn", "resnet", 32), ("resnet56_cifar10_bn", "resnet", 32),
     ("mobilenetv2_1.0_224_imagenet", "graph_net", 224), ("squeezenet1.1_imagenet", "graph_net", 224),
     ("deit_tiny_patch16_224_imagenet", "transformer", 224)],
)  # fmt: skip
def test_modules_compute_what_the_files_do_and_cost_as_much(torch: Any, name: str, build: str, shape: int) -> None:
    import spa
    from benchmarks.accuracy import nets, peers

    path = data.model(name)
    x = np.random.default_rng(0).normal(size=(2, 3, shape, shape)).astype(np.float32)
    net = getattr(nets, build)(path)
    assert nets.check(net, path, x) < 1e-3
    cost = spa.analyze(path).cost
    assert peers.count_macs(net, torch.from_numpy(x)) == cost.totals(cost.full)["macs"]


@needs_data
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_the_peer_meets_its_share_of_the_macs_and_exports(torch: Any, scope: str, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    from benchmarks.accuracy import nets, peers

    path = data.model("resnet20_cifar10_bn")
    images = data.cifar_calibration("lossless", 0).first(64)
    x = torch.from_numpy(images.x)
    found = peers.search(nets.resnet(path), x, peers.Cut("l2_global", scope, 0.7), None, {})
    assert 0.68 < found.macs <= 0.7
    peers.renormalise(found.net, images)
    peers.export(found.net, x, tmp_path / "p.onnx")
    assert nets.check(found.net, tmp_path / "p.onnx", images.x[:8]) < 1e-3


@needs_data
def test_hessian_is_the_mean_of_squared_gradients(torch: Any) -> None:
    from benchmarks.accuracy import nets, peers

    net = nets.resnet(data.model("resnet20_cifar10_bn"))
    images = data.cifar_calibration("lossless", 0).first(3)
    found = peers.gradients(net, images, "hessian")["linear.weight"]
    rows = [peers.gradients(net, images.at(np.array([k])), "taylor")["linear.weight"] for k in range(3)]
    assert torch.allclose(found, torch.stack(rows).square().mean(0), atol=1e-7)


def test_rows_are_remembered_by_all_that_they_depend_on(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from benchmarks.accuracy import peers

    made: list[int] = []

    def make() -> dict[str, float]:
        made.append(1)
        return {"value": 1.5}

    store = peers.Store(tmp_path)
    assert store.row({"a": 1}, make) == store.row({"a": 1}, make) == {"value": 1.5}
    assert len(made) == 1
    store.row({"a": 2}, make)
    peers.Store(tmp_path, fresh=True).row({"a": 1}, make)
    assert len(made) == 3
