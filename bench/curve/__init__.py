"""The fleet's curve: `run` measures it, `found` judges it, `wanted` says how many daemons, `page` shows it."""
