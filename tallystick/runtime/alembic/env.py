"""Alembic's environment for all databases: it migrates on the given connection, inside that connection's transaction.

`Database.start` begins the transaction with the write lock. So two processes that start together do not both create the tables,
and a process that is killed leaves no half-made schema.
"""

from alembic import context

context.configure(connection=context.config.attributes["connection"], target_metadata=None)
with context.begin_transaction():
    context.run_migrations()
