"""The devices: their tokens, their registration, and what recently went wrong with them."""
