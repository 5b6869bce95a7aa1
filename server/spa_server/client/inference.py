"""Models that a server has loaded, asked through the Open Inference Protocol."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from spa.bench.estimates import quantiles
from spa.bench.figures import Quantiles
from spa.errors import RuntimeFailure, SpaError, UsageError
from spa.feeds import ATTEMPTS, InputSpec, check_feeds, load_feeds, make_feeds
from spa_server._generated_inference import service_pb2
from spa_server.client.client import Client
from spa_server.client.failures import error_of
from spa_server.serving.codec import Array, from_raw, to_raw
from spa_server.serving.datatypes import BY_NAME
from spa_server.serving.errors import InvalidRequest

__all__ = ["Answered", "Load", "Served", "Target", "target_of"]

_SERVICE = "/inference.GRPCInferenceService"
_SLICES = 5
"""Turns that each model has, so that what a machine does besides meets all of them."""
_MAKES_MODELS = ("prune", "finetune")


@dataclass(frozen=True)
class Target:
    """A version of a model of a server."""

    text: str
    """As the user named it."""
    model: str
    """Its name in the protocol."""
    version: str
    """Empty leaves the choice to the server."""


@dataclass(frozen=True)
class Answered:
    """An answer."""

    version: str
    outputs: Mapping[str, Array]
    seconds: float
    """From the request's first byte to the answer's last."""


@dataclass(frozen=True)
class Load:
    """What a version answered while so many callers asked without a pause."""

    target: str
    callers: int
    requests: int
    per_second: float
    milliseconds: Quantiles


def target_of(client: Client, text: str, push: Callable[[Path], str]) -> Target:
    """What a user means: an ONNX file (which is sent), `models/ID`, `jobs/ID` (what the job made), or NAME[@VERSION].

    Args:
        client: of the server.
        text: as the user wrote it.
        push: sends a model; its name there.

    Raises:
        SpaError: there is no such thing, or the job makes no model.
    """
    path = Path(text)
    if path.is_file():
        return Target(text, push(path).partition("/")[2], "1")
    kind, _, id_ = text.partition("/")
    if kind == "models" and id_:
        return Target(text, id_, "1")
    if kind == "jobs" and id_:
        return Target(text, _root(client, text).partition("/")[2], id_)
    if path.suffix == ".onnx" or "/" in text:
        raise UsageError(f"{text}: is no file, and no models/ID, jobs/ID or NAME[@VERSION] of a server")
    name, _, version = text.partition("@")
    return Target(text, name, version)


def _root(client: Client, name: str) -> str:
    """The uploaded model from which a job's came."""
    while True:
        spec = client.job(name).spec
        kind = spec.WhichOneof("kind")
        if kind not in _MAKES_MODELS:
            raise UsageError(f"{name}: is a job that makes no model ({kind}); name one that prunes or fine-tunes")
        name = "/".join(getattr(spec, kind).model.split("/")[:2])
        if name.startswith("models/"):
            return name


