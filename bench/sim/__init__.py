"""A simulated fleet whose faults are known, and a comparison of what nexhb records and sends with these faults."""
