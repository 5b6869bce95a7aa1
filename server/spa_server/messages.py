"""Between messages and what they say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message  # type: ignore[import-untyped]  # no annotations
from google.protobuf.timestamp_pb2 import Timestamp  # type: ignore[import-untyped]  # no annotations

from spa.jobs import JobSpec, read, to_json
from spa_server._generated import jobs_pb2, models_pb2
from spa_server.errors import invalid

if TYPE_CHECKING:  # clients have no database
    from spa_server.database.collections import Collection
    from spa_server.database.jobs import Event, Job
    from spa_server.held import StoredFile

__all__ = [
    "dataset_message",
    "event_message",
    "file_message",
    "job_message",
    "model_message",
    "spec_message",
    "spec_of",
    "states_of",
]


def spec_of(message: jobs_pb2.JobSpec) -> JobSpec:
    """What a message asks for.

    Raises:
        Refusal: it asks for nothing.
        UsageError: a field has a value that cannot be.
    """
    kind = message.WhichOneof("kind")
    if kind is None:
        raise invalid("spec", "spec: says nothing; set one of its kinds")
    inner = getattr(message, kind)
    return read({"kind": kind, **{field.name: _plain(value) for field, value in inner.ListFields()}})


def _plain(value: Any) -> Any:
    """Lists and maps of protobuf as those of Python."""
    if hasattr(value, "items"):
        return dict(value.items())
    return value if isinstance(value, str | int | float) else list(value)


def spec_message(spec: JobSpec) -> jobs_pb2.JobSpec:
    """The message that asks for this."""
    out = jobs_pb2.JobSpec()
    inner = getattr(out, spec.kind)
    inner.SetInParent()
    for name, value in to_json(spec).items():
        if name == "kind":
            continue
        if isinstance(value, Mapping):
            getattr(inner, name).update(value)
        elif isinstance(value, list):
            getattr(inner, name).extend(value)
        else:
            setattr(inner, name, value)
    return out


def file_message(file: StoredFile) -> models_pb2.File:
    """A file."""
    return models_pb2.File(path=file.path, sha256=file.sha256, size=file.size)


def model_message(found: Collection) -> models_pb2.Model:
    """A model."""
    return models_pb2.Model(**_collection(found))


def dataset_message(found: Collection) -> models_pb2.Dataset:
    """A dataset."""
    return models_pb2.Dataset(**_collection(found))


def _collection(found: Collection) -> dict[str, Any]:
    return {
        "name": found.name,
        "display_name": found.display_name,
        "files": map(file_message, found.files),
        "create_time": _time(found.created),
    }


def job_message(job: Job) -> jobs_pb2.Job:
    """A job."""
    return jobs_pb2.Job(
        name=job.name,
        spec=spec_message(job.spec),
        state=_state(job.state),
        error=None if job.code is None else jobs_pb2.JobError(code=job.code, message=job.message or ""),
        create_time=_time(job.created),
        start_time=_time(job.started),
        end_time=_time(job.ended),
        attempt=job.attempt,
        files=map(file_message, job.files),
        request_id=job.request_id,
    )


def event_message(event: Event) -> jobs_pb2.JobEvent:
    """An event."""
    out = jobs_pb2.JobEvent(sequence=event.sequence, time=_time(event.time))
    kind, body = next(iter(event.body.items()))
    message: Message = getattr(out, kind)
    message.SetInParent()
    match kind:
        case "state":
            out.state.state, out.state.attempt = _state(body["state"]), body.get("attempt", 0)
            if "error" in body:
                out.state.error.code, out.state.error.message = body["error"]["code"], body["error"]["message"]
        case "stage":
            out.stage.stage, out.stage.done, out.stage.total = body["stage"], body["done"], body["total"]
        case "metric":
            out.metric.epoch = body["epoch"]
            out.metric.values.update(body["values"])
    return out


def states_of(states: Any) -> list[str]:
    """Names of states as the database has them. Raises: Refusal if one is unknown."""
    known = {number: name.removeprefix("JOB_STATE_").lower() for name, number in jobs_pb2.JobState.items() if number}
    if any(state not in known for state in states):
        raise invalid("states", "states: one is not known here")
    return [known[state] for state in states]


def _state(name: str) -> Any:
    return jobs_pb2.JobState.Value(f"JOB_STATE_{name.upper()}")


def _time(at: float | None) -> Timestamp | None:
    if at is None:
        return None
    out = Timestamp()
    out.FromNanoseconds(int(at * 1e9))
    return out
