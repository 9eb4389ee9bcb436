"""What changed, why, and which changes belong together: states, causes, incidents."""
