"""Training elsewhere: a model as a torch module in plain source, and its trained weights back in the same graph."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spa.errors import OutputError, RuntimeFailure, UsageError
from spa.feeds import load_feeds, runnable_feeds
from spa.graph import Graph, Source, load, restore
from spa.interpreter import Interpreter, untie_if_merged
from spa.interpreter.export import Exported, Weight, exported
from spa.interpreter.types import to_tensor
from spa.options import check_output
from spa.progress import Progress, silent
from spa.runtime import Session, open_session, run
from spa.signature import inputs_of
from spa.store import publish, save
from spa.train.stored import read
from spa.train.writing import Feeds, write_back, written
from spa.verify import HALF_TOLERANCE, TOLERANCE, Verification, half_precision, measure, require

_SAME = 1e-5
"""Relative error between the exported module and the torch executor, which compute the same in the same order."""


@dataclass(frozen=True)
class Module:
    """A torch module that was written."""

    output: Path
    """Its source."""
    weights: Path
    """Its weights, a .npz file beside it."""
    parameters: int
    """Numbers that training changes."""
    copied: int
    """Functions that were copied from the interpreter, for operators that are no call of torch."""
    verify: Verification | None
    """Its outputs against those of ONNX Runtime; None if that was not asked for."""

    def to_json(self) -> dict[str, Any]:
        """As `spa export-torch --json` prints it."""
        verify = None if self.verify is None else asdict(self.verify)
        return {**vars(self), "output": str(self.output), "weights": str(self.weights), "verify": verify}


def export_torch(
    source: Source,
    output: str | os.PathLike[str],
    *,
    inputs: str | os.PathLike[str] | None = None,
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
    check: bool = True,
    progress: Progress = silent,
) -> Module:
    """Write a model as the source of a torch module, which needs torch and numpy only, with its weights beside it.

    Args:
        source: a path, `onnx.ModelProto`, `onnx_ir.Model` or `onnx_graphsurgeon.Graph`.
        output: the Python file; the weights go to the same name with `.npz`.
        inputs: an .npz file of inputs to compare on, instead of made-up ones.
        dims: sizes of symbolic axes of made-up inputs.
        seed: of made-up inputs.
        check: compare the module's outputs with those of ONNX Runtime before anything is written.
        progress: called with (stage, done, total); stages `load`, `export`, `verify`, `save`.

    Raises:
        UsageError: the output is no name of a Python module, an option is wrong, or torch is missing.
        ModelError, UnsupportedModelError: the model cannot be read; or a node cannot be differentiated, or has no
            source form, and is named.
        RuntimeFailure: ONNX Runtime cannot run the model.
        VerifyError: the module computes something else; nothing is written.
        OutputError: the files cannot be written.
    """
    path = Path(output)
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise UsageError(f"{path}: is no name of a Python module; write for example -o {_module(path)}.py")
    check_output(path)
    progress("load", 0, 1)
    graph = load(source)
    progress("export", 0, 1)
    made = _exported(graph, path)
    verification = None
    if check:
        progress("verify", 0, 1)
        verification = _compared(graph, made, path, inputs, dims or {}, seed)
        require(verification, f"the torch module of {_title(graph)}")
    progress("save", 0, 1)
    weights = path.with_suffix(".npz")
    _write(path, weights, made)
    count = sum(w.tensor.numel() for w in made.weights.values() if w.learned)
    return Module(path, weights, count, made.helpers, verification)


def _module(path: Path) -> str:
    return "".join(c if c.isalnum() else "_" for c in path.stem).lstrip("_0123456789") or "module"


def _title(graph: Graph) -> str:
    return "model.onnx" if graph.path is None else graph.path.name


def _exported(graph: Graph, path: Path) -> Exported:
    untie_if_merged(graph.model)
    return exported(graph.model, _title(graph), f"{path.stem}.npz")


def _network(made: Exported) -> nn.Module:
    """The module that the source defines."""
    space: dict[str, Any] = {"__name__": "exported", "__file__": "exported.py"}
    exec(compile(made.text, "exported.py", "exec"), space)  # what was just written here, from checked literals
    network: nn.Module = space["Net"]()
    network.load_state_dict(_state(network, made))
    return network.eval()


def _state(network: nn.Module, made: Exported) -> dict[str, Tensor]:
    """What `load_state_dict` wants: the weights, and torch's own counters of batches."""
    return {name: made.weights[name].tensor if name in made.weights else x for name, x in network.state_dict().items()}


