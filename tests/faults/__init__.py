"""The fault machine: simulated devices that behave as the agent does, faults of everything between the devices and the
disk, and a check at the end. The seed determines the faults. The check requires: no acknowledged heartbeat is lost,
stored twice or changed, and no row exists that was not sent. `python -m tests.faults --seeds 1-100` runs it."""
