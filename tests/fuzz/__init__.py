"""Send millions of malformed bodies to a real daemon: it must return no 5xx, and leak no memory."""
