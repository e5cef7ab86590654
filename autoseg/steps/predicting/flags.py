"""Which predictions a person should look at: networks are unusually unsure there."""

import csv
import io
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from autoseg.cases.predicted import Predicted
from autoseg.errors import UserError
from autoseg.events import Report, Warned
from autoseg.layout import flagged_file, prediction_record
from autoseg.store import load, write_text

FEW_CASES = 5
"""With fewer cases nothing is flagged: there is no telling what is usual."""
FLAGGED_DEVIATIONS = 3.0


@contextmanager
def flagging(output: Path, report: Report) -> Iterator[None]:
    """`flag` what is predicted in the block, also where a case fails: others are done."""
    try:
        yield
    finally:
        flag(output, report)


def flag(output: Path, report: Report) -> None:
    """Write flagged.csv: every case with a record, the most uncertain first; what cannot be read is left out."""
    records = []
    files = sorted(prediction_record(output, "*").parent.glob("*.json"))
    for path in (each for each in files if not each.name.startswith(".")):
        try:
            records.append(load(path, Predicted))
        except UserError as error:
            report(Warned(f"{error.what} {path.stem} is not in {flagged_file(output).name}."))
    numbers = sorted(((r.uncertainty, r.case) for r in records if r.uncertainty is not None), reverse=True)
    limit = flag_limit([number for number, _ in numbers])
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("case", "uncertainty", "flagged"))
    writer.writerows((case, f"{number:.4f}", "yes" if number > limit else "no") for number, case in numbers)
    write_text(flagged_file(output), table.getvalue())
    if unusual := [case for number, case in numbers if number > limit]:
        report(Warned(f"Look at {', '.join(unusual)}: the networks are unusually unsure there."))


def flag_limit(numbers: Sequence[float]) -> float:
    """What lies above is unusual: the median and three (scaled) median deviations; nothing in few cases."""
    if len(numbers) < FEW_CASES:
        return float("inf")
    middle = statistics.median(numbers)
    spread = 1.4826 * statistics.median(abs(number - middle) for number in numbers)
    return middle + FLAGGED_DEVIATIONS * spread
