"""Fine-tuning causal language models on the next tokens of what they are fed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

import spa  # noqa: E402
from spa.errors import UsageError  # noqa: E402
from spa.graph import load  # noqa: E402
from spa.interpreter import Interpreter  # noqa: E402
from spa.train.objective import Language, language  # noqa: E402
from tests.net import Net  # noqa: E402
from tests.zoo import MISSING, ROOT  # noqa: E402

Array = np.ndarray[Any, Any]
VOCABULARY, LENGTH, WIDTH = 12, 10, 16


def transformer(*, causal: bool = True, mask: bool = False) -> onnx.ModelProto:
    """One layer of attention and an MLP over token and position embeddings."""
    net = Net()
    ids = net.input("input_ids", "n", LENGTH, dtype=np.int64)
    x = net("Gather", net.weight("embed", VOCABULARY, WIDTH), ids)
    x = net("Add", x, net.weight("position", LENGTH, WIDTH))
    q, k, v = (net("MatMul", x, net.weight(name, WIDTH, WIDTH)) for name in "qkv")
    score = net("MatMul", q, net("Transpose", k, perm=[0, 2, 1]))
    if causal:
        score = net("Add", score, net.value("ahead", np.triu(np.full((LENGTH, LENGTH), -1e9), 1)))
    if mask:
        seen = net("Cast", net.input("attention_mask", "n", LENGTH, dtype=np.int64), to=1)
        away = net("Mul", net("Sub", seen, net.value("one", 1.0)), net.value("much", 1e9))
        score = net("Add", score, net("Unsqueeze", away, net.value("axis", [1])))
    x = net("Add", x, net("MatMul", net("Softmax", score, axis=-1), v))
    inner = net("Relu", net("MatMul", x, net.weight("up", WIDTH, 32)))
    x = net("Add", x, net("MatMul", inner, net.weight("down", 32, WIDTH)))
    net.named(net("MatMul", x, net.weight("head", WIDTH, VOCABULARY)), "logits")
    return net.model(logits=("n", LENGTH, VOCABULARY))


def recurrent() -> onnx.ModelProto:
    """An LSTM over token embeddings."""
    net = Net()
    ids = net.input("tokens", "n", LENGTH, dtype=np.int64)
    x = net("Transpose", net("Gather", net.weight("embed", VOCABULARY, WIDTH), ids), perm=[1, 0, 2])
    y, *_ = net("LSTM", x, net.weight("w", 1, 4 * WIDTH, WIDTH), net.weight("r", 1, 4 * WIDTH, WIDTH),
                net.weight("b", 1, 8 * WIDTH), outputs=3, hidden_size=WIDTH)  # fmt: skip
    y = net("Transpose", net("Squeeze", y, net.value("axis", [1])), perm=[1, 0, 2])
    net.named(net("MatMul", y, net.weight("head", WIDTH, VOCABULARY)), "logits")
    return net.model(logits=("n", LENGTH, VOCABULARY))


def sentences(count: int = 96) -> Array:
    """The next token follows from the last one."""
    rows = [np.random.default_rng(0).integers(0, VOCABULARY, count)]
    for _ in range(LENGTH - 1):
        rows.append((5 * rows[-1] + 1) % VOCABULARY)
    return np.stack(rows, 1)


def next_token_loss(model: onnx.ModelProto, feeds: dict[str, Array]) -> float:
    """By hand, in numpy, from ONNX Runtime's outputs."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, feeds)
    ids = next(a for n, a in feeds.items() if "mask" not in n)
    shifted = logits[:, :-1].astype(np.float64)
    chances = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return float(-np.take_along_axis(chances, ids[:, 1:, None], -1).mean())


@pytest.mark.parametrize(
    ("model", "name"), [(transformer(), "input_ids"), (recurrent(), "tokens")], ids=["gpt", "lstm"]
)
def test_next_tokens_are_learned(model: onnx.ModelProto, name: str) -> None:
    ids = sentences()
    result = spa.finetune(model, data={name: ids}, epochs=10, batch=16, optimiser="adamw", lr=0.03, held_out=0.25)
    assert result.metric == "nll"
    assert result.settings.loss == "ce"
    assert result.before is not None
    assert result.after is not None
    assert result.after < 0.5 * result.before
    assert next_token_loss(result.model, {name: ids}) < 0.5 * next_token_loss(model, {name: ids})
    assert [e.accuracy for e in result.history] == [None] * 11


