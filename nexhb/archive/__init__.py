"""The archive of a day: export it to a store, verify it, restore it."""
