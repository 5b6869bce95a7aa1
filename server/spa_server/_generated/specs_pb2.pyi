from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class InspectSpec(_message.Message):
    __slots__ = ("model", "dims", "page")
    class DimsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    PAGE_FIELD_NUMBER: _ClassVar[int]
    model: str
    dims: _containers.ScalarMap[str, int]
    page: bool
    def __init__(self, model: _Optional[str] = ..., dims: _Optional[_Mapping[str, int]] = ..., page: _Optional[bool] = ...) -> None: ...

class PruneSpec(_message.Message):
    __slots__ = ("method", "criterion", "aggregation", "normalisation", "allocation", "compensate", "recalibrate", "calibration", "samples", "batch", "preprocess", "tokenizer", "max_length", "loss", "memory", "provider", "latency_table", "threads", "batch_size", "scope", "kinds", "ignore", "align", "min_keep", "seed", "dims", "inputs", "model", "target", "output_name", "steps", "check", "page", "evaluate", "metric", "minimise", "allow_io")
    class DimsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    METHOD_FIELD_NUMBER: _ClassVar[int]
    CRITERION_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    NORMALISATION_FIELD_NUMBER: _ClassVar[int]
    ALLOCATION_FIELD_NUMBER: _ClassVar[int]
    COMPENSATE_FIELD_NUMBER: _ClassVar[int]
    RECALIBRATE_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    LATENCY_TABLE_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_FIELD_NUMBER: _ClassVar[int]
    ALIGN_FIELD_NUMBER: _ClassVar[int]
    MIN_KEEP_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_NAME_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    PAGE_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    MINIMISE_FIELD_NUMBER: _ClassVar[int]
    ALLOW_IO_FIELD_NUMBER: _ClassVar[int]
    method: str
    criterion: str
    aggregation: str
    normalisation: str
    allocation: str
    compensate: str
    recalibrate: str
    calibration: str
    samples: int
    batch: int
    preprocess: str
    tokenizer: str
    max_length: int
    loss: str
    memory: str
    provider: str
    latency_table: str
    threads: int
    batch_size: int
    scope: str
    kinds: _containers.RepeatedScalarFieldContainer[str]
    ignore: _containers.RepeatedScalarFieldContainer[str]
    align: str
    min_keep: str
    seed: int
    dims: _containers.ScalarMap[str, int]
    inputs: str
    model: str
    target: _containers.RepeatedScalarFieldContainer[str]
    output_name: str
    steps: int
    check: bool
    page: bool
    evaluate: str
    metric: str
    minimise: str
    allow_io: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, method: _Optional[str] = ..., criterion: _Optional[str] = ..., aggregation: _Optional[str] = ..., normalisation: _Optional[str] = ..., allocation: _Optional[str] = ..., compensate: _Optional[str] = ..., recalibrate: _Optional[str] = ..., calibration: _Optional[str] = ..., samples: _Optional[int] = ..., batch: _Optional[int] = ..., preprocess: _Optional[str] = ..., tokenizer: _Optional[str] = ..., max_length: _Optional[int] = ..., loss: _Optional[str] = ..., memory: _Optional[str] = ..., provider: _Optional[str] = ..., latency_table: _Optional[str] = ..., threads: _Optional[int] = ..., batch_size: _Optional[int] = ..., scope: _Optional[str] = ..., kinds: _Optional[_Iterable[str]] = ..., ignore: _Optional[_Iterable[str]] = ..., align: _Optional[str] = ..., min_keep: _Optional[str] = ..., seed: _Optional[int] = ..., dims: _Optional[_Mapping[str, int]] = ..., inputs: _Optional[str] = ..., model: _Optional[str] = ..., target: _Optional[_Iterable[str]] = ..., output_name: _Optional[str] = ..., steps: _Optional[int] = ..., check: _Optional[bool] = ..., page: _Optional[bool] = ..., evaluate: _Optional[str] = ..., metric: _Optional[str] = ..., minimise: _Optional[str] = ..., allow_io: _Optional[_Iterable[str]] = ...) -> None: ...

