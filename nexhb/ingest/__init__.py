"""The path of a heartbeat from its body to its commit."""