def _compared(
    graph: Graph,
    made: Exported,
    path: Path,
    given: str | os.PathLike[str] | None,
    dims: Mapping[str, int],
    seed: int,
) -> Verification:
    """The module against ONNX Runtime; where that itself is off by more (its Sigmoid), against the torch executor."""
    with tempfile.TemporaryDirectory(prefix=".spa-") as folder:
        file = Path(folder) / "model.onnx"
        save(graph.model, file, external=False)
        session = open_session(file, provider="cpu", optimize=False)
        feeds = _feeds(graph, given, dims, seed)(session)
        ran: dict[str, object] = dict(run(session, feeds))
        want = {n: np.asarray(y) for n, y in ran.items() if not isinstance(y, list)}  # no sequences
    names = [v.name or "" for v in graph.model.graph.inputs if v.name not in graph.model.graph.initializers]
    network = _network(made)
    try:
        with torch.no_grad():
            outputs = network(*(to_tensor(feeds[n]) for n in names))
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise RuntimeFailure(f"{path}: the torch module does not run ({first}); please report this model") from error
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = zip(graph.model.graph.outputs, outputs, strict=True)
    got = {v.name or "": _array(y) for v, y in named if isinstance(y, Tensor)}  # no sequences
    tolerance = HALF_TOLERANCE if half_precision(graph.model) else TOLERANCE
    found = measure({n: _plain(y) for n, y in want.items() if n in got}, got, True, tolerance)
    if found.passed:
        return found
    with torch.no_grad():
        mine = Interpreter(graph.model).eval()({n: to_tensor(a) for n, a in feeds.items()})
    closer = measure({n: _array(y) for n, y in mine.items() if n in got}, got, True, _SAME)
    return closer if closer.passed else found


def _array(y: Tensor) -> NDArray[Any]:
    return np.asarray((y.float() if y.dtype == torch.bfloat16 else y).numpy())


def _plain(y: NDArray[Any]) -> NDArray[Any]:
    return y if y.dtype.kind in "fiubc" else y.astype(np.float32)


def _feeds(graph: Graph, given: str | os.PathLike[str] | None, dims: Mapping[str, int], seed: int) -> Any:
    def choose(session: Session) -> Feeds:
        if given is not None:
            return load_feeds(Path(given), inputs_of(graph.model))
        return runnable_feeds(graph.model, session, seed, dict(dims))

    return choose


def _write(path: Path, weights: Path, made: Exported) -> None:
    """Both files, or none."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=".spa-", dir=path.parent))
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        (folder / path.name).write_text(made.text, encoding="utf-8")
        state = {n: _array(x) for n, x in _state(_network(made), made).items()}
        np.savez(folder / weights.name, allow_pickle=False, **state)
        publish({path: folder / path.name, weights: folder / weights.name})
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path}: cannot be written ({error.strerror}); check the folder's permissions and free space")


# -- and back --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Imported:
    """A model with weights that were trained elsewhere."""

    model: Any
    """The model, of the same kind as the source; None if it was written to a file."""
    output: Path | None
    changed: int
    """Initializers whose numbers are others now."""
    tensors: int
    """Initializers that the weights were for."""
    verify: Verification
    """ONNX Runtime's outputs of the written model against those of the torch executor."""

    def to_json(self) -> dict[str, Any]:
        """As `spa import-weights --json` prints it."""
        body = {"output": None if self.output is None else str(self.output), "verify": asdict(self.verify)}
        return {"changed": self.changed, "tensors": self.tensors, **body}


