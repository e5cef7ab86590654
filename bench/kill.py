"""Kills planning, preprocessing and training at random moments and looks at what is left when they are run again.

Run: python bench/kill.py [DATA] [--times 10] [--stages plan,preprocess,train] [--train-options "--max-time 8s"]
Per stage the command first runs undisturbed, for its seconds. Then, so many times: it starts in a fresh copy of what it
needs, the whole process group gets SIGKILL at a random moment (seeded) within those seconds, and the same command runs
again, undisturbed. It has to succeed, every file in the run folder has to open as what its name says, and no file under
construction may be left; a training has to go on with every epoch that its history held when it was killed. Training
validates on two cases only, so that the kills hit all of its phases and a run takes seconds. Prints a row per kill;
ends with exit code 1 when any of this failed.
"""

import argparse
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import blosc2
import numpy as np
import SimpleITK as sitk
from outside import add_data
from safetensors import safe_open

from autoseg.layout import Layout
from autoseg.records import Splits
from autoseg.store import TEMPORARY, load, save

STAGES = ("plan", "preprocess", "train")
PATIENCE_SECONDS = 1800.0


@dataclass(frozen=True)
class Ended:
    """How a command ended: None as code means that it was killed before."""

    code: int | None
    seconds: float
    output: str


@dataclass(frozen=True)
class Kill:
    """One kill: when, what was there at that moment, how the repetition went, and what is wrong with the result."""

    stage: str
    at_seconds: float
    files: int
    unfinished: int
    epochs: int
    again_seconds: float
    problems: tuple[str, ...]


def command(stage: str, data: Path, run: Path, options: argparse.Namespace) -> list[str]:
    """The words of `autoseg <stage>`."""
    words = {
        "plan": ["plan", str(data), "-o", str(run), *shlex.split(options.plan_options)],
        "preprocess": ["preprocess", str(run), *shlex.split(options.preprocess_options)],
        "train": ["train", str(run), *shlex.split(options.train_options)],
    }
    return [sys.executable, "-m", "autoseg", *words[stage]]


def execute(words: list[str], kill_after_seconds: float | None = None) -> Ended:
    """Run a command in a process group of its own; kill the group after so many seconds unless it ended before."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        code = None
        try:
            code = process.wait(PATIENCE_SECONDS if kill_after_seconds is None else kill_after_seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            seconds = time.monotonic() - start
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return Ended(code, seconds, output.read().decode(errors="replace"))


def leave_few_for_validation(run: Path, cases: int) -> None:
    """Shorten the validation of every fold: it is the same work case after case."""
    path = Layout(run).splits
    splits = load(path, Splits)
    folds = tuple(fold.model_copy(update={"validation": fold.validation[:cases]}) for fold in splits.folds)
    save(path, splits.model_copy(update={"folds": folds}))


def epochs_done(run: Path) -> int:
    """Epochs in the history of the run's training; it is written behind the state that `--resume` needs."""
    return sum(len(path.read_text().splitlines()) for path in run.rglob("history.jsonl"))


def lost_epochs(done: int, after: str) -> list[str]:
    """What the killed training had done and the next one, whose output is `after`, did not go on from."""
    if "trained already" in after:
        return []
    kept = re.search(r"Going on at epoch (\d+)", after)
    begun = int(kept[1]) - 1 if kept else 0
    return [f"{done} epochs were done, {begun} are left"] if begun < done else []


def problems_in(run: Path) -> list[str]:
    """Every file of a run folder that does not open, and every one that is not finished."""
    found = []
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if TEMPORARY in path.name:
            found.append(f"{name}: left unfinished")
            continue
        opens = next((each for ending, each in READERS.items() if path.name.endswith(ending)), None)
        if opens is None:
            found.append(f"{name}: nobody knows this kind of file")
            continue
        try:
            opens(path)
        except Exception as error:  # noqa: BLE001  whatever the reader raises is the finding
            found.append(f"{name}: {type(error).__name__}: {str(error)[:100]}")
    return found


def read_json(path: Path) -> None:
    json.loads(path.read_text())


def read_lines(path: Path) -> None:
    for line in path.read_text().splitlines():
        json.loads(line)


