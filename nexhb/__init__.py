"""nexhb ingests the heartbeats of a fleet of Android kiosks and never loses one."""

__version__ = "0.2.0"
