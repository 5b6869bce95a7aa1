"""A client for programs.

with Client("gpu-box:50051", token="spa_...", ca="ca.pem") as client:
    model = client.push_model("model.onnx")
    job = client.submit(PruneSpec(model, ("macs=0.6",)))
    client.wait(job.name)
    client.pull(job.name, "small/")
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from spa.errors import OutputError, SpaError, UsageError
from spa.jobs import JobSpec
from spa.progress import Progress, silent
from spa_server._generated import (
    account_pb2,
    account_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)
from spa_server.client.failures import error_of, is_passing, job_error
from spa_server.client.files import files_below, files_of_model
from spa_server.client.transfers import Transfers, hashed
from spa_server.config import listener
from spa_server.messages import spec_message

__all__ = ["ENDED", "Client"]

ENDED = (jobs_pb2.JOB_STATE_SUCCEEDED, jobs_pb2.JOB_STATE_FAILED, jobs_pb2.JOB_STATE_CANCELLED)
"""States in which a job stays."""
_QUICK = 60.0
"""Seconds that an answer may take which needs no work."""
_PATIENCE = 300.0
"""Seconds for which a watcher waits for a server that went away."""
_MESSAGE = 64 << 20
T = TypeVar("T")


class Client:
    """One connection to a server."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        ca: str | os.PathLike[str] | None = None,
        certificate: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
    ) -> None:
        """
        Args:
            address: HOST:PORT.
            token: as `spa token create` printed it.
            ca: PEM file of certificates that sign the server's, or `system`; without it nothing is encrypted.
            certificate: PEM file of the client's own certificate, where the server wants one.
            key: of that certificate.

        Raises:
            UsageError: an argument is wrong, or a token would be sent unencrypted over a network.
        """
        self.address = address
        place = listener(address)
        if token is not None and ca is None and not place.loopback:
            raise UsageError(f"{address}: a token would be sent unencrypted; give --ca (a PEM file, or `system`)")
        options = [("grpc.max_receive_message_length", _MESSAGE), ("grpc.max_send_message_length", _MESSAGE)]
        if ca is None:
            channel = grpc.insecure_channel(address, options)
        else:
            parts = [_read(None if os.fspath(ca) == "system" else ca), _read(key), _read(certificate)]
            channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(*parts), options)
        self._channel = channel
        if token is not None:
            channel = grpc.intercept_channel(channel, _Bearer(token))
        self._calling = channel
        self._account = account_pb2_grpc.AccountServiceStub(channel)
        self._transfers = Transfers(channel)
        self._models = models_pb2_grpc.ModelServiceStub(channel)
        self._datasets = models_pb2_grpc.DatasetServiceStub(channel)
        self._jobs = jobs_pb2_grpc.JobServiceStub(channel)
        self._piece = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def unary(self, method: str, write: Callable[[Any], bytes], read: Callable[[bytes], Any]) -> Callable[..., Any]:
        """A method of any service of the server, called with the token.

        Args:
            method: `/package.Service/Method`.
            write: makes the bytes of a request.
            read: makes an answer of bytes.
        """
        call: Callable[..., Any] = self._calling.unary_unary(method, write, read)
        return call

    def account(self) -> account_pb2.GetAccountResponse:
        """Who the server takes this client for, and what it may use. Raises: SpaError."""
        with self._told():
            answer: account_pb2.GetAccountResponse = self._account.GetAccount(
                account_pb2.GetAccountRequest(), timeout=_QUICK
            )
        return answer

    def push_model(
        self, path: str | os.PathLike[str], *, name: str = "", progress: Progress = silent
    ) -> models_pb2.Model:
        """Send a model with its external data; what the server has is not sent again.

        Args:
            path: ONNX file.
            name: for people; the file's name by default.
            progress: told about `hash` and `upload`, in bytes of the file at hand.

        Raises:
            SpaError: the file cannot be read, or the server refuses.
        """
        files = self._push(files_of_model(Path(path)), progress)
        request = models_pb2.CreateModelRequest(display_name=name, files=files)
        with self._told():
            model: models_pb2.Model = self._models.CreateModel(request, timeout=_QUICK).model
        return model

    def push_dataset(
        self, path: str | os.PathLike[str], *, name: str = "", progress: Progress = silent
    ) -> models_pb2.Dataset:
        """Send a file, or a folder with all below it; as `push_model`. Raises: SpaError."""
        files = self._push(files_below(Path(path)), progress)
        request = models_pb2.CreateDatasetRequest(display_name=name, files=files)
        with self._told():
            dataset: models_pb2.Dataset = self._datasets.CreateDataset(request, timeout=_QUICK).dataset
        return dataset

    def models(self) -> Iterator[models_pb2.Model]:
        """All models, the newest first. Raises: SpaError."""
        yield from self._pages(
            lambda token: self._models.ListModels(models_pb2.ListModelsRequest(page_token=token)), "models"
        )

    def datasets(self) -> Iterator[models_pb2.Dataset]:
        """All datasets, the newest first. Raises: SpaError."""
        yield from self._pages(
            lambda token: self._datasets.ListDatasets(models_pb2.ListDatasetsRequest(page_token=token)), "datasets"
        )

    def jobs(self) -> Iterator[jobs_pb2.Job]:
        """All jobs, the newest first. Raises: SpaError."""
        yield from self._pages(lambda token: self._jobs.ListJobs(jobs_pb2.ListJobsRequest(page_token=token)), "jobs")

    def delete(self, name: str) -> None:
        """Delete a model, dataset or job by name. Raises: SpaError."""
        kind = name.partition("/")[0]
        calls: dict[str, Callable[[], object]] = {
            "models": lambda: self._models.DeleteModel(models_pb2.DeleteModelRequest(name=name), timeout=_QUICK),
            "datasets": lambda: self._datasets.DeleteDataset(
                models_pb2.DeleteDatasetRequest(name=name), timeout=_QUICK
            ),
            "jobs": lambda: self._jobs.DeleteJob(jobs_pb2.DeleteJobRequest(name=name), timeout=_QUICK),
        }
        if kind not in calls:
            raise UsageError(f"{name!r} must be models/ID, datasets/ID or jobs/ID")
        with self._told():
            calls[kind]()

    def submit(self, spec: JobSpec, *, request_id: str | None = None) -> jobs_pb2.Job:
        """Start a job. Should the connection break, the request is sent again, and still makes one job only.

        Args:
            spec: what to do; models and files by the names that the server gave them.
            request_id: chosen once per job; random by default.

        Raises:
            SpaError: the server refuses.
        """
        request = jobs_pb2.CreateJobRequest(spec=spec_message(spec), request_id=request_id or str(uuid.uuid4()))
        job: jobs_pb2.Job = self._often(lambda: self._jobs.CreateJob(request, timeout=_QUICK).job)
        return job

    def job(self, name: str) -> jobs_pb2.Job:
        """A job. Raises: SpaError."""
        job: jobs_pb2.Job = self._often(
            lambda: self._jobs.GetJob(jobs_pb2.GetJobRequest(name=name), timeout=_QUICK).job
        )
        return job

    def cancel(self, name: str) -> jobs_pb2.Job:
        """Ask a job to stop. Raises: SpaError."""
        job: jobs_pb2.Job = self._often(
            lambda: self._jobs.CancelJob(jobs_pb2.CancelJobRequest(name=name), timeout=_QUICK).job
        )
        return job

    def watch(self, name: str, after: int = 0) -> Iterator[jobs_pb2.JobEvent]:
        """What happens to a job, until it has ended; goes on by itself after a broken connection.

        Args:
            name: `jobs/{id}`.
            after: sequence number of the last event that is known.

        Raises:
            SpaError: there is no such job, or the server stays away.
        """
        since = time.monotonic()
        while True:
            try:
                for answer in self._jobs.WatchJob(jobs_pb2.WatchJobRequest(name=name, after_sequence=after)):
                    after, since = answer.event.sequence, time.monotonic()
                    yield answer.event
                return
            except grpc.RpcError as error:
                if not is_passing(error) or time.monotonic() - since > _PATIENCE:
                    raise error_of(error, self.address) from error
            time.sleep(0.5)

    def wait(self, name: str, *, progress: Progress = silent) -> jobs_pb2.Job:
        """Wait for a job to end.

        Args:
            name: `jobs/{id}`.
            progress: told its stages.

        Raises:
            SpaError: it failed or was cancelled; of the kind that the same work would have raised here.
        """
        for event in self.watch(name):
            if event.WhichOneof("event") == "stage":
                progress(event.stage.stage, event.stage.done, event.stage.total)
        job = self.job(name)
        if job.state == jobs_pb2.JOB_STATE_FAILED:
            raise job_error(job.error.code, job.error.message, name)
        if job.state == jobs_pb2.JOB_STATE_CANCELLED:
            raise SpaError(f"{name}: was cancelled")
        return job

    def pull(
        self,
        name: str,
        target: str | os.PathLike[str],
        *,
        only: Sequence[str] | None = None,
        progress: Progress = silent,
    ) -> list[Path]:
        """Get files of a job; each whole or not at all.

        Args:
            name: `jobs/{id}`.
            target: folder, made if it is missing.
            only: paths of the files; all by default.
            progress: told about `download`, in bytes of the file at hand.

        Raises:
            SpaError: the job has no such file, a file cannot be written, or the server refuses.
        """
        files = {file.path: file for file in self.job(name).files}
        missing = [path for path in only or () if path not in files]
        if missing or not files:
            raise UsageError(f"{name}: has no file {missing[0]!r}" if missing else f"{name}: has no files (yet)")
        folder, out = Path(target), []
        for path in only or files:
            place = folder / path
            if folder.resolve() not in place.resolve().parents:
                raise SpaError(f"{name}: the server names a file outside of the folder ({path!r}), which is refused")
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{place.parent}: cannot be made ({error.strerror})") from error
            with self._told():
                self._transfers.download(name, files[path], place, progress)
            out.append(place)
        return out

    def _push(self, files: Sequence[tuple[str, Path]], progress: Progress) -> list[models_pb2.File]:
        self._piece = self._piece or int(self.account().chunk_bytes)
        out = []
        for name, path in files:
            sha256, size = hashed(path, progress)
            with self._told():
                self._transfers.upload(path, sha256, size, self._piece, progress)
            out.append(models_pb2.File(path=name, sha256=sha256))
        return out

    def _pages(self, page: Callable[[str], Any], field: str) -> Iterator[Any]:
        token = ""
        while True:
            with self._told():
                answer = page(token)
            yield from getattr(answer, field)
            token = answer.next_page_token
            if not token:
                return

    def _often(self, call: Callable[[], T]) -> T:
        """A call that may be made twice."""
        for pause in (0.2, 1.0, 3.0):
            try:
                return call()
            except grpc.RpcError as error:
                if not is_passing(error):
                    raise error_of(error, self.address) from error
            time.sleep(pause)
        with self._told():
            return call()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Refusals inside are errors of this package."""
        try:
            yield
        except grpc.RpcError as error:
            raise error_of(error, self.address) from error


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]  # no annotations
    grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]  # as above
    grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]  # as above
):
    """Adds the token to every call."""

    def __init__(self, token: str) -> None:
        self._entry = ("authorization", f"Bearer {token}")

    def _add(self, call: Any, details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or ()), self._entry]
        return call(details._replace(metadata=metadata), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = _add


def _read(path: str | os.PathLike[str] | None) -> bytes | None:
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
