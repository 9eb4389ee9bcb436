"""A day outside the database: exported, verified, brought back."""
