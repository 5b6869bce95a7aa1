"""The tables. Times are seconds since 1970, UTC."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("label", String(200), nullable=False),
    Column("scopes", String(200), nullable=False),  # separated by spaces
    Column("digest", String(64), nullable=False),  # sha256 of the secret
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
)
"""Who may call."""

blobs = Table(
    "blobs",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("stored", Boolean, nullable=False),  # false while the bytes are on their way to the store
    Column("touched", Float, nullable=False),
)
"""Contents of files, each once. One that nothing refers to is removed some time after it was touched."""

holdings = Table(
    "holdings",
    metadata,
    Column("owner", String(128), primary_key=True),
    Column("sha256", String(64), ForeignKey("blobs.sha256"), primary_key=True),
    Column("touched", Float, nullable=False),
    Index(None, "sha256"),
)
"""Who has sent or made which contents: knowing a digest is not having the bytes."""

collections = Table(
    "collections",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("kind", String(16), nullable=False),  # models, datasets
    Column("owner", String(128), nullable=False),
    Column("display_name", String(200), nullable=False),
    Column("digest", String(64), nullable=False),  # of names and contents: the same again is the same collection
    Column("created", Float, nullable=False),
    UniqueConstraint("owner", "kind", "digest"),
    Index(None, "owner", "kind", "created"),
)
"""Models and datasets."""

files = Table(
    "files",
    metadata,
    Column("parent", String(64), primary_key=True),  # models/{id}, datasets/{id}, jobs/{id}
    Column("place", Integer, primary_key=True),
    Column("path", String(500), nullable=False),
    Column("sha256", String(64), ForeignKey("blobs.sha256"), nullable=False),
    Column("owner", String(128), nullable=False),
    UniqueConstraint("parent", "path"),
    Index(None, "owner", "sha256"),
    Index(None, "sha256"),
)
"""Files of models, datasets and jobs."""

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("request_id", String(128)),
    Column("spec", JSON, nullable=False),
    Column("state", String(16), nullable=False),  # queued, running, succeeded, failed, cancelled
    Column("code", String(32)),
    Column("message", Text),
    Column("created", Float, nullable=False),
    Column("started", Float),
    Column("ended", Float),
    Column("attempt", Integer, nullable=False),
    Column("cancel", Boolean, nullable=False),  # somebody asked for it to stop
    Column("holder", String(64)),  # the server that runs it, and in which attempt
    Column("lease", Float),  # until when it does without another sign of life
    Column("sequence", Integer, nullable=False),  # of the last event
    UniqueConstraint("owner", "request_id"),
    Index(None, "owner", "created"),
    Index(None, "state", "created"),
)
"""Jobs."""

needs = Table(
    "needs",
    metadata,
    Column("job", String(32), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("parent", String(64), primary_key=True),
    Index(None, "parent"),
)
"""Models, datasets and jobs that a job reads."""

events = Table(
    "events",
    metadata,
    Column("job", String(32), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("sequence", Integer, primary_key=True),
    Column("time", Float, nullable=False),
    Column("body", JSON, nullable=False),
)
"""What happened to jobs."""
