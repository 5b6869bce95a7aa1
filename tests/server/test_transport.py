"""TLS, certificates of clients, figures and traces."""

from __future__ import annotations

import datetime
import ipaddress
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest

import spa
from spa.jobs import InspectSpec
from spa_server.client import Client
from spa_server.watching import Watcher
from tests.server.running import Running, free_port

x509 = pytest.importorskip("cryptography.x509", reason="certificates are made with cryptography")
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402


class Authority:
    """Signs certificates."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.ca = self._write(f"{name}.pem", self._signed(self.name, self.key, ca=True))

    def issue(self, name: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = self._write(f"{name}.crt", self._signed(subject, key, ca=False))
        path = self.folder / f"{name}.key"
        form = serialization.PrivateFormat.PKCS8
        path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
        return certificate, path

    def _signed(self, subject: Any, key: Any, *, ca: bool) -> Any:
        now = datetime.datetime.now(datetime.UTC)
        addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
            .sign(self.key, hashes.SHA256())
        )

    def _write(self, name: str, certificate: Any) -> Path:
        path = self.folder / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path


@pytest.mark.slow
def test_tls_with_tokens(tmp_path: Path, model: Path) -> None:
    authority = Authority(tmp_path, "root")
    certificate, key = authority.issue("server")
    tls = {"certificate": str(certificate), "key": str(key)}
    server = Running(tmp_path / "s", tls=tls, auth="tokens").start()
    token = server.token("alice")
    with server.client(token, ca=authority.ca) as client:
        name = client.push_model(model).name
        client.wait(client.submit(InspectSpec(name)).name)
    for wrong in ({"ca": Authority(tmp_path, "other").ca}, {}):
        with server.client(token, **wrong) as client, pytest.raises(spa.SpaError, match="does not answer"):
            client.account()
    server.stop()


@pytest.mark.slow
def test_certificates_of_clients(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path, "root"), Authority(tmp_path, "stranger")
    certificate, key = authority.issue("server")
    tls = {"certificate": str(certificate), "key": str(key), "client_ca": str(authority.ca)}
    server = Running(tmp_path / "s", tls=tls).start()
    mine = authority.issue("grace")
    with server.client(ca=authority.ca, certificate=mine[0], key=mine[1]) as client:
        assert client.account().owner == "grace"
    theirs = stranger.issue("mallory")
    for pair in ((None, None), theirs):
        with server.client(ca=authority.ca, certificate=pair[0], key=pair[1]) as client, pytest.raises(spa.SpaError):
            client.account()
    server.stop()


def test_figures_for_prometheus(tmp_path: Path) -> None:
    port = free_port()
    server = Running(tmp_path, metrics={"listen": f"127.0.0.1:{port}"}).start()
    with server.client() as client:
        client.account()
        with pytest.raises(spa.SpaError):
            client.job("jobs/none")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    assert 'spa_requests_total{code="OK",method="/spa.v1.AccountService/GetAccount"} 1.0' in text
    assert 'spa_requests_total{code="NOT_FOUND",method="/spa.v1.JobService/GetJob"} 1.0' in text
    assert "spa_jobs_running 0.0" in text
    server.stop()


def test_traces_for_opentelemetry() -> None:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="extra `tracing`")
    exporter = memory.InMemorySpanExporter()
    watcher = Watcher()
    watcher.trace(None, exporter)

    class Context:
        def invocation_metadata(self) -> list[tuple[str, str]]:
            return [("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")]

    with pytest.raises(KeyError), watcher.span("/spa.v1.JobService/GetJob", Context()):
        raise KeyError
    watcher.close()
    (span,) = exporter.get_finished_spans()
    assert span.name == "/spa.v1.JobService/GetJob"
    assert format(span.context.trace_id, "032x") == "0af7651916cd43dd8448eb211c80319c"
    assert span.attributes["error.type"] == "KeyError"


def test_a_taken_port_is_said(server: Running, tmp_path: Path) -> None:
    other = Running(tmp_path)
    with pytest.raises(AssertionError, match="is the port taken"):
        other.start(port=server.port)


@pytest.mark.slow
def test_many_requests_at_once_are_told_to_come_again(tmp_path: Path, model: Path) -> None:
    from spa_server._generated import jobs_pb2, jobs_pb2_grpc

    server = Running(tmp_path, limits={"requests": 3}, workers={"count": 0}).start()
    with server.client() as client, grpc.insecure_channel(server.address) as channel:
        job = client.submit(InspectSpec(client.push_model(model).name))
        stub = jobs_pb2_grpc.JobServiceStub(channel)
        watchers = [stub.WatchJob(jobs_pb2.WatchJobRequest(name=job.name)) for _ in range(3)]
        for watcher in watchers:
            next(watcher)
        with pytest.raises(spa.SpaError, match="come again"):
            client.account()
        watchers[0].cancel()
        _soon(client)
    server.stop()


def _soon(client: Client) -> None:
    import time

    for _ in range(100):
        try:
            client.account()
            return
        except spa.SpaError:
            time.sleep(0.05)
    raise AssertionError("a request that ended still counts")
