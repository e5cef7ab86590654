"""Why a library could not write a file: the disk itself is asked.

ITK and blosc2 have one error for everything or none.
"""

import errno
import os
import shutil
import tempfile
from pathlib import Path

PROBE_BYTES = 2**20


def failed_write(path: Path, said: str) -> OSError:
    """The error of a file that could not be written, with the number that tells a full disk from the rest."""
    full = shutil.disk_usage(path.parent).free < PROBE_BYTES
    return OSError(errno.ENOSPC if full else _probed(path.parent), said, str(path))


def _probed(folder: Path) -> int:
    """The number of the error with which a little more cannot be written: what is free says nothing of quotas."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(PROBE_BYTES))  # no zeros, which some file systems do not store
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    return errno.EIO
