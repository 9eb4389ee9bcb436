"""Operators' requests: the fleet, jobs, flags, metrics, health."""
