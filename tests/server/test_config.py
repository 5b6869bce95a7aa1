"""What a server may be told, and what it refuses before it starts."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest

import spa
from spa_server.config import Config, load, seconds, size


def written(folder: Path, text: str) -> Path:
    path = folder / "server.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_for_one_machine(tmp_path: Path) -> None:
    config = load(None, {})
    assert config.loopback
    assert not config.tokens
    assert config.database_url.startswith("sqlite:///")
    assert load(written(tmp_path, ""), {}).data == tmp_path / "spa-server"


def test_the_environment_wins(tmp_path: Path) -> None:
    path = written(tmp_path, "workers: {count: 2, memory: 1GB}\nlisten: 127.0.0.1:1")
    environment = {"SPA_SERVER_WORKERS__COUNT": "5", "SPA_SERVER_LISTEN": "localhost:2", "SPA_SERVER_CONFIG": "x"}
    config = load(path, environment)
    assert (config.workers.count, config.workers.memory, config.listen) == (5, "1GB", "localhost:2")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("workes: {}", "did you mean 'workers'"),
        ("workers: {count: many}", "workers: count must be a whole number"),
        ("workers: {count: -1}", "count must be 0 or more"),
        ("workers: {memory: lots}", "cannot read 'lots'"),
        ("listen: nowhere", "write HOST:PORT"),
        ("listen: '127.0.0.1:99999'", "write HOST:PORT"),
        ("- a\n- b", "must be a mapping"),
        ("a: [", "is not YAML"),
        ("tls: {certificate: x.pem}", "certificate and key belong together"),
        ("tls: {certificate: x.pem, key: y.pem}", "does not exist"),
        ("listen: 0.0.0.0:1", "needs TLS (tls: certificate, key)"),
        ("listen: 0.0.0.0:1\nauth: none", "TLS (tls: certificate, key) and tokens (auth) or certificates of clients"),
        ("limits: {message: 1kB}", "is too little"),
        ("auth: sometimes", "one of none, tokens"),
        ("reflection: 3", "true or false"),
        ("executor: slurm", "write process, ray, ray://local or ray://HOST:PORT"),
        ("executor: ray://somewhere", "'ray://somewhere' is none"),
        ("workers: {cpus: 0}", "not both 0"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(spa.UsageError) as caught:
        load(written(tmp_path, text), {})
    assert says in str(caught.value)
    assert "server.yaml" in str(caught.value) or "nowhere" in text or "99999" in text


def test_beyond_the_loopback_interface_it_takes_a_word(tmp_path: Path) -> None:
    config = load(written(tmp_path, "listen: 0.0.0.0:1\ninsecure: true\nauth: none"), {})
    assert not config.loopback
    assert load(written(tmp_path, "listen: '[::1]:1'"), {}).loopback
    for host in ("example.org", "10.0.0.1", "[::]"):
        assert load(written(tmp_path, f"listen: '{host}:1'\ninsecure: true"), {}).tokens


def test_sizes_and_times() -> None:
    assert [size(text) for text in ("0", "5", "1.5GB", "2 mb")] == [0, 5, 1_500_000_000, 2_000_000]
    assert [seconds(text) for text in ("0", "10s", "2m", "1.5h", "1d")] == [0, 10, 120, 5400, 86400]
    for text in ("", "-1", "1 week"):
        with pytest.raises(spa.UsageError):
            size(text)
        with pytest.raises(spa.UsageError):
            seconds(text)


def test_every_key_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        inner = hints[field.name]
        if not dataclasses.is_dataclass(inner):
            assert f"| `{field.name}` |" in text, field.name
            continue
        for name in (f.name for f in dataclasses.fields(inner)):
            assert f"`{field.name}.{name}`" in text or f"`.{name}`" in text, f"{field.name}.{name}"
