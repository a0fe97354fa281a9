"""Alembic's environment, shared by every store: it migrates on the connection that it is given, inside its transaction.

`Database.start` has begun that transaction with the write lock, so that two processes that start together do not each make the
tables, and a kill in the middle does not leave half of them.
"""

from alembic import context

context.configure(connection=context.config.attributes["connection"], target_metadata=None)
with context.begin_transaction():
    context.run_migrations()
