"""From a compiled model to the text of a torch module: one line per node, dead ones left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from spa.errors import UnsupportedModelError
from spa.interpreter.base import Node, State
from spa.interpreter.export.call import Call, Layout, Weight
from spa.interpreter.export.copied import Helpers, NoSource
from spa.interpreter.export.forms import FORMS
from spa.interpreter.export.modules import MODULES, linear
from spa.interpreter.export.names import Names, given, identifier, snake, tensor_text
from spa.interpreter.export.sizes import Sizes, plain
from spa.interpreter.leaves import Leaves
from spa.interpreter.plan import Plan, plan_for
from spa.interpreter.program import ABSENT, Compiler, Step, described, to_host

_SMALL = 16
"""Constants of so many numbers stand in the code; larger ones are in the file of weights."""
_WORD = re.compile(r"(?<![\w.])[A-Za-z_]\w*")


@dataclass
class Line:
    """An assignment of `forward`."""

    targets: tuple[str, ...]
    text: str
    problem: str = ""
    """Why there is none, if the node has no source form."""


@dataclass(frozen=True)
class Code:
    """The parts of an exported module."""

    inputs: tuple[str, ...]
    """Names of the arguments of `forward`, in the order of the graph's inputs."""
    outputs: tuple[str, ...]
    """What it returns, in the order of the graph's outputs."""
    init: tuple[str, ...]
    forward: tuple[str, ...]
    helpers: tuple[str, ...]
    imports: frozenset[str]
    weights: Mapping[str, Weight]
    """By the name in the state dict."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of several nodes."""

    product: Step
    reads: tuple[int, int, int]
    """Slots of the data, the weight and the bias (ABSENT without one)."""
    stored: bool
    """Whether the weight is [outputs, inputs]."""


def written(model: ir.Model, compiler: Compiler, leaves: Leaves) -> Code:
    """The code of a compiled model.

    Raises: UnsupportedModelError naming a node that has no source form.
    """
    return _Writer(model, compiler, leaves).code()


