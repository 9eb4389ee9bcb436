"""The entry point of the command `nexhb`, and of `python -m nexhb`."""

import sys

from nexhb.errors import UnsupportedLibrary


def main() -> None:
    """Run the command line. An unsupported library gives a one-sentence error, and exit code 1."""
    try:
        from nexhb import cli  # noqa: PLC0415 - the import itself may fail
    except UnsupportedLibrary as error:
        sys.exit(f"nexhb: {error}")
    cli.main()


if __name__ == "__main__":
    main()
