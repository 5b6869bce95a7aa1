"""What a server is told: one typed file, and the environment, checked before anything starts."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from spa.errors import UsageError
from spa.typed import read_record

__all__ = [
    "Config",
    "Limits",
    "Listener",
    "Quotas",
    "Retention",
    "Serving",
    "Tls",
    "Workers",
    "listener",
    "load",
    "seconds",
    "size",
]

_PREFIX = "SPA_SERVER_"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_TIMES = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Tls:
    """Certificates, as PEM files."""

    certificate: Path | None = None
    """The server's, with those between it and its root."""
    key: Path | None = None
    """Of that certificate."""
    client_ca: Path | None = None
    """Of clients: only those with a certificate signed by it are let in."""


@dataclass(frozen=True)
class Workers:
    """Processes that do the work."""

    count: int = 1
    """How many run at the same time; 0 for a server that only takes jobs for others."""
    memory: str = "8GB"
    """Resident memory of one, with its children."""
    cpu_time: str = "1d"
    """Processor time of one job."""
    time: str = "1d"
    """Wall time of one job."""
    attempts: int = 3
    """How often a job is begun whose worker or server died."""
    threads: int = 0
    """That numerical libraries use; 0 leaves that to them."""
    lease: str = "30s"
    """After so long without a sign of life of its server, a running job is begun again by another."""
    file: str = "20GB"
    """Bytes of one file that a job may write."""
    cpus: float = 1.0
    """Processors that a job takes of a node, where the executor is a cluster; besides `memory`."""
    gpus: float = 0.0
    """Graphics processors, likewise."""
    folder: str = ""
    """Of the nodes, for files of jobs; one that they share lets a job go on at another node where it was. A folder for
    temporary files by default."""


@dataclass(frozen=True)
class Limits:
    """What one request may take."""

    upload: str = "20GB"
    """Bytes of one file."""
    files: int = 20000
    """Files of one model or dataset."""
    message: str = "64MB"
    """Bytes of one message, tensors included."""
    requests: int = 256
    """Requests that are handled at the same time, watches included; more are told to come again."""


@dataclass(frozen=True)
class Quotas:
    """What one owner may take; 0 for no limit."""

    bytes: str = "100GB"
    """Of uploads and results."""
    running: int = 0
    """Jobs at the same time; more wait."""
    open: int = 100
    """Jobs that wait or run; more are told to come again."""


@dataclass(frozen=True)
class Retention:
    """How long things are kept that nobody needs; 0 for ever."""

    jobs: str = "90d"
    """Jobs that have ended, with their files."""
    uploads: str = "1d"
    """Files that were begun, or of which nothing was made."""
    cache: str = "30d"
    """Measurements that further jobs would find again, after they were last used."""
    every: str = "10m"
    """How often it is looked at."""


@dataclass(frozen=True)
class Metrics:
    """Prometheus; off without an address."""

    listen: str | None = None
    """Such as 127.0.0.1:9464."""


@dataclass(frozen=True)
class Tracing:
    """OpenTelemetry; off without an address."""

    endpoint: str | None = None
    """Of a collector that takes OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces."""


@dataclass(frozen=True)
class Serving:
    """The inference service, see docs/serving.md."""

    enabled: bool = True
    """Whether there is one."""
    versions: int = 64
    """Versions of models that are loaded at the same time, of all owners."""
    pending: str = "1GB"
    """Inputs of all requests without answer."""
    memory: str = "8GB"
    """What opening a model may take; it is opened in a process of its own first."""
    time: str = "2m"
    """How long opening a model may take."""


@dataclass(frozen=True)
class Config:
    """A server."""

    data: Path = Path("spa-server")
    """Folder of everything that is kept, unless `database` and `blobs` say otherwise. Made if it is missing."""
    listen: str = "127.0.0.1:50051"
    """Address and port; port 0 takes a free one."""
    database: str | None = None
    """SQLAlchemy URL, such as postgresql+psycopg://spa@db/spa; SQLite in `data` by default."""
    blobs: str | None = None
    """fsspec URL of the files, such as s3://bucket/spa; a folder in `data` by default."""
    auth: Literal["none", "tokens"] | None = None
    """Who may call: everyone (`none`, the default on the loopback interface), or who has a token (`tokens`, the default
    elsewhere)."""
    executor: str = "process"
    """Where jobs are done: `process` (of this machine), `ray` (the Ray cluster of this machine, or RAY_ADDRESS),
    `ray://local` (one that is started for this server) or ray://HOST:PORT."""
    insecure: bool = False
    """Listen beyond the loopback interface without TLS or without tokens all the same."""
    tls: Tls = field(default_factory=Tls)
    workers: Workers = field(default_factory=Workers)
    limits: Limits = field(default_factory=Limits)
    quotas: Quotas = field(default_factory=Quotas)
    retention: Retention = field(default_factory=Retention)
    metrics: Metrics = field(default_factory=Metrics)
    tracing: Tracing = field(default_factory=Tracing)
    serving: Serving = field(default_factory=Serving)
    reflection: bool = True
    """Tell generic clients what services there are."""
    audit: Path | None = None
    """File to which every request is written, one JSON object per line; `audit.log` in `data` by default."""
    drain: str = "1m"
    """How long running jobs may finish when the server is asked to stop; the others are begun again when it starts."""

    @property
    def database_url(self) -> str:
        """Where jobs are."""
        return self.database or f"sqlite:///{self.data / 'spa.db'}"

    @property
    def blobs_url(self) -> str:
        """Where files are."""
        return self.blobs or str(self.data / "blobs")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return listener(self.listen).loopback

    @property
    def tokens(self) -> bool:
        """Whether callers need one."""
        return self.auth == "tokens" or (self.auth is None and not self.loopback)

    @property
    def secure(self) -> bool:
        """Whether connections are encrypted."""
        return self.tls.certificate is not None