def import_weights(
    source: Source,
    weights: str | os.PathLike[str] | Mapping[str, Any],
    output: str | os.PathLike[str] | None = None,
    *,
    inputs: str | os.PathLike[str] | None = None,
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Imported:
    """Put weights that were trained as a module of `export_torch` into the graph that the module was made of.

    Args:
        source: that graph.
        weights: the module's state dict: a mapping, or a file (.npz, .safetensors, or .pt of tensors). Names of the
            graph's initializers are understood, too. All weights and statistics must be there; constants are not read.
        output: the ONNX file; None returns the model.
        inputs, dims, seed: on what the written model is compared, see `export_torch`.
        progress: called with (stage, done, total); stages `load`, `save`, `verify`.

    Raises:
        UsageError: the file cannot be read, or a name or shape is not that of this graph; the message names it.
        ModelError, UnsupportedModelError: see `export_torch`.
        VerifyError: ONNX Runtime computes something else from the written weights; nothing is written.
        OutputError: the model cannot be written.
    """
    check_output(output)
    progress("load", 0, 1)
    graph = load(source)
    made = _exported(graph, Path("module.py"))
    label, stored = ("the weights", weights) if isinstance(weights, Mapping) else (str(weights), read(Path(weights)))
    found = _matched(made, {n: _as_array(x, n, label) for n, x in stored.items()}, label)
    network = Interpreter(graph.model).eval()
    if half_precision(graph.model):
        network = network.to(torch.float32)
    changed = 0
    with torch.no_grad():
        for name, tensor in {**network.weights, **network.statistics}.items():
            if name in found:
                fresh = to_tensor(found[name]).to(tensor.dtype)
                changed += not torch.equal(fresh, tensor)
                tensor.copy_(fresh)
    write_back(graph.model, network)
    path = None if output is None else Path(output)
    verification = written(graph, network, _feeds(graph, inputs, dims or {}, seed), path, progress)
    model = restore(graph, graph.model) if path is None else None
    return Imported(model, path, changed, len(found), verification)


def _as_array(x: Any, name: str, label: str) -> NDArray[Any]:
    array = _array(x.detach().cpu()) if isinstance(x, Tensor) else np.asarray(x)
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise UsageError(f"{label}: {name!r} is no tensor of numbers; save the module's state dict.")
    return array


def _matched(made: Exported, stored: Mapping[str, NDArray[Any]], label: str) -> dict[str, NDArray[Any]]:
    """New numbers by initializer, of its own shape. Raises: UsageError."""
    stored = _unwrapped(stored, made)
    wanted = {n: w for n, w in made.weights.items() if w.learned and w.value is not None}
    out: dict[str, NDArray[Any]] = {}
    missing = []
    used = set()
    for name, weight in wanted.items():
        initializer = _initializer(weight)
        key = name if name in stored else initializer
        if key not in stored:
            missing.append(name)
            continue
        used.add(key)
        array, shape = stored[key], tuple(weight.tensor.shape)
        turned = weight.turned and key == name
        shape = shape if turned or not weight.turned else shape[::-1]
        if array.shape != shape:
            raise UsageError(
                f"{label}: {key!r} has shape {list(array.shape)} where this model has {list(shape)}; "
                "export the model again if it was pruned since."
            )
        if not np.isfinite(array.astype(np.float32)).all():
            raise UsageError(f"{label}: {key!r} holds numbers that are not finite; train with a lower learning rate.")
        out[initializer] = array.T if turned else array
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"{label}: lacks {missing[0]!r}{more}; save the whole state dict of the exported module.")
    counters = {n for n in stored if n.endswith(".num_batches_tracked")}
    extra = sorted(stored.keys() - used - counters - made.weights.keys())
    if extra:
        raise UsageError(f"{label}: has {extra[0]!r}, which is nothing of this model; give the model it was made of.")
    return out


def _initializer(weight: Weight) -> str:
    assert weight.value is not None
    return weight.value.name or ""


def _unwrapped(stored: Mapping[str, NDArray[Any]], made: Exported) -> dict[str, NDArray[Any]]:
    """Without what torch's wrappers put before names."""
    for prefix in ("module.", "_orig_mod."):
        if stored and all(n.startswith(prefix) for n in stored) and not any(n.startswith(prefix) for n in made.weights):
            stored = {n.removeprefix(prefix): a for n, a in stored.items()}
    return dict(stored)
