"""Move from NexMDM: import its devices and history, and identify tokens of which it stores only a bcrypt hash."""
