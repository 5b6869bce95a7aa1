"""Fine-tuning: what it recovers, that it can be killed at any time, and that nothing but numbers changes."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import spa
from spa.calibration import load_calibration
from spa.errors import PlanError, RuntimeFailure, UsageError
from spa.plan import Plan
from tests.command_line import Ran
from tests.net import Net
from tests.trained import trained

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
Array = np.ndarray
Arrays = dict[str, Array]


@functools.cache
def pruned() -> tuple[onnx.ModelProto, onnx.ModelProto, Plan]:
    """The digits CNN, what is left of it at 30 % of its cost, and how."""
    dense = trained("cnn")
    result = spa.prune(dense, target="macs=0.3")
    return dense, result.model, result.plan


def digits() -> tuple[Arrays, Array, Array]:
    """Training samples with labels, and test images and labels."""
    from examples import digits as source

    x, test, y, answers = source.data()
    return {"image": x, "labels": y}, test, answers


def answers(model: onnx.ModelProto, x: Array) -> Array:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    return np.asarray(session.run(None, {name: x})[0])


def accuracy(model: onnx.ModelProto) -> float:
    _, x, y = digits()
    return float((answers(model, x).argmax(1) == y).mean())


def weights(model: onnx.ModelProto) -> Arrays:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def structure(model: onnx.ModelProto) -> Any:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        for field in ("raw_data", "float_data"):
            tensor.ClearField(field)
    return copy.SerializeToString(deterministic=True)


def mlp(hidden: int = 12) -> onnx.ModelProto:
    net = Net()
    x = net("Tanh", net.gemm(net.input("x", "n", 5), "a", 5, hidden))
    net.named(net.gemm(x, "b", hidden, 3), "logits")
    return net.model(logits=("n", 3))


def samples(count: int = 96) -> Arrays:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 5)).astype(np.float32)
    return {"x": x, "labels": x[:, :3].argmax(1)}


# -- what it is for --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["ce", "inner"])
def test_most_of_what_pruning_cost_comes_back(loss: str) -> None:
    dense, small, plan = pruned()
    data, _, _ = digits()
    teaching: dict[str, Any] = {"teacher": dense, "plan": plan} if loss == "inner" else {}
    result = spa.finetune(small, data=data, loss=loss, epochs=2, lr=0.01, **teaching)
    best, before, after = accuracy(dense), accuracy(small), accuracy(result.model)
    assert before < best - 0.2
    assert after - before > 0.8 * (best - before)
    assert result.history[-1].loss < result.history[1].loss
    assert result.metric == "accuracy"
    assert result.after is not None
    assert result.before is not None
    assert result.after > result.before
    assert result.verify.max_rel_error < 1e-5
    assert bool(result.matched) == (loss == "inner")


def test_only_numbers_change_and_those_of_batch_norm_do() -> None:
    _, small, _ = pruned()
    data, _, _ = digits()
    result = spa.finetune(small, data={k: a[:256] for k, a in data.items()}, epochs=1, lr=0.01, held_out=0)
    assert structure(result.model) == structure(small)
    before, after = weights(small), weights(result.model)
    norms = [n for n in small.graph.node if n.op_type == "BatchNormalization"]
    assert norms
    for node in norms:
        scale, _, mean, variance = node.input[1:]
        for name in (scale, mean, variance):
            assert not np.array_equal(before[name], after[name]), name
    assert result.metric is None
    assert result.best_epoch == 1


def test_distillation_needs_no_labels() -> None:
    dense, small, _ = pruned()
    data, test, _ = digits()
    result = spa.finetune(small, data={"image": data["image"]}, teacher=dense, loss="kd", epochs=2, lr=0.01)
    assert result.metric == "distance"
    assert result.after is not None
    assert result.before is not None
    assert result.after < 0.5 * result.before
    same = answers(dense, test).argmax(1)
    assert (answers(result.model, test).argmax(1) == same).mean() > (answers(small, test).argmax(1) == same).mean()
    assert set(result.history[-1].parts) == {"kd"}


def test_blocks_are_found_with_and_without_a_plan() -> None:
    dense, small, plan = pruned()
    data, _, _ = digits()
    some = {k: a[:96] for k, a in data.items()}
    found = [spa.finetune(small, data=some, teacher=dense, plan=p, epochs=1, lr=0.01).matched for p in (plan, None)]
    assert found[0] == found[1]
    producers = {n.output[0]: n.op_type for n in small.graph.node}
    assert [producers[name] for name in found[0]] == ["Relu", "Relu", "Add", "Relu"]  # the four residual blocks


def test_blocks_of_a_transformer_are_its_residual_stream() -> None:
    from spa.graph import load
    from spa.train.matching import blocks

    net = Net()
    tokens, mask = net.input("tokens", "n", "t", dtype=np.int64), net.input("mask", "n", "t", "t")
    x = net("Gather", net.weight("table", 24, 8), tokens)
    x = net("Add", x, net.weight("position", 6, 8))
    wanted = []
    for k in range(2):
        q, keys, v = (net("MatMul", x, net.weight(f"{k}{name}", 8, 8)) for name in "qkv")
        score = net("Add", net("MatMul", q, net("Transpose", keys, perm=[0, 2, 1])), mask)  # no block
        x = net("Add", x, net("MatMul", net("Softmax", score, axis=-1), v))
        inner = net("Relu", net("MatMul", x, net.weight(f"{k}up", 8, 16)))
        y = net("Add", x, net("MatMul", inner, net.weight(f"{k}down", 16, 8)))
        wanted += [x, y]
        x = y
    net.named(net("MatMul", x, net.weight("head", 8, 5)), "logits")
    assert [v.name for v in blocks(load(net.model(logits=("n", "t", 5))).model)] == wanted


def test_maps_start_as_least_squares_and_are_not_written() -> None:
    from spa.train.objective import Inner, Maps

    rng = torch.Generator().manual_seed(0)
    x, true = torch.randn(50, 4, 3, 3, generator=rng), torch.randn(6, 4, generator=rng)
    goal = torch.einsum("oc,nchw->nohw", true, x)
    inner = Inner("a", "b", 1, (4, 6))
    maps = Maps([inner])
    maps.fit(inner, x, goal)
    assert torch.allclose(maps(inner, x), goal, atol=0.05)


# -- the training itself, against torch ------------------------------------------------------------------------------


def test_a_step_is_that_of_torch_written_by_hand() -> None:
    data = samples(32)
    result = spa.finetune(
        mlp(), data=data, epochs=1, batch=32, lr=0.1, held_out=0, warmup=0, schedule="constant", weight_decay=0.1
    )
    w = {n: torch.from_numpy(a.copy()).requires_grad_() for n, a in weights(mlp()).items()}
    hidden = torch.tanh(torch.from_numpy(data["x"]) @ w["a.weight"].T + w["a.bias"])
    logits = hidden @ w["b.weight"].T + w["b.bias"]
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(data["labels"])).backward()
    matrices, vectors = ([t for t in w.values() if (t.dim() > 1) == many] for many in (True, False))
    torch.optim.SGD(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}], lr=0.1, momentum=0.9, nesterov=True
    ).step()
    after = weights(result.model)
    for name, tensor in w.items():
        np.testing.assert_allclose(after[name], tensor.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_samples_one_by_one() -> None:
    result = spa.finetune(mlp(), data=samples(12), epochs=1, batch=1, held_out=0)
    assert not np.array_equal(weights(result.model)["a.weight"], weights(mlp())["a.weight"])


def test_accumulated_batches_are_one_large_batch() -> None:
    common: dict[str, Any] = {"data": samples(64), "epochs": 2, "held_out": 0, "optimiser": "sgd", "lr": 0.1}
    large = spa.finetune(mlp(), batch=64, **common)
    small = spa.finetune(mlp(), batch=16, accumulate=4, **common)
    for name, array in weights(large.model).items():
        np.testing.assert_allclose(array, weights(small.model)[name], rtol=1e-4, atol=1e-5)


def test_temperature_scaled_divergence() -> None:
    from spa.train.objective import Objective
    from spa.train.settings import settled

    rng = np.random.default_rng(1)
    y, goal = (rng.normal(size=(4, 6)).astype(np.float32) * 3 for _ in range(2))
    settings = settled(**SETTINGS | {"loss": "kd", "teacher": True, "temperature": 3.0})
    objective = Objective(None, None, settings, False, shared=("logits",))  # type: ignore[arg-type]  # not run
    found = objective.distance({"logits": torch.from_numpy(y)}, {"logits": torch.from_numpy(goal)})
    p, q = (np.exp(a / 3) / np.exp(a / 3).sum(1, keepdims=True) for a in (goal.astype(float), y.astype(float)))
    np.testing.assert_allclose(found.numpy(), 9 * (p * np.log(p / q)).sum(1), rtol=1e-4)


SETTINGS: dict[str, Any] = {
    "loss": "ce", "teacher": False, "optimiser": "sgd", "schedule": "cosine", "distance": "auto", "augment": None,
    "lr": None, "weight_decay": None, "freeze": (), "epochs": 4, "batch": 8, "warmup": 0.25, "accumulate": 1,
    "amp": False, "ema": 0.0, "held_out": 0.1, "patience": 3, "temperature": 2.0, "alpha": 0.5, "gamma": 1.0, "seed": 0,
}  # fmt: skip


def test_the_rate_rises_and_falls() -> None:
    from spa.train.loop import factor
    from spa.train.settings import settled

    rates = [factor(k, 40, settled(**SETTINGS)) for k in range(40)]
    assert max(rates) == rates[10] == 1.0
    assert all(a < b for a, b in itertools.pairwise(rates[:11]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] < 0.01


def test_an_average_early_stop_and_frozen_weights() -> None:
    common: dict[str, Any] = {"data": samples(), "optimiser": "adamw", "lr": 0.02}
    averaged = spa.finetune(mlp(), epochs=6, ema=0.9, **common)
    assert averaged.after is not None
    assert averaged.before is not None
    assert averaged.after > averaged.before
    stopped = spa.finetune(mlp(), epochs=50, patience=1, **common)
    assert len(stopped.history) < 51
    assert stopped.best_epoch < len(stopped.history) - 1
    frozen = weights(spa.finetune(mlp(), epochs=1, freeze="a.*", **common).model)
    before = weights(mlp())
    assert np.array_equal(frozen["a.weight"], before["a.weight"])
    assert not np.array_equal(frozen["b.weight"], before["b.weight"])


def test_images_are_mirrored_and_moved_alike_for_a_seed() -> None:
    from spa.graph import load
    from spa.train.samples import taken
    from spa.train.settings import settled

    _, small, _ = pruned()
    data, _, _ = digits()
    read = load_calibration({"image": data["image"][:20]}, load(small).model)
    settings = settled(**SETTINGS | {"augment": "flip-crop"})
    first, again, other = (np.concatenate([b.feeds["image"] for b in taken(read, settings, e)]) for e in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    originals = {a.tobytes() for a in data["image"][:20]}
    assert sum(a.tobytes() in originals for a in first) < 10
    assert np.sort(np.unique(first)).tolist() == np.sort(np.unique(np.clip(first, -1, 1))).tolist()


def test_amp_and_checkpointed_types() -> None:
    result = spa.finetune(mlp(), data=samples(), epochs=3, amp=True, lr=0.1)
    assert result.history[-1].loss < result.history[1].loss
    half = mlp()
    for tensor in half.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for info in (*half.graph.input, *half.graph.output):
        info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    data = samples()
    found = spa.finetune(half, data={**data, "x": data["x"].astype(np.float16)}, epochs=1, lr=0.1)
    assert all(a.dtype == np.float16 for a in weights(found.model).values())
    assert found.verify.max_rel_error < 1e-2


# -- kills -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    dense, small, plan = pruned()
    data, _, _ = digits()
    common: dict[str, Any] = {
        "data": {k: a[:160] for k, a in data.items()}, "teacher": dense, "plan": plan, "epochs": 3, "lr": 0.01,
        "ema": 0.9, "seed": 3, "batch": 32, "optimiser": "adamw", "augment": "flip-crop",
    }  # fmt: skip
    whole = spa.finetune(small, **common)

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "train" and done == 8:  # in the middle of the second epoch
            raise Killed

    with pytest.raises(Killed):
        spa.finetune(small, checkpoint=tmp_path, progress=kill, **common)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    state = torch.get_rng_state()
    torch.rand(5)
    again = spa.finetune(small, checkpoint=tmp_path, **common)
    torch.set_rng_state(state)
    assert again.model.SerializeToString() == whole.model.SerializeToString()
    timeless = [[{**vars(e), "seconds": 0, "loss": str(e.loss)} for e in r.history] for r in (whole, again)]
    assert timeless[0] == timeless[1]

    with pytest.raises(UsageError, match="of another run"):
        spa.finetune(small, checkpoint=tmp_path, **common | {"seed": 4})
    (tmp_path / "checkpoint.pt").write_bytes(b"PK nonsense")
    with pytest.raises(UsageError, match="damaged"):
        spa.finetune(small, checkpoint=tmp_path, **common)


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"data": {"x": samples()["x"]}}, "needs labels"),
        ({"loss": "kd"}, "--teacher"),
        ({"plan": "plan.json"}, "--teacher"),
        ({"loss": "kd", "teacher": mlp(hidden=7), "data": {"x": samples(4)["x"]}, "held_out": 0.9}, "hold out"),
        ({"epochs": 0}, "--epochs"),
        ({"lr": -1.0}, "--lr"),
        ({"optimiser": "lion"}, "--optimiser"),
        ({"freeze": "*"}, "--freeze"),
        ({"augment": "flip-crop"}, "--augment"),
        ({"held_out": 1.0}, "--held-out"),
        ({"data": {**samples(), "labels": samples()["labels"] + 1}}, "labels must be"),
    ],
)
def test_mistakes_are_one_sentence(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        spa.finetune(mlp(), **{"data": samples(), "epochs": 1, **options})
    assert "\n" not in str(caught.value)


def test_a_wrong_teacher_or_plan_is_said() -> None:
    dense, small, plan = pruned()
    data, _, _ = digits()
    with pytest.raises(UsageError, match="the teacher has the inputs x"):
        spa.finetune(small, data=data, teacher=mlp(), loss="kd")
    net = Net()
    net.named(net.gemm(net.input("x", "n", 5), "a", 5, 4), "logits")
    with pytest.raises(UsageError, match=r"shape \[64, 4\].*has \[64, 3\]"):
        spa.finetune(mlp(), data=samples(), teacher=net.model(logits=("n", 4)), loss="kd")
    with pytest.raises(PlanError, match="another model than the teacher"):
        spa.finetune(small, data=data, teacher=small, plan=plan)
    with pytest.raises(PlanError, match="something else"):
        spa.finetune(dense, data=data, teacher=dense, plan=plan)


def test_a_loss_that_explodes_is_said() -> None:
    with pytest.raises(RuntimeFailure, match="--lr"):
        spa.finetune(mlp(), data=samples(), epochs=3, lr=1e30)


def test_without_torch_it_is_one_sentence(tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", **samples())
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from spa.cli import main\n"
        f"sys.exit(main(['finetune', {str(tmp_path / 'in.onnx')!r}, '-o', {str(tmp_path / 'out.onnx')!r}, "
        f"'--data', {str(tmp_path / 'data.npz')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "pip install 'spa-prune[torch]'" in done.stderr


def test_external_data_stays_external_and_failures_leave_nothing(tmp_path: Path) -> None:
    onnx.save(mlp(hidden=400), tmp_path / "in.onnx", save_as_external_data=True, size_threshold=0, location="in.data")
    before = (tmp_path / "in.data").read_bytes()
    spa.finetune(tmp_path / "in.onnx", data=samples(), epochs=1, output=tmp_path / "out.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"in.onnx", "in.data", "out.onnx", "out.onnx.data"}
    assert (tmp_path / "in.data").read_bytes() == before
    assert (tmp_path / "out.onnx.data").read_bytes() != before
    with pytest.raises(RuntimeFailure):
        spa.finetune(tmp_path / "in.onnx", data=samples(), epochs=3, lr=1e30, output=tmp_path / "other.onnx")
    assert len(list(tmp_path.iterdir())) == 4


def test_an_untrained_export_is_untied_first() -> None:
    net = Net()
    x, ones, zeros = net.input("x", "n", 5), net.value("ones", np.ones(8)), net.value("zeros", np.zeros(8))
    for name, width in (("a", 5), ("b", 8)):
        x = net("MatMul", x, net.weight(f"{name}.weight", width, 8))
        x = net("Relu", net("BatchNormalization", x, ones, zeros, zeros, ones))
    net.named(net.gemm(x, "head", 8, 3), "logits")
    result = spa.finetune(net.model(logits=("n", 3)), data=samples(), epochs=1)
    norms = [n.input[1:] for n in result.model.graph.node if n.op_type == "BatchNormalization"]
    assert len({name for names in norms for name in names}) == 8
    assert [n.op_type for n in result.model.graph.node] == [n.op_type for n in net.nodes]


# -- the command line ------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, small, _ = pruned()
    data, _, _ = digits()
    for name, model in (("dense", dense), ("small", small)):
        onnx.save(model, tmp_path / f"{name}.onnx")
    np.savez(tmp_path / "data.npz", **{k: a[:128] for k, a in data.items()})
    plan = tmp_path / "plan.json"
    plan_of_file = spa.prune(tmp_path / "dense.onnx", target="macs=0.3", output=tmp_path / "small.onnx").plan
    plan.write_text(plan_of_file.to_json())
    arguments = ["finetune", tmp_path / "small.onnx", "-o", tmp_path / "out.onnx", "--data", tmp_path / "data.npz",
                 "--teacher", tmp_path / "dense.onnx", "--plan", plan, "--epochs", "1"]  # fmt: skip
    body = Ran(capsys, *arguments, "--json").json()
    assert body["settings"]["loss"] == "inner"
    assert len(body["history"]) == 2
    assert len(body["matched"]) == 4
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"))
    ran = Ran(capsys, *arguments)
    assert ran.status == 0
    assert "accuracy, held out" in ran.out
    assert "4 blocks matched" in ran.out
    refused = Ran(capsys, "finetune", tmp_path / "small.onnx", "-o", tmp_path / "small.onnx", "--data", "data.npz")
    assert refused.status == 2
    missing = Ran(capsys, "finetune", tmp_path / "small.onnx", "-o", tmp_path / "o.onnx", "--data", "nowhere.npz")
    assert missing.status == 2
    assert missing.err.count("\n") == 1
    assert not (tmp_path / "o.onnx").exists()
