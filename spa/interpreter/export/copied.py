"""Source of a kernel of the interpreter: its function is copied, and what it has enclosed becomes keyword arguments.

So no operator is written a second time for the exported module. What cannot be copied is a kernel that looks at the
running interpreter, or that has enclosed an object which cannot be written down.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from spa.interpreter.base import Node
from spa.interpreter.export.names import Names, NoLiteral, literal, torch_name

_IMPORTS = {"torch": "torch", "torch.nn.functional": "F", "math": "math", "functools": "functools", "numpy": "np",
            "itertools": "itertools"}  # fmt: skip
_KNOWN = frozenset(["Tensor", "None", "int", "float", "bool", "str", "list", "tuple"])
"""Names in annotations that the exported module has."""


class NoSource(Exception):
    """A kernel cannot be written down; the message says why in a few words."""


class Helpers:
    """Functions that the exported module carries along."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._called: dict[tuple[Any, ...], str] = {}
        self._open: set[FunctionType] = set()
        self.definitions: list[str] = []
        """In the order in which they must stand."""
        self.modules: set[str] = set()
        """Modules that they use."""

    def call(self, kernel: Any, operator: str, arguments: list[str]) -> tuple[str, bool]:
        """A call of the kernel, and whether it gives a tuple.

        Raises: NoSource.
        """
        kernel, arguments = _unwrapped(kernel, arguments)
        name = torch_name(kernel)
        if name is not None:
            return f"{name}({', '.join(arguments)})", False
        if not isinstance(kernel, FunctionType):
            raise NoSource(f"its function is {type(kernel).__name__}")
        name, enclosed = self._defined(kernel, operator)
        returns = _tree(kernel).returns
        several = returns is not None and ast.unparse(returns).startswith("tuple")
        return f"{name}({', '.join([*arguments, *enclosed])})", several

    def _defined(self, function: FunctionType, wanted: str) -> tuple[str, list[str]]:
        """The helper of a function, and the keyword arguments for what it has enclosed."""
        if function in self._open:
            raise NoSource("its function calls itself")
        self._open.add(function)
        try:
            return self._written(function, wanted)
        finally:
            self._open.remove(function)

    def _written(self, function: FunctionType, wanted: str) -> tuple[str, list[str]]:
        tree = _tree(function)
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        enclosed: dict[str, str] = {}
        fixed: dict[str, Any] = {}
        for name, value in zip(function.__code__.co_freevars, cells, strict=True):
            if isinstance(value, Node):
                fixed[name] = value
            else:
                enclosed[name] = self._value(value, f"{wanted}_{name}")
        tree = _with_node(tree, fixed)
        code: Any = function.__code__
        key = (code, *((n, v.outputs) for n, v in fixed.items()))
        called = self._called.get(key)
        if called is None:
            renamed = {name: self._global(function, name) for name in _globals(code, function)}
            called = self._called[key] = self._names.new(wanted)
            tree = _Renamed({old: new for old, new in renamed.items() if old != new}).visit(tree)
            tree.name = called
            tree.decorator_list = []
            tree.args.kwonlyargs += [ast.arg(name) for name in enclosed]
            tree.args.kw_defaults += [None] * len(enclosed)
            self.definitions.append(ast.unparse(ast.fix_missing_locations(_annotated(tree))))
        return called, [f"{name}={text}" for name, text in enclosed.items()]

    def _value(self, value: Any, wanted: str) -> str:
        """An enclosed value as an argument."""
        name = torch_name(value)
        if name is not None:
            return name
        if isinstance(value, FunctionType):
            helper, enclosed = self._defined(value, _spoken(value, wanted))
            if not enclosed:
                return helper
            self.modules.add("functools")
            return f"functools.partial({', '.join([helper, *enclosed])})"
        if isinstance(value, list | tuple):
            parts = [self._value(item, wanted) for item in value]
            return f"[{', '.join(parts)}]" if isinstance(value, list) else f"({', '.join(parts)},)"
        try:
            return literal(value)
        except NoLiteral as error:
            raise NoSource(f"it keeps a {error}") from None

    def _global(self, function: FunctionType, name: str) -> str:
        """What a global name is called in the exported module."""
        value = function.__globals__[name]
        if isinstance(value, ModuleType):
            found = _IMPORTS.get(value.__name__)
            if found is None:
                raise NoSource(f"it uses the module {value.__name__}")
            self.modules.add(found)
            return found
        if isinstance(value, FunctionType) and value.__module__.startswith("spa."):
            return self._defined(value, value.__name__.strip("_"))[0]
        if name == "Tensor":
            return name
        known = torch_name(value)
        if known is not None:
            return known
        if isinstance(value, type):
            raise NoSource(f"it uses the class {name}")
        text = self._value(value, name.strip("_").lower())
        key = ("constant", function.__module__, name)
        if key not in self._called:
            self._called[key] = self._names.new(name.strip("_"))
            self.definitions.append(f"{self._called[key]} = {text}")
        return self._called[key]


