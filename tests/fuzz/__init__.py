"""Malformed bodies by the million, against a real daemon: no 5xx, no leak."""
