"""Moving over from NexMDM: its devices, its history, and the tokens of which it keeps nothing but a bcrypt hash."""
