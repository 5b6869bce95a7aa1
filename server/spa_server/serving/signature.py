"""What a model takes and gives, and whether a request fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spa.runtime import NodeArg, Session
from spa_server.serving.codec import Array
from spa_server.serving.datatypes import BY_RUNTIME, Datatype
from spa_server.serving.errors import InvalidRequest, NotLoadable

__all__ = ["Signature", "TensorSpec", "same_rows", "signature_of"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output."""

    name: str
    """The tensor's name."""
    datatype: Datatype
    """Type of its elements."""
    shape: tuple[int | None, ...] | None
    """Sizes, None where any is allowed; None if the model does not even tell how many axes there are."""

    def allows(self, shape: Sequence[int]) -> bool:
        """Whether an array of `shape` can be given here."""
        if self.shape is None:
            return True
        return len(shape) == len(self.shape) and all(
            size in (None, given) for size, given in zip(self.shape, shape, strict=True)
        )

    @property
    def open_rows(self) -> bool:
        """Whether axis 0 exists and may have any size."""
        return bool(self.shape) and self.shape is not None and self.shape[0] is None


@dataclass(frozen=True)
class Signature:
    """All inputs and outputs of a model."""

    inputs: tuple[TensorSpec, ...]
    """What a request must give."""
    outputs: tuple[TensorSpec, ...]
    """What an answer holds."""

    def check(self, feeds: Mapping[str, Array]) -> None:
        """Raises: InvalidRequest naming the input that is missing, unknown, or of another type or shape."""
        for spec in self.inputs:
            array = feeds.get(spec.name)
            if array is None:
                raise InvalidRequest(f"input {spec.name!r} is missing.")
            if array.dtype != spec.datatype.dtype:
                given = next((t.name for t in BY_RUNTIME.values() if t.dtype == array.dtype), str(array.dtype))
                raise InvalidRequest(f"input {spec.name!r} must have datatype {spec.datatype.name}, not {given}.")
            if not spec.allows(array.shape):
                raise InvalidRequest(
                    f"input {spec.name!r} must have shape {shape_text(spec.shape)}, not {list(array.shape)}."
                )
        if len(feeds) > len(self.inputs):
            known = {spec.name for spec in self.inputs}
            unknown = next(name for name in feeds if name not in known)
            raise InvalidRequest(f"the model has no input {unknown!r}; it has {_listed(self.inputs)}.")

    def chosen(self, names: Sequence[str]) -> tuple[TensorSpec, ...]:
        """The outputs called `names`, all without names. Raises: InvalidRequest for unknown and repeated ones."""
        if not names:
            return self.outputs
        known = {spec.name: spec for spec in self.outputs}
        for name in names:
            if name not in known:
                raise InvalidRequest(f"the model has no output {name!r}; it has {_listed(self.outputs)}.")
        if len(set(names)) != len(names):
            raise InvalidRequest(f"an output is asked for twice: {', '.join(map(repr, names))}.")
        return tuple(known[name] for name in names)


def shape_text(shape: Sequence[int | None] | None) -> str:
    """Sizes for a message, -1 where any is allowed."""
    return "of any rank" if shape is None else str([-1 if size is None else size for size in shape])


def signature_of(session: Session) -> Signature:
    """What `session` takes and gives.

    Raises: NotLoadable if the protocol has no type for one of its tensors, or these types cannot be run together.
    """
    inputs = tuple(_spec("input", arg) for arg in session.get_inputs())
    outputs = tuple(_spec("output", arg) for arg in session.get_outputs())
    if any(spec.datatype.name == "BF16" for spec in (*inputs, *outputs)):
        # numpy has no bfloat16, so all inputs must be OrtValues, and of text these cannot be made in Python
        for spec in inputs:
            if spec.datatype.name == "BYTES":
                raise NotLoadable(f"input {spec.name!r} is text, which ONNX Runtime does not take beside bfloat16.")
    return Signature(inputs, outputs)


def _spec(kind: str, arg: NodeArg) -> TensorSpec:
    datatype = BY_RUNTIME.get(arg.type)
    if datatype is None:
        raise NotLoadable(f"{kind} {arg.name!r} has type {arg.type}, which the inference protocol cannot carry.")
    # ONNX Runtime reports an unknown rank as a scalar's
    shape = tuple(size if isinstance(size, int) else None for size in arg.shape) if arg.shape else None
    return TensorSpec(arg.name, datatype, shape)


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(repr(spec.name) for spec in specs) or "none"


def same_rows(feeds: Mapping[str, Array]) -> int:
    """The size of axis 0 that all inputs share. Raises: InvalidRequest if they differ or have no axis."""
    sizes = {name: array.shape[0] if array.ndim else None for name, array in feeds.items()}
    first = next(iter(sizes.values()), None)
    for name, size in sizes.items():
        if size is None or size != first:
            raise InvalidRequest(
                f"input {name!r} has {size if size is not None else 'no'} rows where another input has {first}: "
                "this model joins requests, so axis 0 must be the same batch in all inputs."
            )
    return first or 0
