"""Losses against torch's own, against formulas, and the Fisher information of a model whose Fisher is known."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from torch.nn import functional as F  # noqa: E402, N812

from spa.errors import UsageError  # noqa: E402
from spa.graph import load  # noqa: E402
from spa.interpreter import CausalLM, CrossEntropy, Distance, GraphLoss, Interpreter, SampledLabels, SquaredError  # noqa: E402
from tests.models import BUILT  # noqa: E402
from tests.net import Net, feeds  # noqa: E402

RNG = torch.Generator().manual_seed(0)


def test_cross_entropy() -> None:
    logits, labels = torch.randn(4, 5, generator=RNG), torch.tensor([1, 0, 4, 2])
    each = CrossEntropy()({"y": logits}, {"label": labels})
    assert torch.allclose(each, F.cross_entropy(logits, labels, reduction="none"))
    picture, where = torch.randn(2, 3, 4, 4, generator=RNG), torch.randint(0, 3, (2, 4, 4), generator=RNG)
    where[0, :2] = -100
    want = [F.cross_entropy(picture[k : k + 1], where[k : k + 1]) for k in range(2)]
    assert torch.allclose(CrossEntropy()({"y": picture}, {"label": where}), torch.stack(want))
    assert torch.allclose(CrossEntropy(last=True)({"y": picture.movedim(1, -1)}, {"label": where}), torch.stack(want))


def test_squared_error() -> None:
    a, b = torch.randn(3, 4, 2, generator=RNG), torch.randn(3, 4, 2, generator=RNG)
    want = torch.stack([F.mse_loss(a[k], b[k]) for k in range(3)])
    assert torch.allclose(SquaredError()({"y": a}, {"t": b}), want)


def test_causal_lm() -> None:
    proto = BUILT["decoder"].build()
    inputs = feeds(proto)
    logits = Interpreter(load(proto)).eval()(inputs)["logits"].detach()
    ids = torch.from_numpy(inputs["ids"])
    each = CausalLM()({"logits": logits}, {"ids": ids})
    want = torch.stack([F.cross_entropy(logits[k, :-1], ids[k, 1:]) for k in range(2)])
    assert torch.allclose(each, want)


def test_sampled_labels_give_the_true_fisher() -> None:
    """Of softmax regression: E[g g^T] over labels is diag(p) - p p^T."""
    logits = torch.tensor([[0.3, -0.2, 1.0]])
    p = torch.softmax(logits[0], 0)
    many = logits.expand(40000, 3).clone().requires_grad_()
    gradient = torch.autograd.grad(SampledLabels(seed=3)({"y": many}).sum(), many)[0]
    fisher = gradient.t() @ gradient / len(many)
    assert torch.allclose(fisher, torch.diag(p) - torch.outer(p, p), atol=5e-3)


def test_sampled_labels_are_reproducible() -> None:
    logits = {"y": torch.randn(8, 5, generator=RNG)}
    first, again, other = SampledLabels(seed=1), SampledLabels(seed=1), SampledLabels(seed=2)
    a, b = first(logits), first(logits)
    assert torch.equal(a, again(logits))
    assert not torch.equal(a, b)
    assert not torch.equal(a, other(logits))


def test_distance_to_the_dense_outputs() -> None:
    a, b = torch.randn(3, 5, generator=RNG), torch.randn(3, 5, generator=RNG)
    divergence = F.kl_div(a.log_softmax(1), b.log_softmax(1), log_target=True, reduction="none").sum(1)
    assert torch.allclose(Distance()({"logits": a}, {"logits": b}), divergence)
    assert torch.allclose(Distance("values")({"logits": a}, {"logits": b}), (a - b).square().mean(1))
    assert torch.allclose(Distance()({"embedding": a}, {"embedding": b}), (a - b).square().mean(1))
    assert float(Distance()({"logits": a}, {"logits": a}).abs().max()) < 1e-6
    both = Distance()({"logits": a, "embedding": a, "k": torch.arange(3)}, {"logits": b, "embedding": b})
    assert torch.allclose(both, divergence + (a - b).square().mean(1))


def test_a_graph_is_a_loss() -> None:
    """Softmax cross-entropy as ONNX has it."""
    net = Net(opset=17)
    logits, labels = net.input("logits", "n", 5), net.input("label", "n", dtype=np.int64)
    net.named(net("SoftmaxCrossEntropyLoss", logits, labels, reduction="none"), "loss")
    loss = GraphLoss(Interpreter(load(net.model(loss=("n",)))))
    y, where = torch.randn(4, 5, generator=RNG, requires_grad=True), torch.tensor([1, 0, 4, 2])
    each = loss({"logits": y, "other": y}, {"label": where})
    assert torch.allclose(each, F.cross_entropy(y, where, reduction="none"))
    assert torch.autograd.grad(each.sum(), y)[0].shape == (4, 5)
    with pytest.raises(UsageError, match="the loss needs 'label'"):
        loss({"logits": y}, {})


def test_mistakes_are_named() -> None:
    y = torch.zeros(2, 3)
    with pytest.raises(UsageError, match="between 0 and 2"):
        CrossEntropy()({"y": y}, {"label": torch.tensor([0, 3])})
    with pytest.raises(UsageError, match=r"labels of shape \[2, 1\]"):
        CrossEntropy()({"y": y}, {"label": torch.zeros(2, 1)})
    with pytest.raises(UsageError, match="name the one that is meant"):
        CrossEntropy()({"y": y, "z": y}, {"label": torch.zeros(2)})
    with pytest.raises(UsageError, match="no output 'w'"):
        CrossEntropy("w")({"y": y}, {"label": torch.zeros(2)})
    with pytest.raises(UsageError, match="do not fit outputs"):
        SquaredError()({"y": y}, {"t": torch.zeros(2)})
    with pytest.raises(UsageError, match="no output of the model has a dense output"):
        Distance()({"y": y}, {"x": y})
    with pytest.raises(UsageError, match="logits"):
        SampledLabels()({"y": torch.arange(3)})


def test_any_callable_is_a_loss() -> None:
    proto = BUILT["residual_cnn"].build()
    network = Interpreter(load(proto)).eval()

    def loss(outputs: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
        return outputs["logits"].logsumexp(1)

    value = loss(network(feeds(proto)), {})
    assert value.shape == (2,)
    value.sum().backward()
    assert np.isfinite(float(network.weights["stem.weight"].grad.abs().sum()))
