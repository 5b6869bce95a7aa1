"""The only place that creates ONNX Runtime sessions, and the only one that runs them.

ONNX Runtime is quiet here (its C++ log goes to stderr otherwise), never falls back behind the user's back,
and every failure becomes one `RuntimeFailure` with the first line of what ONNX Runtime said.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import io
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from spa.errors import RuntimeFailure, UsageError

__all__ = [
    "LENT",
    "Array",
    "NodeArg",
    "Provider",
    "Session",
    "Value",
    "bound_runner",
    "check_installation",
    "cuda_problem",
    "fetch",
    "is_plain",
    "open_session",
    "place",
    "provider_of",
    "run",
    "run_values",
    "runner",
    "runtime_version",
]

Provider = Literal["auto", "cpu", "cuda"]
Array = npt.NDArray[Any]

LENT = "lent.bin"
"""Where a model says that its weights are while they are lent to a session."""
_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_SILENT = 4  # ONNX Runtime's severity FATAL
# numpy has no such types; ONNX Runtime takes their bits, with the ONNX type beside them
_RAW_TYPES: Mapping[str, tuple[int, np.dtype[Any]]] = {
    "tensor(bfloat16)": (16, np.dtype(ml_dtypes.bfloat16)),
    "tensor(float8e4m3fn)": (17, np.dtype(ml_dtypes.float8_e4m3fn)),
    "tensor(float8e4m3fnuz)": (18, np.dtype(ml_dtypes.float8_e4m3fnuz)),
    "tensor(float8e5m2)": (19, np.dtype(ml_dtypes.float8_e5m2)),
    "tensor(float8e5m2fnuz)": (20, np.dtype(ml_dtypes.float8_e5m2fnuz)),
}


class NodeArg(Protocol):
    """What ONNX Runtime says of one graph input or output."""

    @property
    def name(self) -> str:
        """The tensor's name."""

    @property
    def type(self) -> str:
        """Such as `tensor(float)`."""

    @property
    def shape(self) -> Sequence[int | str | None]:
        """A size, a symbol, or None for each axis."""


class Session(Protocol):
    """The part of `onnxruntime.InferenceSession` that `spa` uses (ONNX Runtime ships no types)."""

    def get_inputs(self) -> Sequence[NodeArg]:
        """Graph inputs, without those that have an initializer."""

    def get_outputs(self) -> Sequence[NodeArg]:
        """Graph outputs."""

    def get_providers(self) -> Sequence[str]:
        """Execution providers really in use, preferred first."""

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Array]) -> list[Any]:
        """Compute outputs from numpy arrays."""

    def run_with_ort_values(self, output_names: Sequence[str] | None, input_dict_ort_values: Any) -> list[Any]:
        """Compute outputs from OrtValues."""

    def io_binding(self) -> Any:
        """Inputs and outputs that stay where they are."""

    def run_with_iobinding(self, iobinding: Any) -> None:
        """Compute the outputs of a binding."""

    def end_profiling(self) -> str:
        """Write what was recorded; returns the name of the file."""


@functools.cache
def _ort() -> Any:
    """`onnxruntime`, silenced; imported late because it takes a quarter of a second.

    Raises: RuntimeFailure if the package is missing or damaged.
    """
    try:
        module = importlib.import_module("onnxruntime")
        module.set_default_logger_severity(_SILENT)
    except (ImportError, AttributeError, OSError) as error:
        raise RuntimeFailure(
            f"onnxruntime cannot be imported ({_first_line(error)}): repair it with "
            "`pip install --force-reinstall --no-deps onnxruntime-gpu` (or `onnxruntime` where there is no CUDA)."
        ) from error
    return module


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def runtime_version() -> str:
    """ONNX Runtime's version, such as `1.31.1`. Raises: RuntimeFailure if it cannot be imported."""
    return str(_ort().__version__)


def check_installation() -> str | None:
    """A warning when both `onnxruntime` and `onnxruntime-gpu` are installed, else None.

    They share one folder: the last one installed wins, and removing either breaks the other.
    """
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    if len(found) < 2:
        return None
    return (
        f"{found[0]} and {found[1]} are both installed and overwrite each other's files: uninstall both, "
        "then install only the one you want."
    )


