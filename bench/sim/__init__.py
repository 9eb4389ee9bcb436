"""A simulated fleet with a known truth: what the watcher must find, and whether it finds it."""
