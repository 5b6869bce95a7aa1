"""How fast several models run, compared fairly: interleaved in one process, on the same inputs.

A machine drifts (heat, neighbours, clock), so timing one model after the other compares moments, not models. Here
each round times every model once, in a random order, and models are compared within rounds. Sessions are opened anew
several times, because one session can be luckier than another of the same model for all of its life.
Memory and operators are measured apart from that: memory in a fresh process for each model, so that one model's
figures do not contain another's, and operators in runs of their own, because ONNX Runtime's profiler takes time.
"""

from spa.bench.figures import BenchReport, Comparison, Copies, Latency, ModelBench, Quantiles, Verdict
from spa.bench.machine import Clocks
from spa.bench.measure import batch_dims, bench, sweep
from spa.bench.operators import NodeTime, OperatorTime, Profile
from spa.bench.tables import operator_remarks, operator_tables, remarks, report_table
from spa.footprint import Memory

__all__ = [
    "BenchReport",
    "Clocks",
    "Comparison",
    "Copies",
    "Latency",
    "Memory",
    "ModelBench",
    "NodeTime",
    "OperatorTime",
    "Profile",
    "Quantiles",
    "Verdict",
    "batch_dims",
    "bench",
    "operator_remarks",
    "operator_tables",
    "remarks",
    "report_table",
    "sweep",
]
