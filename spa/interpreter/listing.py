"""The operators as a document: `python -m spa.interpreter > docs/interpreter.md` keeps it true, and a test compares."""

from __future__ import annotations

from spa.interpreter.base import Operator, table
from spa.interpreter.families import load

HEAD = """# Gradients: ONNX models as torch modules

`spa.interpreter` (extra `torch`: `pip install 'spa-prune[torch]'`) runs an ONNX model as a torch module, so that it
can be differentiated and trained without its source code:

```python
import spa
from spa.interpreter import CrossEntropy, Gates, Interpreter

graph = spa.load("model.onnx")
network = Interpreter(graph)  # .to("cuda"), .to(torch.bfloat16), .train() as for any module
loss = CrossEntropy()(network({"image": x}), {"label": y}).mean()
loss.backward()
network.weights["conv1.weight"].grad  # parameters by the name of their initializer
network.trained()  # {initializer: array}, in the model's own types
```

- **Parameters** are the float initializers and float tensors in `Constant` nodes, one `Parameter` for each; what
  several nodes read is one parameter. Constants are: single numbers in arithmetic, masks (numbers as low as -1e30), and
  whatever says a size or a scale. `Interpreter(model, parameters=[...])` names them instead. Exporters merge vectors
  that happen to be equal, in an untrained network nearly all: `untie(graph.model)` gives every use its own.
- **Modes**: in eval mode everything is as ONNX says. In train mode BatchNormalization normalises with the statistics of
  the batch and updates the stored ones (buffers) with the model's momentum, and Dropout drops.
- **Types**: without `.to(dtype)` the types are the model's; with it all floats have that one type. Shape arithmetic
  stays on the CPU: a run on a GPU waits for it only where the model's own control flow depends on data.
- **Memory**: values are freed when they were read for the last time. `network.segments = 8` keeps activations only
  between eight segments, and computes those inside again in the backward pass.
- **Any value**: `network(feeds, outputs=["/layer1/Relu_output_0"])` gives it, and computes only what it needs.
- **Gates**: `Gates(analyze_model(graph.model))` puts a factor of 1 on every prunable unit, where the unit is summed
  over. After `network(feeds, gates=gates)` the derivatives with respect to `gates.vectors` say what removing a unit
  does to the loss, to first order; double backward gives products of the Hessian with a vector. With `samples=n` each
  sample of the batch has gates of its own.
- **Losses** give one number per sample: `CrossEntropy`, `SquaredError`, `CausalLM`; without labels `SampledLabels`
  (drawn from the model's own outputs: the true Fisher information) and `Distance` (to the outputs of the dense model);
  `GraphLoss(Interpreter(...))`, an ONNX graph that computes it; or any callable of outputs and targets.
- **Relevance**: `spa.interpreter.relevance.Propagation(graph)` is the same network with derivatives that follow the
  rules of layer-wise relevance propagation, so that `activation x derivative` is a relevance; `gate_relevance` sums it
  per unit and sample. Bodies of loops and branches, and operators without a rule, keep their true derivatives.
- **As source**: `spa export-torch` writes a model as a torch module in plain code ([training elsewhere](finetune.md)).
- **What is not supported** is one error that names the nodes, before anything runs; `supported(graph)` lists a model's
  operators with reasons.

Every operator is tested against ONNX's own node tests or ONNX Runtime, and its gradient against finite differences;
whole models against ONNX Runtime. The operators marked with a star round to integers, and no gradient passes through an
integer; where QuantizeLinear is followed by DequantizeLinear, or both are inside one operator, it passes straight
through instead (within the range of the type).

## Operators

The number is the opset from which an entry holds, where there are several.
"""
ROUNDING = (
    "QuantizeLinear",
    "DynamicQuantize",
    "QLinear",
    "ConvInteger",
    "MatMulInteger",
    "QGemm",
    "QAttention",
    "QEmbed",
)


def markdown() -> str:
    """The document."""
    load()
    families: dict[str, dict[str, list[str]]] = {}
    for (domain, name), entries in sorted(table().items()):
        for entry in entries:
            family = _family(entry)
            label = f"{name}" + ("\\*" if name.startswith(ROUNDING) else "")
            label += f" ({entry.since})" if len(entries) > 1 else ""
            families.setdefault(domain or "ai.onnx", {}).setdefault(family, []).append(label)
    lines = [HEAD]
    for domain, parts in families.items():
        lines += [f"### {domain}", "", "| family | operators |", "|---|---|"]
        lines += [f"| {family} | {', '.join(dict.fromkeys(names))} |" for family, names in sorted(parts.items())]
        lines.append("")
    return "\n".join(lines)


def _family(entry: Operator) -> str:
    """The module that defines an operator."""
    return str(entry.build.__module__).rpartition(".")[2].replace("_", " ")
