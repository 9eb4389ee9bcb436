"""Kill the daemon, the database and the receiver while messages about incidents are delivered: `python -m
tests.faults.messages --seed 1 --kills 200`."""