@dataclass(frozen=True)
class Listener:
    """Where to listen."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


def listener(text: str) -> Listener:
    """HOST:PORT.

    Raises:
        UsageError: it is not of this form.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{text!r} is no address; write HOST:PORT, such as 127.0.0.1:50051")
    return Listener(host, int(port))


def size(text: str, where: str = "size") -> int:
    """Bytes: 500MB, 20GB, 0.

    Raises:
        UsageError: it is not of this form.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|)", text.strip(), re.IGNORECASE)
    if not found:
        raise UsageError(f"{where}: cannot read {text!r}; write for example 500MB or 20GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def seconds(text: str, where: str = "time") -> float:
    """Seconds: 30s, 10m, 2h, 90d, 0.

    Raises:
        UsageError: it is not of this form.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if not found:
        raise UsageError(f"{where}: cannot read {text!r}; write for example 30s, 10m, 2h or 90d")
    return float(found[1]) * _TIMES[found[2] or "s"]


def load(path: Path | None, environment: Mapping[str, str] = os.environ) -> Config:
    """The file (if any), then the environment: SPA_SERVER_LISTEN sets `listen`, SPA_SERVER_WORKERS__COUNT `count` of
    `workers`. Relative paths count from the folder of the file, or the working folder.

    Raises:
        UsageError: the file cannot be read, says something unknown, or what would not be safe.
    """
    body: dict[str, Any] = {}
    where = "the environment"
    if path is not None:
        where = str(path)
        try:
            read = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from error
        except yaml.YAMLError as error:
            raise UsageError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
        if not isinstance(read, dict | None):
            raise UsageError(f"{path}: must be a mapping of names to values")
        body = dict(read or {})
    for name, value in environment.items():
        if name.startswith(_PREFIX) and name != f"{_PREFIX}CONFIG":
            _set(body, name[len(_PREFIX) :].lower().split("__"), value)
    folder = (path.parent if path is not None else Path()).resolve()
    config = read_record(Config, _placed(body, folder), where)
    _check(config, where)
    return config


def _set(body: dict[str, Any], keys: list[str], value: str) -> None:
    for key in keys[:-1]:
        inner = body.get(key)
        body[key] = inner = dict(inner) if isinstance(inner, dict) else {}
        body = inner
    body[keys[-1]] = yaml.safe_load(value)


def _placed(body: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    out = {"data": "spa-server", **body}
    for key in ("data", "audit"):
        if isinstance(out.get(key), str):
            out[key] = str(folder / out[key])
    if isinstance(out.get("tls"), dict):
        out["tls"] = {k: str(folder / v) if isinstance(v, str) else v for k, v in out["tls"].items()}
    return out


def _check_executor(config: Config, where: str) -> None:
    name, workers = config.executor, config.workers
    if not re.fullmatch(r"process|ray|ray://local|ray://[^/@?]+:\d+", name):
        raise UsageError(f"{where}: executor: {name!r} is none; write process, ray, ray://local or ray://HOST:PORT")
    if workers.cpus < 0 or workers.gpus < 0 or workers.cpus + workers.gpus == 0:
        raise UsageError(f"{where}: workers: cpus and gpus must be 0 or more, and not both 0")


def _check(config: Config, where: str) -> None:
    place, tls, workers = listener(config.listen), config.tls, config.workers
    for name, text in (("limits: upload", config.limits.upload), ("limits: message", config.limits.message)):
        if size(text, f"{where}: {name}") < 1_000_000:
            raise UsageError(f"{where}: {name}: {text} is too little; 1MB is the least")
    size(config.quotas.bytes, f"{where}: quotas: bytes")
    for name in ("memory", "file"):
        size(getattr(workers, name), f"{where}: workers: {name}")
    for record, names in ((workers, ("cpu_time", "time", "lease")), (config.retention, ("jobs", "uploads", "cache"))):
        for name in names:
            seconds(getattr(record, name), f"{where}: {name}")
    if seconds(config.retention.every, f"{where}: retention: every") < 1 or seconds(workers.lease) < 2:
        raise UsageError(f"{where}: `every` must be 1s or more, and `lease` 2s or more")
    seconds(config.drain, f"{where}: drain")
    for name in ("pending", "memory"):
        size(getattr(config.serving, name), f"{where}: serving: {name}")
    seconds(config.serving.time, f"{where}: serving: time")
    _check_executor(config, where)
    if workers.count < 0 or workers.attempts < 1 or config.limits.requests < 1 or config.limits.files < 1:
        raise UsageError(f"{where}: workers: count must be 0 or more, attempts, requests and files 1 or more")
    if (tls.certificate is None) != (tls.key is None):
        raise UsageError(f"{where}: tls: certificate and key belong together; give both")
    if tls.client_ca is not None and tls.certificate is None:
        raise UsageError(f"{where}: tls: client_ca needs certificate and key as well")
    for file in (tls.certificate, tls.key, tls.client_ca):
        if file is not None and not file.is_file():
            raise UsageError(f"{where}: tls: {file} does not exist")
    if config.metrics.listen is not None:
        listener(config.metrics.listen)
    known = config.tokens or tls.client_ca is not None
    if not place.loopback and not config.insecure and not (config.secure and known):
        wanted = {"TLS (tls: certificate, key)": config.secure, "tokens (auth) or certificates of clients": known}
        missing = " and ".join(what for what, there in wanted.items() if not there)
        raise UsageError(
            f"{where}: listening on {config.listen}, beyond this machine, needs {missing}; "
            "or say `insecure: true` if the network is trusted"
        )
