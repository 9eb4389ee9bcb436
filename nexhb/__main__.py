"""`python -m nexhb` is `nexhb`."""

from nexhb.cli import main

if __name__ == "__main__":
    main()
