"""Several daemons on one PostgreSQL: `run` measures, `hosts` makes hosts of network namespaces, `found` judges."""