class FrontierSpec(_message.Message):
    __slots__ = ("method", "criterion", "aggregation", "normalisation", "allocation", "compensate", "recalibrate", "calibration", "samples", "batch", "preprocess", "tokenizer", "max_length", "loss", "memory", "provider", "latency_table", "threads", "batch_size", "scope", "kinds", "ignore", "align", "min_keep", "seed", "dims", "inputs", "model", "shares", "minimise", "metric", "evaluate", "refit", "page")
    class DimsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    METHOD_FIELD_NUMBER: _ClassVar[int]
    CRITERION_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    NORMALISATION_FIELD_NUMBER: _ClassVar[int]
    ALLOCATION_FIELD_NUMBER: _ClassVar[int]
    COMPENSATE_FIELD_NUMBER: _ClassVar[int]
    RECALIBRATE_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    LATENCY_TABLE_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_FIELD_NUMBER: _ClassVar[int]
    ALIGN_FIELD_NUMBER: _ClassVar[int]
    MIN_KEEP_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    MINIMISE_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    REFIT_FIELD_NUMBER: _ClassVar[int]
    PAGE_FIELD_NUMBER: _ClassVar[int]
    method: str
    criterion: str
    aggregation: str
    normalisation: str
    allocation: str
    compensate: str
    recalibrate: str
    calibration: str
    samples: int
    batch: int
    preprocess: str
    tokenizer: str
    max_length: int
    loss: str
    memory: str
    provider: str
    latency_table: str
    threads: int
    batch_size: int
    scope: str
    kinds: _containers.RepeatedScalarFieldContainer[str]
    ignore: _containers.RepeatedScalarFieldContainer[str]
    align: str
    min_keep: str
    seed: int
    dims: _containers.ScalarMap[str, int]
    inputs: str
    model: str
    shares: _containers.RepeatedScalarFieldContainer[float]
    minimise: str
    metric: str
    evaluate: str
    refit: bool
    page: bool
    def __init__(self, method: _Optional[str] = ..., criterion: _Optional[str] = ..., aggregation: _Optional[str] = ..., normalisation: _Optional[str] = ..., allocation: _Optional[str] = ..., compensate: _Optional[str] = ..., recalibrate: _Optional[str] = ..., calibration: _Optional[str] = ..., samples: _Optional[int] = ..., batch: _Optional[int] = ..., preprocess: _Optional[str] = ..., tokenizer: _Optional[str] = ..., max_length: _Optional[int] = ..., loss: _Optional[str] = ..., memory: _Optional[str] = ..., provider: _Optional[str] = ..., latency_table: _Optional[str] = ..., threads: _Optional[int] = ..., batch_size: _Optional[int] = ..., scope: _Optional[str] = ..., kinds: _Optional[_Iterable[str]] = ..., ignore: _Optional[_Iterable[str]] = ..., align: _Optional[str] = ..., min_keep: _Optional[str] = ..., seed: _Optional[int] = ..., dims: _Optional[_Mapping[str, int]] = ..., inputs: _Optional[str] = ..., model: _Optional[str] = ..., shares: _Optional[_Iterable[float]] = ..., minimise: _Optional[str] = ..., metric: _Optional[str] = ..., evaluate: _Optional[str] = ..., refit: _Optional[bool] = ..., page: _Optional[bool] = ...) -> None: ...

