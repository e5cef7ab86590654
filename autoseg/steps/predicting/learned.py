"""Which learned post-processing belongs to what is being predicted."""

import shlex
from pathlib import Path

from autoseg.events import Report, Warned
from autoseg.layout import Layout
from autoseg.records import Postprocessing
from autoseg.store import load


def rules_learned_on(run: Path, name: str, report: Report) -> Postprocessing | None:
    """The rules of a run where they were learned on `name`, a configuration or a pair such as "2d+3d"; else None.

    Other networks make other mistakes: rules that were learned on another's are left out, which is announced.
    """
    path = Layout(run).postprocessing
    if not path.is_file():
        return None
    learned = load(path, Postprocessing)
    if learned.learned_on == name:
        return learned
    if learned.rules:
        command = f"{shlex.join(['autoseg', 'postprocess', str(run)])} -i OUT -o CLEANED"
        told = f"Post-processing was learned on {learned.learned_on}, so {name} goes without"
        report(Warned(f"{told}: {command} applies it all the same."))
    return None
