"""Sessions whose run can be ended from another thread."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from spa.runtime import Array, NodeArg, Session

__all__ = ["StoppableSession"]


class StoppableSession:
    """The part of a session that `spa.runtime.run` needs; runs one thing at a time."""

    def __init__(self, session: Session) -> None:
        self._session: Any = session
        # ONNX Runtime makes these lists anew for whoever asks, and each run asks
        self._inputs, self._outputs = list(session.get_inputs()), list(session.get_outputs())
        self._new_options: Callable[[], Any] = importlib.import_module("onnxruntime").RunOptions
        self._options = self._new_options()

    @property
    def session(self) -> Session:
        """Itself, for functions that take sessions and only run them."""
        return cast(Session, self)

    def ready(self) -> Callable[[], None]:
        """Before a batch is run: a function that ends its runs, from any thread and at any time."""
        options = self._options = self._new_options()

        def stop() -> None:
            options.terminate = True

        return stop

    def get_inputs(self) -> Sequence[NodeArg]:
        """Graph inputs."""
        return self._inputs

    def get_outputs(self) -> Sequence[NodeArg]:
        """Graph outputs."""
        return self._outputs

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Array]) -> list[Any]:
        """Compute outputs from numpy arrays."""
        outputs: list[Any] = self._session.run(output_names, input_feed, self._options)
        return outputs

    def run_with_ort_values(self, output_names: Sequence[str] | None, input_dict_ort_values: Any) -> list[Any]:
        """Compute outputs from OrtValues."""
        outputs: list[Any] = self._session.run_with_ort_values(output_names, input_dict_ort_values, self._options)
        return outputs
