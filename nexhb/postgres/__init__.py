"""PostgreSQL: connections and sessions, errors, statements, migrations, and the embedded server."""