class FinetuneSpec(_message.Message):
    __slots__ = ("model", "data", "output_name", "teacher", "plan", "loss", "epochs", "batch", "lr", "optimiser", "schedule", "warmup", "weight_decay", "accumulate", "amp", "ema", "held_out", "patience", "temperature", "alpha", "gamma", "distance", "augment", "freeze", "sparsity", "strength", "provider", "seed", "samples", "preprocess", "tokenizer", "max_length", "dims")
    class DimsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_NAME_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    OPTIMISER_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    WARMUP_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATE_FIELD_NUMBER: _ClassVar[int]
    AMP_FIELD_NUMBER: _ClassVar[int]
    EMA_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_FIELD_NUMBER: _ClassVar[int]
    AUGMENT_FIELD_NUMBER: _ClassVar[int]
    FREEZE_FIELD_NUMBER: _ClassVar[int]
    SPARSITY_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    model: str
    data: str
    output_name: str
    teacher: str
    plan: str
    loss: str
    epochs: int
    batch: int
    lr: float
    optimiser: str
    schedule: str
    warmup: float
    weight_decay: float
    accumulate: int
    amp: bool
    ema: float
    held_out: float
    patience: int
    temperature: float
    alpha: float
    gamma: float
    distance: str
    augment: str
    freeze: _containers.RepeatedScalarFieldContainer[str]
    sparsity: str
    strength: float
    provider: str
    seed: int
    samples: int
    preprocess: str
    tokenizer: str
    max_length: int
    dims: _containers.ScalarMap[str, int]
    def __init__(self, model: _Optional[str] = ..., data: _Optional[str] = ..., output_name: _Optional[str] = ..., teacher: _Optional[str] = ..., plan: _Optional[str] = ..., loss: _Optional[str] = ..., epochs: _Optional[int] = ..., batch: _Optional[int] = ..., lr: _Optional[float] = ..., optimiser: _Optional[str] = ..., schedule: _Optional[str] = ..., warmup: _Optional[float] = ..., weight_decay: _Optional[float] = ..., accumulate: _Optional[int] = ..., amp: _Optional[bool] = ..., ema: _Optional[float] = ..., held_out: _Optional[float] = ..., patience: _Optional[int] = ..., temperature: _Optional[float] = ..., alpha: _Optional[float] = ..., gamma: _Optional[float] = ..., distance: _Optional[str] = ..., augment: _Optional[str] = ..., freeze: _Optional[_Iterable[str]] = ..., sparsity: _Optional[str] = ..., strength: _Optional[float] = ..., provider: _Optional[str] = ..., seed: _Optional[int] = ..., samples: _Optional[int] = ..., preprocess: _Optional[str] = ..., tokenizer: _Optional[str] = ..., max_length: _Optional[int] = ..., dims: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ProfileSpec(_message.Message):
    __slots__ = ("model", "provider", "threads", "batch", "models", "passes", "seconds", "dims", "inputs")
    class DimsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    provider: str
    threads: int
    batch: int
    models: int
    passes: int
    seconds: float
    dims: _containers.ScalarMap[str, int]
    inputs: str
    def __init__(self, model: _Optional[str] = ..., provider: _Optional[str] = ..., threads: _Optional[int] = ..., batch: _Optional[int] = ..., models: _Optional[int] = ..., passes: _Optional[int] = ..., seconds: _Optional[float] = ..., dims: _Optional[_Mapping[str, int]] = ..., inputs: _Optional[str] = ...) -> None: ...

class BenchmarkSpec(_message.Message):
    __slots__ = ("models", "provider", "threads", "batch", "repeats", "warmup", "seconds", "seed", "memory", "dims", "inputs")
    class DimsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    MODELS_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    REPEATS_FIELD_NUMBER: _ClassVar[int]
    WARMUP_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedScalarFieldContainer[str]
    provider: str
    threads: int
    batch: int
    repeats: int
    warmup: int
    seconds: float
    seed: int
    memory: bool
    dims: _containers.ScalarMap[str, int]
    inputs: str
    def __init__(self, models: _Optional[_Iterable[str]] = ..., provider: _Optional[str] = ..., threads: _Optional[int] = ..., batch: _Optional[int] = ..., repeats: _Optional[int] = ..., warmup: _Optional[int] = ..., seconds: _Optional[float] = ..., seed: _Optional[int] = ..., memory: _Optional[bool] = ..., dims: _Optional[_Mapping[str, int]] = ..., inputs: _Optional[str] = ...) -> None: ...
