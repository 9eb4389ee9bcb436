"""A last status of a million devices: `run` asks it over HTTP and grows it, `found` judges and shows it."""
