"""The fault machine: simulated devices that behave as the agent does, a seeded nemesis that breaks whatever lies
between them and the disk, and at the end one look at everything: nothing acknowledged is lost, nothing is there that
was not sent, nothing twice, nothing changed. `python -m tests.faults --seeds 1-100` runs it.
"""
