"""The `autoseg` command, also as `python -m autoseg`."""

import signal
import sys

from autoseg.errors import STOPPED


def main() -> None:
    """Hand over to the commands; Ctrl-C while they are still being imported, or once they have ended, says nothing."""
    try:
        from autoseg.cli import main as commands

        commands()
    except (KeyboardInterrupt, SystemExit) as ending:
        if isinstance(ending, SystemExit) and ending.code != STOPPED:
            raise
        # pressed once more it would cut short what Python clears up at its end, with a traceback
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
