"""The time-lapse: it simulates months of a fleet in minutes, with nexhb's own code and all kinds of faults.

Simulated devices send to the real writer on a real PostgreSQL. The jobs run every simulated hour and night, and
receive the simulated time. The seed determines which faults affect which night. At the end, the partitions and the
archives must contain every heartbeat that was acknowledged. `python -m tests.timelapse --seed 1` runs it.
"""
