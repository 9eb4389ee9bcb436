"""One file per kind of scenario, each a function: scenario in, finding out, on a daemon of its own."""
