from spa_server._generated import options_pb2 as _options_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class GetAccountRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetAccountResponse(_message.Message):
    __slots__ = ("owner", "scopes", "version", "chunk_bytes", "used_bytes", "quota_bytes", "open_jobs", "quota_jobs")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    OPEN_JOBS_FIELD_NUMBER: _ClassVar[int]
    QUOTA_JOBS_FIELD_NUMBER: _ClassVar[int]
    owner: str
    scopes: _containers.RepeatedScalarFieldContainer[str]
    version: str
    chunk_bytes: int
    used_bytes: int
    quota_bytes: int
    open_jobs: int
    quota_jobs: int
    def __init__(self, owner: _Optional[str] = ..., scopes: _Optional[_Iterable[str]] = ..., version: _Optional[str] = ..., chunk_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., quota_bytes: _Optional[int] = ..., open_jobs: _Optional[int] = ..., quota_jobs: _Optional[int] = ...) -> None: ...
