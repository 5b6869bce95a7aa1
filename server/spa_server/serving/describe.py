"""What is loaded, in the protocol's words: metadata, configuration, statistics."""

from __future__ import annotations

from spa_server._generated_inference import model_config_pb2, service_pb2
from spa_server.serving.signature import TensorSpec
from spa_server.serving.statistics import Duration, Runs
from spa_server.serving.version import LoadedVersion

__all__ = ["PLATFORM", "config_of", "statistics_of", "tensor_metadata"]

PLATFORM = "onnxruntime_onnx"
_BACKEND = "onnxruntime"


def tensor_metadata(spec: TensorSpec) -> service_pb2.ModelMetadataResponse.TensorMetadata:
    """Name, type and sizes of one input or output."""
    return service_pb2.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype.name, shape=_sizes(spec)
    )


def config_of(name: str, loaded: LoadedVersion) -> model_config_pb2.ModelConfig:
    """How a version is served."""
    options = loaded.options
    joins = options.max_batch > 1
    kind = "KIND_GPU" if loaded.provider == "cuda" else "KIND_CPU"
    config = model_config_pb2.ModelConfig(
        name=name,
        platform=PLATFORM,
        backend=_BACKEND,
        max_batch_size=options.max_batch if joins else 0,
        instance_group=[model_config_pb2.ModelInstanceGroup(name=name, count=options.sessions, kind=kind)],
    )
    for target, specs in ((config.input, loaded.signature.inputs), (config.output, loaded.signature.outputs)):
        for spec in specs:
            target.add(name=spec.name, data_type=spec.datatype.config, dims=_sizes(spec)[1 if joins else 0 :])
    if joins:
        config.dynamic_batching.max_queue_delay_microseconds = round(options.queue_delay_ms * 1000)
    return config


def statistics_of(name: str, loaded: LoadedVersion) -> service_pb2.ModelStatistics:
    """What a version did since it was loaded."""
    counts = loaded.statistics
    return service_pb2.ModelStatistics(
        name=name,
        version=loaded.version,
        last_inference=counts.last_ms,
        inference_count=counts.rows,
        execution_count=counts.runs,
        inference_stats=service_pb2.InferStatistics(
            success=_duration(counts.success),
            fail=_duration(counts.fail),
            queue=_duration(counts.queue),
            compute_input=_duration(counts.requests.join),
            compute_infer=_duration(counts.requests.run),
            compute_output=_duration(counts.requests.split),
        ),
        batch_stats=[_batch(rows, runs) for rows, runs in sorted(counts.by_rows.items())],
    )


def _sizes(spec: TensorSpec) -> list[int]:
    return [-1 if size is None else size for size in spec.shape or ()]


def _duration(duration: Duration) -> service_pb2.StatisticDuration:
    return service_pb2.StatisticDuration(count=duration.count, ns=duration.ns)


def _batch(rows: int, runs: Runs) -> service_pb2.InferBatchStatistics:
    return service_pb2.InferBatchStatistics(
        batch_size=rows,
        compute_input=_duration(runs.join),
        compute_infer=_duration(runs.run),
        compute_output=_duration(runs.split),
    )