def test_the_metric_is_that_of_numpy() -> None:
    ids = np.repeat(sentences(1), 20, 0)
    ids[10:] = (ids[10:] + np.arange(LENGTH)) % VOCABULARY
    result = spa.finetune(transformer(), data={"input_ids": ids}, epochs=1, lr=1e-6, held_out=0.5, batch=4)
    first, second = (next_token_loss(transformer(), {"input_ids": ids[k : k + 1]}) for k in (0, 10))
    wanted = [(k * first + (10 - k) * second) / 10 for k in range(11)]  # which rows are held out, the seed says
    assert result.history[0].nll is not None
    assert min(abs(result.history[0].nll - w) for w in wanted) < 1e-4 * first
    assert abs(first - second) > 1e-2


def test_a_step_is_that_of_torch_written_by_hand() -> None:
    ids = sentences(16)
    result = spa.finetune(recurrent(), data={"tokens": ids}, epochs=1, batch=16, lr=0.1, held_out=0, warmup=0,
                          schedule="constant", weight_decay=0.0)  # fmt: skip
    w = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in recurrent().graph.initializer}
    lstm = torch.nn.LSTM(WIDTH, WIDTH, batch_first=True)
    order = np.r_[0:WIDTH, 2 * WIDTH : 4 * WIDTH, WIDTH : 2 * WIDTH]  # ONNX has i, o, f, c and torch i, f, c, o
    with torch.no_grad():
        for name, x in (("weight_ih_l0", w["w"][0]), ("weight_hh_l0", w["r"][0])):
            getattr(lstm, name).copy_(x[order])
        for name, x in (("bias_ih_l0", w["b"][0, : 4 * WIDTH]), ("bias_hh_l0", w["b"][0, 4 * WIDTH :])):
            getattr(lstm, name).copy_(x[order])
    head, embed = w["head"].requires_grad_(), w["embed"].requires_grad_()
    tokens = torch.from_numpy(ids)
    logits = lstm(torch.nn.functional.embedding(tokens, embed))[0] @ head
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.optim.SGD([head, embed, *lstm.parameters()], lr=0.1, momentum=0.9, nesterov=True).step()
    after = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    np.testing.assert_allclose(after["head"], head.detach().numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after["embed"], embed.detach().numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after["w"][0][order], lstm.weight_ih_l0.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_distillation_is_mixed_with_next_tokens_of_causal_models_only() -> None:
    ids = {"input_ids": sentences(32)}
    for causal in (True, False):
        model = transformer(causal=causal)
        found = spa.finetune(model, data=ids, teacher=model, loss="kd", epochs=1, batch=16)
        assert set(found.history[-1].parts) == ({"ce", "kd"} if causal else {"kd"})
        assert found.metric == ("nll" if causal else "distance")
    alone = spa.finetune(transformer(), data=ids, teacher=transformer(), loss="kd", alpha=1.0, epochs=1, batch=16)
    assert set(alone.history[-1].parts) == {"kd"}


def test_a_model_that_looks_ahead_needs_labels() -> None:
    with pytest.raises(UsageError, match="causal models only"):
        spa.finetune(transformer(causal=False), data={"input_ids": sentences()}, epochs=1)


def test_padding_does_not_count() -> None:
    ids, mask = sentences(24), np.ones((24, LENGTH), dtype=np.int64)
    mask[:, 6:] = 0
    padded = np.where(mask == 1, ids, 3)
    network = Interpreter(load(transformer(mask=True))).eval()
    feeds = {"input_ids": torch.from_numpy(padded), "attention_mask": torch.from_numpy(mask)}
    outputs = dict(network(feeds))
    found = language(network, feeds, outputs)
    assert found == Language("input_ids", "attention_mask")
    want = torch.nn.functional.cross_entropy(
        outputs["logits"][:, :5].flatten(0, 1), feeds["input_ids"][:, 1:6].flatten()
    )
    assert torch.allclose(found.loss(outputs, feeds).mean(), want, rtol=1e-5)


def test_a_model_that_was_really_trained() -> None:
    path, data = ROOT / "data/models/stories260K_rotate_half_ts.onnx", ROOT / "data/data/tinystories_calib_256.npz"
    if not (path.is_file() and data.is_file()):
        pytest.skip(MISSING)
    with np.load(data) as stored:
        ids = stored["tokens"].astype(np.int64)[:32, :48]
    small = spa.prune(path, target="params=0.8")
    result = spa.finetune(small.model, data={"input_ids": ids}, epochs=1, batch=8)
    assert result.metric == "nll"
    assert result.before is not None
    assert result.after is not None
    assert result.after < result.before - 0.3
