"""The requests of devices: heartbeats, queues of heartbeats, enrolment."""
