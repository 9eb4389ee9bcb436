"""nexhb beside floors and peers: `contest` runs it, `found` judges it, `page` and `bars` show it."""