@functools.cache
def cuda_problem() -> str | None:
    """Why CUDA cannot work here, in a few words, or None if nothing speaks against it.

    None is no promise: only a session's own list of providers tells (`provider_of`).
    """
    ort = _ort()
    if _CUDA not in ort.get_available_providers():
        return "the installed onnxruntime is built without CUDA; install onnxruntime-gpu"
    _preload(ort)
    suffix = ".dll" if sys.platform == "win32" else ".so"
    prefix = "" if sys.platform == "win32" else "lib"
    folder = Path(ort.__file__).parent / "capi"
    try:
        for part, mode in (("shared", getattr(ctypes, "RTLD_GLOBAL", 0)), ("cuda", ctypes.DEFAULT_MODE)):
            ctypes.CDLL(str(folder / f"{prefix}onnxruntime_providers_{part}{suffix}"), mode=mode)
    except OSError as error:
        # the library expects to be loaded by ONNX Runtime itself; an unresolved symbol proves nothing
        return None if "undefined symbol" in str(error) else _first_line(error)
    return None


def _preload(ort: Any) -> None:
    """Make the CUDA libraries of pip's nvidia packages visible; what is missing shows in the probe that follows."""
    preload = getattr(ort, "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(OSError, ImportError):
            preload()


def _options(ort: Any, threads: int, optimize: bool, arena: bool, deterministic: bool, repack: bool) -> Any:
    if threads < 0:
        raise UsageError(f"threads must be 0 (let ONNX Runtime choose) or more, not {threads}.")
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads or _allowed()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = arena
    options.enable_mem_pattern = arena
    if not arena:
        # by default casts of weights, which have no inputs, all come first, and their results wait for their readers
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.use_deterministic_compute = deterministic
    # idle threads of one session must not steal time from another one in this process
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.disable_prepacking", "0" if repack else "1")
    return options


def _allowed() -> int:
    """Processors this process may use if that is not all of them, else 0: ONNX Runtime counts those of the machine, and
    its threads would wait for each other on the few that a container or `taskset` leaves."""
    if not hasattr(os, "sched_getaffinity"):
        return 0
    allowed = len(os.sched_getaffinity(0))
    return allowed if allowed < (os.cpu_count() or 1) else 0


def _cuda_options(arena: bool, deterministic: bool) -> dict[str, str]:
    options = {} if arena else {"arena_extend_strategy": "kSameAsRequested"}
    if deterministic:
        options |= {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}
    return options


def open_session(
    model: Path | bytes,
    *,
    provider: Provider = "auto",
    threads: int = 0,
    optimize: bool = True,
    arena: bool = True,
    deterministic: bool = True,
    repack: bool = True,
    profile: Path | None = None,
    weights: Mapping[str, Array] | None = None,
) -> Session:
    """Open `model` with ONNX Runtime, without noise.

    Args:
        model: a file (needed when weights are in external data), or a serialised ModelProto.
        provider: `cuda` insists on the GPU, `cpu` avoids it, `auto` takes it if it works.
        threads: threads inside one operator; 0 lets ONNX Runtime choose.
        optimize: ONNX Runtime's own graph optimisations; off keeps node names and saves memory.
        arena: keep memory between runs; off is slower and uses less.
        deterministic: deterministic kernels, and on CUDA no TF32, so that figures can be compared.
        repack: copy weights into the layout that kernels like best; off, and with `optimize` and `arena` off, weights
            in external data, or in `weights`, stay where they are on the CPU and take no memory of their own.
        profile: record when each operator runs, in a file whose name begins so; `Session.end_profiling` writes it.
        weights: initializers of a serialised model that are external data in the file `LENT` there; CPU only.

    Raises:
        RuntimeFailure: ONNX Runtime refuses the model, or CUDA is asked for and does not work.
        UsageError: `threads` is negative or `provider` is unknown.
    """
    if provider not in ("auto", "cpu", "cuda"):
        raise UsageError(f"provider must be auto, cpu or cuda, not {provider!r}.")
    ort = _ort()
    options = _options(ort, threads, optimize, arena, deterministic, repack)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, os.fspath(profile)
    if weights and isinstance(model, bytes):
        return _lent(ort, model, options, weights)
    problem = None if provider == "cpu" else cuda_problem()
    if provider == "cuda" and problem is not None:
        raise _no_cuda(problem)
    if provider != "cpu" and problem is None:
        session, reason = _open_cuda(ort, model, options, _cuda_options(arena, deterministic))
        if session is not None:
            return session
        if provider == "cuda":
            raise _no_cuda(reason)
    return _create(ort, model, options, [_CPU])


def _no_cuda(reason: str) -> RuntimeFailure:
    return RuntimeFailure(
        f"CUDA was asked for but is not available ({reason}): use provider cpu or auto, or install what is missing."
    )


def _open_cuda(ort: Any, model: Path | bytes, options: Any, cuda: dict[str, str]) -> tuple[Session | None, str]:
    """A session that really uses CUDA, or None and the reason."""
    try:
        session = _create(ort, model, options, [(_CUDA, cuda), _CPU])
    except RuntimeFailure as error:
        return None, str(error).rstrip(".")
    if provider_of(session) == "cuda":
        return session, ""
    return None, "ONNX Runtime could not start it: CUDA 13, cuDNN 9 and an NVIDIA driver are needed"


def _lent(ort: Any, model: bytes, options: Any, weights: Mapping[str, Array]) -> Session:
    """A session on the CPU whose weights are those arrays themselves."""
    values = _values(weights)
    for name, value in values.items():
        options.add_initializer(name, value)
    with tempfile.TemporaryDirectory(prefix="spa-session-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model)
        with open(path.with_name(LENT), "wb") as file:  # never read, but it must be there and large enough
            file.truncate(max(array.nbytes for array in weights.values()))
        session = _create(ort, path, options, [_CPU])
    vars(session)["lent"] = values  # for as long as it lives
    return session


def _create(ort: Any, model: Path | bytes, options: Any, providers: list[Any]) -> Session:
    source, label = (
        (model, f"a model of {len(model)} bytes") if isinstance(model, bytes) else (os.fspath(model), str(model))
    )
    printed = io.StringIO()  # the Python layer prints when a provider fails
    try:
        with contextlib.redirect_stdout(printed):
            session: Session = ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
    except Exception as error:  # its exception classes are private and share no base
        raise RuntimeFailure(f"ONNX Runtime cannot load {label}: {_first_line(error)}.") from error
    return session


def provider_of(session: Session) -> Literal["cpu", "cuda"]:
    """What the session really runs on; single operators that CUDA lacks may still run on the CPU."""
    return "cuda" if _CUDA in session.get_providers() else "cpu"


def run(session: Session, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
    """All outputs, or those named, by name; bfloat16 and float8 are `ml_dtypes` arrays.

    Raises: RuntimeFailure with the first line of ONNX Runtime's message.
    """
    names = [output.name for output in session.get_outputs()] if outputs is None else list(outputs)
    raw = {output.name: _RAW_TYPES.get(output.type) for output in session.get_outputs()}
    try:
        if not _needs_values(session):
            return dict(zip(names, session.run(names, feeds), strict=True))
        values = session.run_with_ort_values(names, _values(feeds))
        return {name: _to_numpy(value, raw.get(name)) for name, value in zip(names, values, strict=True)}
    except Exception as error:  # see _create
        raise _cannot_run(error) from error


def _cannot_run(error: Exception) -> RuntimeFailure:
    return RuntimeFailure(f"ONNX Runtime cannot run the model: {_first_line(error)}.")


class Value(Protocol):
    """A tensor that ONNX Runtime holds, on the CPU or on the GPU (`onnxruntime.OrtValue`)."""

    def shape(self) -> Sequence[int]:
        """Its sizes."""

    def numpy(self) -> Array:
        """Its numbers, maybe in the same memory."""

    def tensor_size_in_bytes(self) -> int:
        """How much memory it takes."""

    def data_type(self) -> str:
        """Its type, such as `tensor(float)`."""


def place(array: Array) -> Value:
    """Hand an array to ONNX Runtime, once for many runs."""
    value: Value = _values({"": array})[""]
    return value


def fetch(value: Value) -> Array:
    """Bring a tensor to Python.

    A copy: what ONNX Runtime gives shares memory with the value, and does not keep an array alive that was `place`d.
    """
    return np.array(value.numpy())


def is_plain(value: Value) -> bool:
    """Whether `fetch` gives numbers that `place` takes back: not so for text, and types that numpy lacks."""
    kind = value.data_type()
    return kind.startswith("tensor(") and kind != "tensor(string)" and kind not in _RAW_TYPES


def run_values(session: Session, feeds: Mapping[str, Value], outputs: Sequence[str]) -> dict[str, Value]:
    """As `run`, but inputs and outputs stay with ONNX Runtime: on the GPU if the session runs there.

    Raises: RuntimeFailure with the first line of ONNX Runtime's message.
    """
    device = provider_of(session)
    try:
        binding = session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, device)
        session.run_with_iobinding(binding)
        return dict(zip(outputs, binding.get_outputs(), strict=True))
    except Exception as error:  # see _create
        raise _cannot_run(error) from error


def runner(session: Session, feeds: Mapping[str, Array]) -> Callable[[], object]:
    """A call that runs the model once on `feeds`, with as little Python as possible around it, for timing.

    The call raises RuntimeFailure like `run`.
    """
    names = [output.name for output in session.get_outputs()]
    execute: Callable[[Sequence[str], Any], object] = session.run
    ready: Mapping[str, Any] = dict(feeds)
    if _needs_values(session):
        execute, ready = session.run_with_ort_values, _values(feeds)

    def call() -> object:
        try:
            return execute(names, ready)
        except Exception as error:  # see _create
            raise _cannot_run(error) from error

    return call


def bound_runner(session: Session, feeds: Mapping[str, Array]) -> Callable[[], object]:
    """As `runner`, but inputs lie on the session's device before the first call, and outputs stay there: copies to and
    from the device are in no call. A call ends when the outputs are complete; it returns the binding that holds them.

    Raises: RuntimeFailure if an input cannot be put on the device, and the call like `run`.
    """
    device = provider_of(session)
    for arg in session.get_inputs() if device != "cpu" else ():
        if arg.type in _RAW_TYPES or not arg.type.startswith("tensor(") or arg.type == "tensor(string)":
            raise RuntimeFailure(
                f"input {arg.name!r} is a {arg.type}, which cannot be kept on the GPU: include copies."
            )
    try:
        ready = _values(feeds, device)
        binding = session.io_binding()
        for name, value in ready.items():
            binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            binding.bind_output(output.name, device)
    except Exception as error:  # see _create
        raise _cannot_run(error) from error

    def call(held: object = ready) -> object:  # on the CPU a binding does not keep its inputs alive
        try:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:  # see _create
            raise _cannot_run(error) from error
        return binding

    return call


def _needs_values(session: Session) -> bool:
    return any(arg.type in _RAW_TYPES for arg in (*session.get_inputs(), *session.get_outputs()))


def _values(feeds: Mapping[str, Array], device: str = "cpu") -> dict[str, Any]:
    codes = {dtype: code for code, dtype in _RAW_TYPES.values()}
    build = _ort().OrtValue
    values = {}
    for name, array in feeds.items():
        code = codes.get(array.dtype)
        if code is None:
            values[name] = build.ortvalue_from_numpy(array, device, 0)
        else:
            bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)
            values[name] = build.ortvalue_from_numpy_with_onnx_type(bits, code)
    return values


def _to_numpy(value: Any, raw: tuple[int, np.dtype[Any]] | None) -> Array:
    if raw is None:
        array: Array = value.numpy()
        return array
    dtype, shape = raw[1], tuple(value.shape())
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    data = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(data, dtype=dtype).reshape(shape).copy()
