"""The `autoseg` command, also as `python -m autoseg`."""

import sys


def main() -> None:
    """Hand over to the commands; Ctrl-C while they are still being imported ends quietly, too."""
    try:
        from autoseg.cli import main as commands

        commands()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
