"""Messages about incidents: which are due, on which routes, and their delivery."""
