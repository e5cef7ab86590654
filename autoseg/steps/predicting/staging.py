"""A folder of results that appear only when they are done. They are written beside it first."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autoseg import store
from autoseg.cases.exchange import begin_output, begin_record, forget, keep_record
from autoseg.image.formats import ending_of, stem_of


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder beside `output` for what is not finished; it goes at the end, with those of killed processes.

    It lies within `output` where that is another file system than the folder around it, or where this cannot be
    written. Another process may work on the same output, on other cases; its folder stays.
    """
    output = output.resolve()  # the name of "." is empty
    within = output.is_dir() and (os.path.ismount(output) or not os.access(output.parent, os.W_OK))
    place = output / output.name if within else output
    for found in place.parent.glob(f"{glob.escape(place.name)}{store.TEMPORARY}-*"):
        if not store.is_being_written(found):
            shutil.rmtree(found, ignore_errors=True)
    staging = store.temporary_beside(place)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, output: Path) -> tuple[Path, ...]:
    """Move every file from `staging` into `output`, each as a whole; returns the label maps among them.

    What lies in `output` beside a label map that is replaced goes: it belongs to the old one. Records say that the new
    ones are autoseg's.
    """
    begin_output(output)
    written, found = [], sorted(staging.iterdir())
    for path in found:
        if ending_of(path):
            forget(output, stem_of(path))
            begin_record(output, stem_of(path))
    for path in found:
        os.replace(path, output / path.name)
        written.append(output / path.name)
    maps = tuple(path for path in written if ending_of(path))
    for path in maps:
        keep_record(output, stem_of(path), "", (), path)
    return maps