def _unwrapped(kernel: Any, arguments: list[str]) -> tuple[Any, list[str]]:
    """`lambda x: function(x, *values)` as the function with the values behind: what attributes become."""
    if isinstance(kernel, FunctionType) and kernel.__qualname__.startswith("with_attributes."):
        inside = dict(
            zip(kernel.__code__.co_freevars, (c.cell_contents for c in kernel.__closure__ or ()), strict=True)
        )
        return inside["function"], [*arguments, *map(literal, inside["values"])]
    return kernel, arguments


def _spoken(function: FunctionType, wanted: str) -> str:
    return wanted if function.__name__ == "<lambda>" else f"{wanted.split('_')[0]}_{function.__name__.strip('_')}"


@functools.cache
def _file(path: str) -> ast.Module:
    return ast.parse("".join(linecache.getlines(path)))


def _tree(function: FunctionType) -> ast.FunctionDef:
    """A copy of the definition of a function; a lambda becomes one. Raises: NoSource."""
    if function.__name__ != "<lambda>":
        try:
            found = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        except (OSError, SyntaxError) as error:
            raise NoSource("its function has no source") from error
        assert isinstance(found, ast.FunctionDef)
        if found.body and isinstance(found.body[0], ast.Expr) and isinstance(found.body[0].value, ast.Constant):
            found.body = found.body[1:] or found.body  # the document is the interpreter's
        return found
    code = function.__code__
    at = [n for n in ast.walk(_file(code.co_filename)) if isinstance(n, ast.Lambda) and n.lineno == code.co_firstlineno]
    alike = [n for n in at if _compiled(n) == _signature(code)]
    if not alike:
        raise NoSource("its function has no source")
    made = ast.parse("def made(): pass").body[0]
    assert isinstance(made, ast.FunctionDef)
    lambda_ = ast.parse(ast.unparse(alike[0]), mode="eval").body
    assert isinstance(lambda_, ast.Lambda)
    made.args, made.body = lambda_.args, [ast.Return(lambda_.body)]
    return made


def _compiled(tree: ast.Lambda) -> tuple[Any, ...]:
    module = compile(ast.Expression(tree), "lambda", "eval")
    return _signature(next(c for c in module.co_consts if isinstance(c, CodeType)))


def _signature(code: CodeType) -> tuple[Any, ...]:
    """What tells lambdas of one line apart; names that are enclosed there are global when it is compiled alone."""
    constants = [c for c in code.co_consts if not isinstance(c, CodeType)]
    return code.co_varnames, sorted({*code.co_names, *code.co_freevars}), constants


def _globals(code: CodeType, function: FunctionType) -> list[str]:
    """Names of the module that a function reads, those of functions inside of it included."""
    names = list(dict.fromkeys(_loaded(code)))
    return [n for n in names if n in function.__globals__]


def _loaded(code: CodeType) -> Iterator[str]:
    import dis

    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _loaded(constant)


class _Renamed(ast.NodeTransformer):
    """Global names as the exported module has them."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        found = self.names.get(node.id)
        return node if found is None else ast.parse(found, mode="eval").body


class _Fixed(ast.NodeTransformer):
    """`node.outputs` as the number that it is."""

    def __init__(self, nodes: dict[str, Node]) -> None:
        self.nodes = nodes

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id in self.nodes:
            if node.attr != "outputs":
                raise NoSource("it looks at the interpreter while it runs")
            return ast.Constant(self.nodes[node.value.id].outputs)
        return self.generic_visit(node)


def _with_node(tree: ast.FunctionDef, nodes: dict[str, Node]) -> ast.FunctionDef:
    if not nodes:
        return tree
    found = _Fixed(nodes).visit(tree)
    assert isinstance(found, ast.FunctionDef)
    if any(isinstance(n, ast.Name) and n.id in nodes for n in ast.walk(found)):
        raise NoSource("it looks at the interpreter while it runs")
    return found


def _annotated(tree: ast.FunctionDef) -> ast.FunctionDef:
    """Without annotations that need names which the exported module has not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = _kept(node.returns)
        elif isinstance(node, ast.arg):
            node.annotation = _kept(node.annotation)
    return _Bare().visit(tree)  # type: ignore[no-any-return]  # ast has no types for what it visits


class _Bare(ast.NodeTransformer):
    """Variables without annotations."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        return None if node.value is None else ast.Assign([node.target], node.value)


def _kept(annotation: ast.expr | None) -> ast.expr | None:
    if annotation is None:
        return None
    names = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}
    return annotation if names <= _KNOWN else None
