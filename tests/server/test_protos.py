"""The protos: documented, named by one set of rules, and in step with the code."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import types
import typing
from typing import Any, Literal, get_args, get_origin

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FieldDescriptor

from spa.jobs import KINDS, InspectSpec, JobSpec, PruneSpec, read, to_json
from spa.typed import members
from spa_server._generated import jobs_pb2, specs_pb2
from spa_server.messages import spec_message, spec_of
from tests.server.running import ROOT

TOOLS = ROOT / ".venv" / "proto"
needs_tools = pytest.mark.skipif(not (TOOLS / "grpc_tools").is_dir(), reason="no proto compiler: `make proto` gets one")


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "proto" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@needs_tools
@pytest.mark.parametrize("folder", ["spa/v1", "inference"])
def test_generated_code_is_what_the_protos_give(folder: str) -> None:
    module = generator()
    (package,) = (p for p in module.PACKAGES if p.folder == folder)
    found = {path.name: path.read_text(encoding="utf-8") for path in package.target.glob("*.py*")}
    assert found == module.generated(package)


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> descriptor_pb2.FileDescriptorSet:
    """The protos with their comments."""
    out = tmp_path_factory.mktemp("proto") / "all.pb"
    protos = ROOT / "proto"
    sources = sorted(str(path.relative_to(protos)) for path in protos.glob("spa/v1/*.proto"))
    options = [f"-I{protos}", "--include_source_info", f"--descriptor_set_out={out}"]
    command = [sys.executable, "-m", "grpc_tools.protoc", *options, *sources]
    subprocess.run(command, check=True, cwd=protos, env=os.environ | {"PYTHONPATH": str(TOOLS)})
    return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())


@needs_tools
def test_everything_has_a_comment(parsed: descriptor_pb2.FileDescriptorSet) -> None:
    for file in parsed.file:
        comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        wanted: list[tuple[tuple[int, ...], str]] = []
        for i, message in enumerate(file.message_type):
            wanted.append(((4, i), message.name))
            wanted += [((4, i, 2, k), f"{message.name}.{field.name}") for k, field in enumerate(message.field)]
        for i, enum in enumerate(file.enum_type):
            wanted.append(((5, i), enum.name))
            wanted += [((5, i, 2, k), value.name) for k, value in enumerate(enum.value)]
        for i, service in enumerate(file.service):
            wanted.append(((6, i), service.name))
            wanted += [((6, i, 2, k), f"{service.name}.{method.name}") for k, method in enumerate(service.method)]
        missing = [name for path, name in wanted if not comments.get(path, "").strip()]
        assert not missing, (file.name, missing)


@needs_tools
def test_names_follow_one_set_of_rules(parsed: descriptor_pb2.FileDescriptorSet) -> None:
    """Those of `buf lint`: https://buf.build/docs/lint/rules."""
    used: set[str] = set()
    for file in parsed.file:
        assert file.package == "spa.v1"
        assert file.name.startswith("spa/v1/")
        for enum in file.enum_type:
            prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
            assert all(value.name.startswith(prefix) for value in enum.value)
            assert enum.value[0].name == f"{prefix}UNSPECIFIED"
        for message in file.message_type:
            assert re.fullmatch(r"([A-Z][a-z0-9]*)+", message.name)
            assert all(re.fullmatch(r"[a-z][a-z0-9_]*", field.name) for field in message.field)
            assert [field.number for field in message.field] == list(range(1, len(message.field) + 1))
        for service in file.service:
            assert service.name.endswith("Service")
            for method in service.method:
                names = method.input_type.rpartition(".")[2], method.output_type.rpartition(".")[2]
                assert names == (f"{method.name}Request", f"{method.name}Response")
                assert not used & set(names)
                used |= set(names)


def kind_of(annotation: Any) -> str:
    """What the type of a field of a spec is in a proto."""
    plain = [member for member in members(annotation) if member is not types.NoneType]
    origin = get_origin(plain[0])
    if origin is Literal:
        return "string"
    if origin is tuple:
        return f"repeated {kind_of(get_args(plain[0])[0])}"
    if origin is not None:
        return "map"
    return {str: "string", int: "int64", float: "double", bool: "bool"}[plain[0]]


