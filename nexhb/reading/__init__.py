"""Operators' reads, from the last status or from the history, and the choice between the two sources."""
