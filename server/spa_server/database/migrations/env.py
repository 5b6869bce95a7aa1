"""Run by alembic; the connection is handed in by `spa_server.database.engine`."""

from alembic import context

from spa_server.database.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