def proto_kind(field: FieldDescriptor) -> str:
    if field.message_type is not None:
        assert field.message_type.GetOptions().map_entry
        return "map"
    names = {FieldDescriptor.TYPE_STRING: "string", FieldDescriptor.TYPE_INT64: "int64"}
    names |= {FieldDescriptor.TYPE_DOUBLE: "double", FieldDescriptor.TYPE_BOOL: "bool"}
    return ("repeated " if field.is_repeated else "") + names[field.type]


@pytest.mark.parametrize("kind", KINDS)
def test_messages_have_the_fields_of_the_specs(kind: str) -> None:
    spec = KINDS[kind]
    message = getattr(specs_pb2, spec.__name__).DESCRIPTOR
    hints = typing.get_type_hints(spec)
    assert [field.name for field in message.fields] == [field.name for field in dataclasses.fields(spec)]
    for field in message.fields:
        assert proto_kind(field) == kind_of(hints[field.name]), field.full_name
    assert jobs_pb2.JobSpec.DESCRIPTOR.fields_by_name[kind].message_type is message


OWN = {"output_name", "page"}
"""Of jobs only."""
LOCAL = {"output", "cache", "checkpoint", "progress", "told", "reached", "graph", "analysis", "folder"}
"""Of local calls only."""


@pytest.mark.parametrize("kind", ["prune", "frontier", "finetune", "profile", "benchmark"])
def test_specs_have_the_parameters_of_the_functions(kind: str) -> None:
    """An option that is added to a function must be added to its spec, with the same choices."""
    from spa.bench import bench
    from spa.frontier.run import frontier
    from spa.latency.profile import profile
    from spa.pipeline import prune
    from spa.prepare import Options

    functions: dict[str, Any] = {"prune": prune, "frontier": frontier, "profile": profile, "benchmark": bench}
    if kind == "finetune":
        pytest.importorskip("torch")
        from spa.train import finetune

        functions["finetune"] = finetune
    signature = inspect.signature(functions[kind], eval_str=False)
    first = {"prune": "source", "frontier": "source", "finetune": "pruned", "benchmark": "models"}.get(kind)
    named = {name for name in signature.parameters if name not in LOCAL | {first, "names"}}
    if kind == "frontier":
        named |= {field.name for field in dataclasses.fields(Options)} - LOCAL - {"steps", "check", "options"}
        named -= {"options", "allow_io"}  # needs samples, which do not fit what a changed interface is fed with
    fields = {field.name for field in dataclasses.fields(KINDS[kind])} - OWN - {"model"}
    assert fields - ({"models"} if kind == "benchmark" else set()) == named


def test_specs_have_the_choices_of_the_functions() -> None:
    from spa.edge.schema import options_of
    from spa.pipeline import prune

    theirs = {name: option.kind for name, option in options_of(prune, sorted(LOCAL | {"reached"})).items()}
    ours = typing.get_type_hints(PruneSpec)
    for name in ("aggregation", "normalisation", "allocation", "compensate", "recalibrate", "provider", "scope"):

        def choices(hints: dict[str, Any], name: str = name) -> set[str]:
            return {choice for member in members(hints[name]) for choice in get_args(member)}

        assert choices(theirs) == choices(ours), name


SPECS: list[JobSpec] = [
    InspectSpec("models/1", {"n": 3}, page=True),
    PruneSpec("jobs/1/out.onnx", ("macs=0.5", "size=1MB"), samples=3, check=False, kinds=("head",), calibration="none"),
    PruneSpec("models/1", ("macs=0.5",), allow_io=("past_*", "present_*")),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.kind)
def test_specs_travel_unchanged(spec: JobSpec) -> None:
    assert read(to_json(spec)) == spec
    message = jobs_pb2.JobSpec.FromString(spec_message(spec).SerializeToString())
    assert spec_of(message) == spec
