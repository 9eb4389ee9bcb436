"""The time-lapse: months of a fleet's life in minutes, through the real code, with everything going wrong on the way.

Simulated devices send to the real writer on a real PostgreSQL, the jobs run every simulated hour and night with the
clock passed in, and a seeded deck of faults is dealt to the nights. At the end every heartbeat that was acknowledged is
looked for, in the partitions and in the archives. `python -m tests.timelapse --seed 1` runs it.
"""