def read_table(path: Path) -> None:
    lines = path.read_text().splitlines()
    if not lines or len({line.count(",") for line in lines}) != 1:
        raise ValueError("rows of different lengths")


def read_npz(path: Path) -> None:
    with np.load(path) as file:
        for name in file.files:
            file[name]


def read_blosc(path: Path) -> None:
    blosc2.open(str(path), mode="r")[:]


def read_tensors(path: Path) -> None:
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name)


def read_itk(path: Path) -> None:
    sitk.ReadImage(str(path))


def kill_once(stage: str, template: Path, data: Path, at_seconds: float, options: argparse.Namespace) -> Kill:
    """Kill one run of a stage, run it again and look at the result."""
    run = template.with_name("killed")
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(template, run)
    words = command(stage, data, run, options)
    killed = execute(words, at_seconds)
    left = [path for path in run.rglob("*") if path.is_file()]
    done = epochs_done(run)
    again = execute(words)
    problems = problems_in(run) + (lost_epochs(done, again.output) if stage == "train" else [])
    if killed.code not in (None, 0):
        problems.append(f"ended with code {killed.code} before it was killed: {killed.output[-300:]}")
    if again.code != 0:
        problems.append(f"the second run ended with code {again.code}: {again.output[-300:]}")
    unfinished = sum(TEMPORARY in path.name for path in left)
    return Kill(stage, killed.seconds, len(left), unfinished, done, again.seconds, tuple(problems))


def kills(stage: str, template: Path, data: Path, options: argparse.Namespace) -> list[Kill]:
    """All kills of a stage; `template` then holds what an undisturbed run of it leaves."""
    undisturbed = template.with_name(f"after_{stage}")
    shutil.copytree(template, undisturbed)
    straight = execute(command(stage, data, undisturbed, options))
    if straight.code != 0:
        raise SystemExit(f"{stage} fails without being killed:\n{straight.output}")
    print(f"{stage}: {straight.seconds:.1f} s undisturbed", flush=True)
    chance = random.Random(f"{options.seed} {stage}")
    found = []
    for number in range(options.times):
        found.append(kill_once(stage, template, data, chance.uniform(0, straight.seconds), options))
        show(number + 1, found[-1])
    shutil.rmtree(template)
    undisturbed.rename(template)
    return found


def show(number: int, kill: Kill) -> None:
    what = "; ".join(kill.problems) or "ok"
    print(
        f"{kill.stage:<11} {number:>3}  killed at {kill.at_seconds:6.2f} s  {kill.files:>5} files, "
        f"{kill.unfinished} unfinished, {kill.epochs} epochs  again {kill.again_seconds:6.1f} s  {what}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data(parser)
    parser.add_argument("--times", type=int, default=10, help="kills per stage")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plan-options", default="--memory 8GB --device cpu")
    parser.add_argument("--preprocess-options", default="-c 3d")
    parser.add_argument("--train-options", default="-c 3d --max-time 8s --resume auto --device cpu")
    parser.add_argument("--validation-cases", type=int, default=2, help="per fold, so that the end comes soon")
    options = parser.parse_args()
    wanted = options.stages.split(",")
    if unknown := set(wanted) - set(STAGES):
        parser.error(f"--stages: {', '.join(sorted(unknown))} is none of {', '.join(STAGES)}")
    found = []
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        template = Path(folder) / "run"
        template.mkdir()
        for stage in STAGES[: 1 + max(STAGES.index(each) for each in wanted)]:
            if stage == "train":
                leave_few_for_validation(template, options.validation_cases)
            if stage in wanted:
                found += kills(stage, template, options.data, options)
            elif (needed := execute(command(stage, options.data, template, options))).code != 0:
                raise SystemExit(f"{stage} fails:\n{needed.output}")
    bad = sum(bool(kill.problems) for kill in found)
    print(f"{len(found)} kills, {bad} with problems")
    return 1 if bad else 0


READERS: dict[str, Callable[[Path], None]] = {
    ".json": read_json,
    ".jsonl": read_lines,
    ".csv": read_table,
    ".npz": read_npz,
    ".b2nd": read_blosc,
    ".safetensors": read_tensors,
    ".nii.gz": read_itk,
    ".png": read_itk,
}


if __name__ == "__main__":
    sys.exit(main())