@dataclass
class _Writer:
    model: ir.Model
    compiler: Compiler
    leaves: Leaves
    lines: list[Line] = field(default_factory=list)
    env: dict[int, str] = field(default_factory=dict)
    """Python per slot."""

    def __post_init__(self) -> None:
        outputs = [v.name or "" for v in self.model.graph.outputs]
        self.main = self.compiler.main
        self.plan: Plan = plan_for(self.compiler, self.main, outputs, (), 0)
        self.steps: list[Step] = [step for step, _ in self.plan.steps]
        self.values = {slot: key[0] for key, slot in self.main.slots.items()}
        self.known = {**self.leaves.parameters, **self.leaves.statistics}
        self.readers: dict[ir.Value, list[tuple[Step, int]]] = {}
        for step in self.steps:
            for k, slot in enumerate(step.reads):
                if slot in self.values:
                    self.readers.setdefault(self.values[slot], []).append((step, k))
        self.locals = Names()
        self.layout = Layout(Names(), Sizes(self.compiler.facts))
        self.helpers = Helpers(self.locals)
        self.held: dict[tuple[ir.Value, bool], str] = {}

    # -- the walk ----------------------------------------------------------------------------------------------------

    def code(self) -> Code:
        """The parts."""
        inputs = self._inputs()
        layers, inside = self._fused()
        for step in self.steps:
            if step not in inside:
                self._step(step, layers.get(step))
        outputs = tuple(self._read(slot) for slot in self.plan.outputs)
        live = self._live(outputs)
        init = [line for line in self.layout.lines if self._used(line, live)]
        text = "\n".join(line.text for line in live)
        helpers = self._needed("\n".join([text, *outputs]))
        modules = {m for m in (*self.helpers.modules, *self.layout.imports) if _mentions(m, [*init, text, *helpers])}
        alive = {line.split(" = ")[0].removeprefix("self.") for line in init}
        alive |= {m[1] for line in init if (m := re.match(r"self\.register_buffer\(\"(\w+)\"", line))}
        weights = {n: w for n, w in self.layout.weights.items() if n.split(".")[0] in alive}
        forward = tuple(_assignment(line) for line in live)
        return Code(inputs, outputs, tuple(init), forward, tuple(helpers), frozenset(modules), weights)

    def _inputs(self) -> tuple[str, ...]:
        names = []
        for value in self.model.graph.inputs:
            if value in self.known or value in self.compiler.constants:
                continue
            name = self.locals.new(identifier(value.name or "") or "x")
            names.append(name)
            slot = self.plan.slot(value)
            if slot is not None:
                self.env[slot] = name
            for axis, size in enumerate(self.compiler.facts.shape(value) or ()):
                symbol = plain(size)
                if symbol is not None and symbol.isidentifier() and self.layout.sizes.text(size) is None:
                    variable = self.locals.new(symbol)
                    self.lines.append(Line((variable,), f"{name}.shape[{axis}]"))
                    self.layout.sizes.name(symbol, variable)
            self.layout.sizes.offer(value, name)
        self.lines.append(Line(("device",), f"{names[0]}.device" if names else "next(self.parameters()).device"))
        return tuple(names)

    def _fused(self) -> tuple[dict[Step, Linear], set[Step]]:
        """Nodes that are one layer: a MatMul with the transposition of its weight and the sum with its bias.

        Returns the last node of each with what the layer reads, and the nodes before it.
        """
        layers: dict[Step, Linear] = {}
        inside: set[Step] = set()
        for step in self.steps:
            if not (_is(step, "MatMul") and len(step.reads) == 2):
                continue
            weight, turned = step.reads[1], self._turned(step)
            weight = weight if turned is None else turned.reads[0]
            if self.values.get(weight) is None or not self._alone(self.values[weight]):
                continue
            matrix = self.known[self.values[weight]]
            add = self._bias(step, matrix.shape[0 if turned else -1], matrix) if matrix.dim() == 2 else None
            if matrix.dim() != 2 or (add is None and turned is None):
                continue
            last, bias = add or (step, ABSENT)
            layers[last] = Linear(step, (step.reads[0], weight, bias), turned is not None)
            inside |= {s for s in (step, turned) if s is not None and s is not last}
        return layers, inside

    def _turned(self, product: Step) -> Step | None:
        """The transposition that makes the second operand of a MatMul, and nothing else."""
        value = self.values.get(product.reads[1])
        if value is None or value.is_graph_output() or len(self.readers[value]) != 1:
            return None
        made = next((s for s in self.steps if product.reads[1] in s.writes), None)
        if made is None or made.node is None or not _is(made, "Transpose"):
            return None
        order = made.node.attributes.get("perm")
        return made if order is None or list(order.as_ints()) == [1, 0] else None

    def _bias(self, product: Step, width: int, matrix: Tensor) -> tuple[Step, int] | None:
        """The sum that adds a bias to a MatMul, and the slot of the bias."""
        out = self.values[product.writes[0]]
        readers = self.readers.get(out, [])
        if out.is_graph_output() or len(readers) != 1 or not _is(readers[0][0], "Add"):
            return None
        add, place = readers[0]
        bias = self.values.get(add.reads[1 - place])
        if bias is None or not self._alone(bias):
            return None
        vector = self.known[bias]
        return (add, add.reads[1 - place]) if tuple(vector.shape) == (width,) and vector.dtype == matrix.dtype else None

    def _alone(self, value: ir.Value) -> bool:
        """Whether a weight has one reader."""
        return value in self.known and len(self.readers.get(value, ())) == 1 and not value.is_graph_output()

    # -- one node ----------------------------------------------------------------------------------------------------

    def _step(self, step: Step, layer: Linear | None) -> None:
        if step.node is None:
            self._move(step)
            return
        if self._size(step):
            return
        if layer is not None:
            assert layer.product.node is not None
            call = self._call(layer.product.node, layer.reads)
            text = linear(call, layer.stored)
            assert text is not None  # it has been checked that it is a linear layer
            self._assign(step, text)
            return
        call = self._call(step.node, step.reads)
        try:
            text, many = self._text(call, step)
        except NoSource:
            self._assign(step, "", problem=described(step.node))
            return
        self._assign(step, text, many=many)

    def _text(self, call: Call, step: Step) -> tuple[str, bool]:
        """Python for a node, and whether it gives a tuple."""
        several = call.node.outputs > 1
        if call.node.ir.domain in ("", "ai.onnx"):
            for forms in (MODULES, FORMS):
                form = forms.get(call.operator)
                text = None if form is None else form(call)
                if text is not None:
                    return text, several
        return self.helpers.call(step.kernel, snake(call.operator), call.args())

    def _call(self, node: ir.Node, reads: Sequence[int]) -> Call:
        compiler = self.compiler
        host = bool(node.outputs) and compiler.on_host(node.outputs[0])
        spec = Node(
            node, compiler.version(node.domain), State(), host, compiler.facts, compiler.constant, compiler.statistic
        )
        values = [None if slot == ABSENT else self.values[slot] for slot in reads]
        leaves = {k: (v, self.known[v]) for k, v in enumerate(values) if v in self.known and v is not None}
        return Call(
            spec,
            self.layout,
            [self.env.get(slot) for slot in reads],
            leaves,
            frozenset(k for k, (v, _) in leaves.items() if self._alone(v)),
            lambda slot: self._read(reads[slot]),
            values=values,
        )

    def _assign(self, step: Step, text: str, *, many: bool = False, problem: str = "") -> None:
        assert step.node is not None
        writes = step.writes
        if len(writes) == 1 and not many and (text.isidentifier() or re.fullmatch(r"self\.\w+", text)):
            self.env[writes[0]] = text
            return
        called = re.match(r"self\.(\w+)\(", text)
        wanted = called[1] if called else snake(step.node.op_type)
        targets = []
        for slot in writes:
            targets.append("_" if slot == ABSENT else self.locals.new(wanted))
        if many and len(writes) == 1:
            text = f"{text}[0]"
        elif many and step.node.op_type != "Split":
            text = f"{text}[:{len(writes)}]"
        self.lines.append(Line(tuple(targets), text, problem))
        for slot, target in zip(writes, targets, strict=True):
            if slot != ABSENT:
                self.env[slot] = target
                self.layout.sizes.offer(self.values[slot], target)

    def _size(self, step: Step) -> bool:
        """Write down integers that are known from sizes, instead of what computes them."""
        if len(step.writes) != 1 or step.writes[0] not in self.values:
            return False
        value = self.values[step.writes[0]]
        text = self._tensor(value, "" if self.compiler.on_host(value) else "device")
        if text is None:
            return False
        self._assign(step, text)
        return True

    def _tensor(self, value: ir.Value, device: str) -> str | None:
        known = self.layout.sizes.items(value)
        kind = self.compiler.facts.dtype(value)
        if known is None or kind not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL):
            return None
        items, rank = known
        body = f"[{', '.join(items)}]" if rank else items[0]
        more = {ir.DataType.INT32: ", dtype=torch.int32"}.get(kind, "" if items else f", dtype={_DTYPES[kind]}")
        return f"torch.tensor({body}{more}{f', device={device}' if device else ''})"

    def _move(self, step: Step) -> None:
        source, target = step.reads[0], step.writes[0]
        value = self.values[target]
        here = step.kernel is to_host
        text = self._tensor(value, "" if here else "device")
        text = text or (f"{self._read(source)}.cpu()" if here else f"{self._read(source)}.to(device)")
        name = self.locals.new(
            re.sub(r"_\d+$", "", self._read(source)) if self._read(source).isidentifier() else "moved"
        )
        self.lines.append(Line((name,), text))
        self.env[target] = name

    # -- weights -----------------------------------------------------------------------------------------------------

    def _read(self, slot: int) -> str:
        """Python for a slot; a weight or constant gets a place in the module."""
        if slot in self.env:
            return self.env[slot]
        value = self.values[slot]
        host = (value, True) in self.main.slots and self.main.slots[value, True] == slot
        key = (value, host)
        if key not in self.held:
            self.held[key] = self._hold(value, host)
        return self.held[key]

    def _hold(self, value: ir.Value, host: bool) -> str:
        learned = self.known.get(value)
        name = self.layout.names.new(identifier(given(value.name)) or ("constant" if learned is None else "weight"))
        if learned is not None:
            made = f"torch.zeros({_shape(learned)}{_kind(learned)})"
            parameter = value in self.leaves.parameters
            self.layout.lines.append(
                f"self.{name} = nn.Parameter({made})" if parameter else f'self.register_buffer("{name}", {made})'
            )
            self.layout.weights[name] = Weight(value, learned)
            return f"self.{name}"
        x = self.compiler.constants[value]
        if x.numel() <= _SMALL and not x.is_complex():
            text = tensor_text(x)
            self.layout.imports |= {"math"} if "math." in text else set()
            if host or not x.dim():
                return text
            self.layout.lines.append(f'self.register_buffer("{name}", {text}, persistent=False)')
            return f"self.{name}"
        made = f"torch.zeros({_shape(x)}{_kind(x)})"
        self.layout.lines.append(f'self.register_buffer("{name}", {made})')
        self.layout.weights[name] = Weight(None, x, learned=False)
        return f"self.{name}.cpu()" if host else f"self.{name}"

    # -- what is needed ----------------------------------------------------------------------------------------------

    def _live(self, outputs: Sequence[str]) -> list[Line]:
        """Lines that outputs depend on. Raises: UnsupportedModelError."""
        wanted = {word for text in outputs for word in _WORD.findall(text)}
        kept = []
        for line in reversed(self.lines):
            if wanted & set(line.targets):
                if line.problem:
                    raise UnsupportedModelError(
                        f"{line.problem} cannot be written as plain torch code; train it with spa finetune instead."
                    )
                kept.append(line)
                wanted.update(_WORD.findall(line.text))
        return kept[::-1]

    def _used(self, line: str, live: Sequence[Line]) -> bool:
        """Whether a line of `__init__` makes something that is read."""
        found = re.match(r'self\.(?:register_buffer\(")?(\w+)', line)
        assert found is not None
        return _mentions(rf"self\.{found[1]}", [*(x.text for x in live), *self._returned()])

    def _returned(self) -> list[str]:
        return [self._read(slot) for slot in self.plan.outputs]

    def _needed(self, text: str) -> list[str]:
        """Helpers that are called, in the order in which they were defined."""
        kept: list[str] = []
        for definition in reversed(self.helpers.definitions):
            name = re.match(r"(?:def )?(\w+)", definition)
            assert name is not None
            if _mentions(name[1], [text, *kept]):
                kept.append(definition)
        return kept[::-1]


def _mentions(name: str, texts: Sequence[str]) -> bool:
    pattern = re.compile(rf"(?<![\w.]){name}\b")
    return any(pattern.search(text) for text in texts)


def _is(step: Step, operator: str) -> bool:
    return step.node is not None and step.node.op_type == operator and step.node.domain in ("", "ai.onnx")


def _assignment(line: Line) -> str:
    return f"{', '.join(line.targets)} = {line.text}"


def _shape(x: Tensor) -> str:
    return ", ".join(map(str, x.shape)) or "()"


def _kind(x: Tensor) -> str:
    return "" if x.dtype == torch.float32 else f", dtype={x.dtype}"


_DTYPES = {ir.DataType.INT64: "torch.int64", ir.DataType.INT32: "torch.int32", ir.DataType.BOOL: "torch.bool"}
