"""The command `nexhb`, and `python -m nexhb`."""

import sys

from nexhb.errors import UnsupportedLibrary


def main() -> None:
    """Run the command line; a library that nexhb does not support is one sentence, and exit code 1."""
    try:
        from nexhb import cli  # noqa: PLC0415 - importing it is what may fail
    except UnsupportedLibrary as error:
        sys.exit(f"nexhb: {error}")
    cli.main()


if __name__ == "__main__":
    main()
