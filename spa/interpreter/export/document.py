"""The text of an exported module around its code."""

from __future__ import annotations

import onnx_ir as ir

from spa.interpreter.export.writer import Code
from spa.version import __version__

_MODULE = '''"""{title}, written by spa {version}; needs torch and numpy.

    from {stem} import load, save

    model = load().train()
    {call}
    save(model, "trained.npz")  # then: spa import-weights {title} trained.npz -o trained.onnx
"""

from __future__ import annotations

{imports}


{helpers}class Net(nn.Module):
    """{about}"""

    def __init__(self) -> None:
        super().__init__()
{init}

    def forward(self, {arguments}){returns}:
{forward}
        return {result}


def load(path: str | Path = Path(__file__).with_name("{file}")) -> Net:
    """The network with its weights, in evaluation mode."""
    model = Net()
    with np.load(path) as stored:
        model.load_state_dict({{name: torch.from_numpy(stored[name]) for name in stored.files}})
    return model.eval()


def save(model: nn.Module, path: str | Path) -> None:
    """Write the weights to a .npz file."""
    state = {{name: x.detach().cpu() for name, x in model.state_dict().items()}}
    np.savez(path, **{{name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in state.items()}})
'''


def text(model: ir.Model, code: Code, title: str, file: str) -> str:
    """The whole module."""
    body = "\n".join((*code.init, *code.forward, *code.helpers))
    modules = sorted({"functools", "itertools", "math"} & code.imports)
    imports = [f"import {name}" for name in modules] + ["from pathlib import Path", "", "import numpy as np"]
    imports += ["import torch", "from torch import Tensor, nn"]
    imports += ["from torch.nn import functional as F"] if "F." in body else []
    fed = {v.name: v for v in model.graph.inputs if v.const_value is None}
    inputs = [f"{name} {_said(_shape(v))}" for name, v in zip(code.inputs, fed.values(), strict=False)]
    outputs = [f"{_said(v.name)} {_said(_shape(v))}" for v in model.graph.outputs]
    single = len(code.outputs) == 1
    result = code.outputs[0] if single else f"({', '.join(code.outputs)})"
    return _MODULE.format(
        title=_said(title),
        version=__version__,
        stem=file.rpartition(".")[0],
        file=file,
        call=f"{'output' if single else 'outputs'} = model({', '.join(code.inputs)})",
        imports="\n".join(imports),
        helpers="".join(f"{part}\n\n\n" for part in code.helpers),
        about=f"{', '.join(inputs)} -> {', '.join(outputs)}.",
        init=_indented(code.init),
        arguments=", ".join(f"{name}: Tensor" for name in code.inputs),
        returns=" -> Tensor" if single else f" -> tuple[{', '.join(['Tensor'] * len(code.outputs))}]",
        forward=_indented(code.forward),
        result=result,
    )


def _said(text: str | None) -> str:
    """A name as it may stand in a document: nothing of it ends the text around it."""
    return (text or "").replace("\\", "/").replace('"', "'").replace("\n", " ")


def _indented(lines: tuple[str, ...]) -> str:
    return "\n".join(f"        {line}" for line in lines)


def _shape(value: ir.Value) -> str:
    return "[...]" if value.shape is None else f"[{', '.join(str(d) for d in value.shape)}]"