class Served:
    """The inference service of a server."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._calls: dict[str, Any] = {}

    def prepare(self, targets: Sequence[Target], *, beside: bool = False) -> None:
        """See to it that they are loaded.

        Args:
            targets: what will be asked.
            beside: also load where other versions of the same model are loaded, whose options are the default ones
                then.

        Raises:
            SpaError: one cannot be loaded, or would have to be beside others.
        """
        for model in dict.fromkeys(target.model for target in targets):
            wanted = list(dict.fromkeys(target.version for target in targets if target.model == model))
            missing = [version for version in wanted if not self._is_ready(model, version)]
            if not missing:
                continue
            there = self._loaded(model)
            if there and not beside:
                text = next(t.text for t in targets if (t.model, t.version) == (model, missing[0]))
                raise UsageError(
                    f"{text}: is not loaded, but other versions of its model are ({', '.join(there)}); --load loads it "
                    "beside them"
                )
            request = service_pb2.RepositoryModelLoadRequest(model_name=model)
            if all(wanted):
                versions = [*there, *(version for version in wanted if version not in there)]
                request.parameters["config"].string_param = json.dumps({"versions": versions})
            self._call("RepositoryModelLoad", request)

    def inputs(self, target: Target) -> tuple[InputSpec, ...]:
        """What it takes. Raises: SpaError."""
        request = service_pb2.ModelMetadataRequest(name=target.model, version=target.version)
        answer = self._call("ModelMetadata", request)
        return tuple(
            InputSpec(t.name, BY_NAME[t.datatype].dtype, tuple(d if d >= 0 else None for d in t.shape))
            for t in answer.inputs
        )

    def feeds(
        self, targets: Sequence[Target], inputs: Path | None, dims: Mapping[str, int], batch: int | None, seed: int
    ) -> dict[str, Array]:
        """Inputs that all of them take: read from a file, or made up so that the first one answers.

        Args:
            targets: what will be asked.
            inputs: `.npz` file with one array for each input.
            dims: sizes of open axes of made-up inputs, as `input:axis`.
            batch: size of axis 0 of all of them, where it is open.
            seed: of their values.

        Raises:
            SpaError: the file does not fit, or no made-up input does.
        """
        if inputs is not None and (dims or batch is not None):
            raise UsageError("--dim and --batch are for made-up inputs; leave them out with --inputs")
        specs = self.inputs(targets[0])
        feeds = load_feeds(inputs, specs) if inputs is not None else self._made_up(targets[0], specs, dims, batch, seed)
        for target in targets:
            check_feeds(feeds, self.inputs(target), f"the input of {target.text}")
        return feeds

    def infer(self, target: Target, feeds: Mapping[str, Array], timeout: float | None = None) -> Answered:
        """Ask once. Raises: SpaError."""
        start = time.perf_counter()
        answer = self._call("ModelInfer", _request(target, feeds), timeout)
        taken = time.perf_counter() - start
        return Answered(answer.model_version, _outputs(answer), taken)

    def measure(
        self,
        targets: Sequence[Target],
        feeds: Mapping[str, Array],
        *,
        callers: int,
        seconds: float,
        warmup: int,
        progress: Callable[[int, int], None],
    ) -> list[Load]:
        """Ask each of them for so long by so many callers at the same time; they take turns.

        Raises:
            SpaError: a request is refused.
        """
        requests = [_request(target, feeds).SerializeToString() for target in targets]
        call = self._client.unary(f"{_SERVICE}/ModelInfer", _as_it_is, _as_it_is)
        for request in requests * warmup:
            self._told(call, request, None)
        times: list[list[float]] = [[] for _ in targets]
        spent = [0.0] * len(targets)
        for turn in range(_SLICES):
            for place, request in enumerate(requests):
                start = time.perf_counter()
                times[place] += self._slice(call, request, callers, start + seconds / _SLICES)
                spent[place] += time.perf_counter() - start
                progress(turn * len(targets) + place + 1, _SLICES * len(targets))
        return [
            Load(target.text, callers, len(found), len(found) / taken, quantiles(np.array(found)))
            for target, found, taken in zip(targets, times, spent, strict=True)
        ]

    def _slice(self, call: Any, request: bytes, callers: int, until: float) -> list[float]:
        times: list[float] = []
        errors: list[SpaError] = []

        def ask() -> None:
            try:
                while not errors and (start := time.perf_counter()) < until:
                    self._told(call, request, None)
                    times.append(time.perf_counter() - start)
            except SpaError as error:
                errors.append(error)

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return times

    def _made_up(
        self,
        target: Target,
        specs: Sequence[InputSpec],
        dims: Mapping[str, int],
        batch: int | None,
        seed: int,
    ) -> dict[str, Array]:
        rows = {f"{spec.name}:0": batch for spec in specs if batch is not None and spec.shape and spec.shape[0] is None}
        error: SpaError | None = None
        for attempt in range(ATTEMPTS):
            feeds = make_feeds(specs, seed=seed, dims={**rows, **dims}, attempt=attempt)
            try:
                self.infer(target, feeds)
                return feeds
            except SpaError as refused:
                error = error or refused
        raise RuntimeFailure(
            f"{target.text}: answers no made-up input ({str(error).rstrip('.')}); give real ones with --inputs FILE.npz"
        ) from error

    def _is_ready(self, model: str, version: str) -> bool:
        request = service_pb2.ModelReadyRequest(name=model, version=version)
        return bool(self._call("ModelReady", request).ready)

    def _loaded(self, model: str) -> list[str]:
        found = self._call("RepositoryIndex", service_pb2.RepositoryIndexRequest(ready=True)).models
        return [entry.version for entry in found if entry.name == model]

    def _call(self, method: str, request: Any, timeout: float | None = None) -> Any:
        if method not in self._calls:
            answer = getattr(service_pb2, f"{method}Response")
            self._calls[method] = self._client.unary(
                f"{_SERVICE}/{method}", type(request).SerializeToString, answer.FromString
            )
        return self._told(self._calls[method], request, timeout)

    def _told(self, call: Any, request: Any, timeout: float | None) -> Any:
        try:
            return call(request, timeout=timeout)
        except grpc.RpcError as error:
            raise error_of(error, self._client.address) from error


def _request(target: Target, feeds: Mapping[str, Array]) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=target.model, model_version=target.version)
    names = {datatype.dtype: datatype for datatype in BY_NAME.values()}
    for name, array in feeds.items():
        datatype = names[array.dtype]
        request.inputs.add(name=name, datatype=datatype.name, shape=array.shape)
        request.raw_input_contents.append(bytes(to_raw(array, datatype)))
    return request


def _outputs(answer: service_pb2.ModelInferResponse) -> dict[str, Array]:
    try:
        return {
            tensor.name: from_raw(tensor.name, BY_NAME[tensor.datatype], tensor.shape, data)
            for tensor, data in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }
    except (InvalidRequest, KeyError, ValueError) as error:
        raise SpaError(f"the server's answer cannot be read ({error})") from error


def _as_it_is(data: bytes) -> bytes:
    return data
