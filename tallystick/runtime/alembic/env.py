"""Alembic's environment, shared by every store: it migrates on the connection that it is given, inside its transaction."""

from alembic import context

connection = context.config.attributes["connection"]
if connection.dialect.name == "sqlite":
    # Its driver opens no transaction for DDL: without this, two processes that start together would each make the tables,
    # and a kill in the middle would leave half of them.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
context.configure(connection=connection, target_metadata=None)
with context.begin_transaction():
    context.run_migrations()
