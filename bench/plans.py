"""Make the reference plans in plans/ anew: `python bench/plans.py`; the diff of the JSON files is the review.

With `--fingerprints` the fingerprints are made anew as well: of three data sets from their images in ../shared/data
(those that are absent keep their file), of the ten Medical Segmentation Decathlon tasks from published figures. A plan
is simulated for a CUDA card of each size, so no GPU is needed; `--only NAME` limits the work to one data set.
`--recorded` simulates nothing: for a rule that changed words or fields but asks for no new reading.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

from autoseg.cases.discover import discover
from autoseg.cases.inspect import fingerprint_of, inspect
from autoseg.image.formats import read_labels
from autoseg.network.memory import budget_for, measurer
from autoseg.parallel import allowed_cores
from autoseg.planning.plan import make_plan
from autoseg.planning.search import once, recorded
from autoseg.records import CaseStats, Fingerprint, Label, Plan
from autoseg.store import load, save

PLANS = Path(__file__).parent.parent / "plans"
IMAGES = Path(__file__).parent.parent.parent / "shared" / "data"
MEMORIES = ("8GB", "11GB", "24GB", "80GB")
MOST_CASES = 64
"""A task of large images is represented by this many: from here on the number of cases limits no batch."""
SMALL_VOXELS = 4_000_000
"""Tasks of smaller images keep all their cases: a batch may hold only 5 % of the data set."""

SOURCE = (
    "Not computed from images. Number of cases, minimum, median and maximum of spacing and size, and median volume "
    "per class are those published for the Medical Segmentation Decathlon (Antonelli et al., Nat. Commun. 13, 2022) "
    "on the pages MSD_*.md and LiTS.md of github.com/openmedlab/Awesome-Medical-Dataset; cases are interpolated "
    "between the three, thick slices with few of them. Intensities and components are unknown."
)


@dataclass(frozen=True)
class Task:
    """Published figures of one task: spacing and size (X Y Z; minimum, median, maximum), cm3 per class."""

    name: str
    cases: int
    channels: tuple[str, ...]
    classes: dict[str, float]
    spacing_mm: tuple[tuple[float, float, float], ...]
    size_voxels: tuple[tuple[int, int, int], ...]
    uncropped_size_voxels: tuple[int, int, int] | None = None
    note: str = ""


def main() -> None:
    """Parse the options and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fingerprints", action="store_true", help="make the fingerprints anew, too")
    parser.add_argument("--only", help="name of one folder in plans/")
    parser.add_argument("--recorded", action="store_true", help="use the readings of the plans that are there")
    options = parser.parse_args()
    there = {file.parent.name for file in PLANS.glob("*/*.json")}
    names = sorted({task.name for task in TASKS} | {*FROM_IMAGES} | there)
    if options.only not in (None, *names):
        parser.error(f"--only: there is no {options.only}, but {', '.join(names)}")
    if options.fingerprints:
        write_fingerprints(options.only)
    for file in sorted(PLANS.glob(f"{options.only or '*'}/fingerprint.json")):
        write_plans(file, options.recorded)


def write_plans(fingerprint_file: Path, from_recorded: bool) -> None:
    """One plan per memory beside the fingerprint; a step read for one memory is not read again for the next."""
    fingerprint = load(fingerprint_file, Fingerprint)
    measure, source = measurer(budget_for(MEMORIES[0]))
    measure = once(measure)
    for memory in MEMORIES:
        start = time.monotonic()
        file = fingerprint_file.with_name(f"plan-{memory}.json")
        reading = recorded(load(file, Plan)) if from_recorded else measure
        plan = make_plan(fingerprint, budget_for(memory), reading, source=source)
        save(file, plan)
        found = ", ".join(f"{c.name} {'x'.join(map(str, c.patch_voxels))} b{c.batch_size}" for c in plan.configurations)
        print(f"{fingerprint_file.parent.name} {memory}: {found} ({time.monotonic() - start:.1f} s)", flush=True)


def write_fingerprints(only: str | None) -> None:
    """All fingerprints, or the one named."""
    for task in TASKS:
        if only in (None, task.name):
            save(PLANS / task.name / "fingerprint.json", fingerprint_of_task(task))
    for name, source in FROM_IMAGES.items():
        if only in (None, name) and (IMAGES / name).is_dir():
            save(PLANS / name / "fingerprint.json", fingerprint_of_images(name, source))


def fingerprint_of_images(name: str, source: str) -> Fingerprint:
    """The fingerprint of a data set, from its images."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = described_ct(Path(scratch)) if name == "ct" else IMAGES / name
        dataset, stats = inspect(discover(folder), Path(scratch) / "stats", allowed_cores())
        return fingerprint_of(dataset.model_copy(update={"name": name}), stats, source)


def described_ct(folder: Path) -> Path:
    """The CT as a data set of one case: a dataset.json that points to its two files."""
    image, organs = IMAGES / "ct" / "ct.nii.gz", IMAGES / "ct" / "ct_organs.nii.gz"
    values = sorted({int(value) for value in set(read_labels(organs)[0].ravel().tolist())} - {0})
    (folder / "imagesTr").mkdir()
    (folder / "labelsTr").mkdir()
    (folder / "imagesTr" / "ct.nii.gz").symlink_to(image.resolve())
    (folder / "labelsTr" / "ct.nii.gz").symlink_to(organs.resolve())
    labels = {"0": "background"} | {str(value): f"organ_{value}" for value in values}
    training = [{"image": "./imagesTr/ct.nii.gz", "label": "./labelsTr/ct.nii.gz"}]
    description = {"name": "ct", "modality": {"0": "CT"}, "labels": labels, "training": training}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def fingerprint_of_task(task: Task) -> Fingerprint:
    """A fingerprint interpolated from published figures; `source` says so."""
    count = task.cases if prod(task.size_voxels[1]) < SMALL_VOXELS else min(task.cases, MOST_CASES)
    note = f" {count} cases stand for {task.cases}." if count < task.cases else ""
    labels = (Label(name="background", value=0), *(Label(name=n, value=k) for k, n in enumerate(task.classes, 1)))
    return Fingerprint(
        dataset=task.name,
        dimension=3,
        channels=task.channels,
        labels=labels,
        cases=tuple(case_of_task(task, index, count) for index in range(count)),
        intensities=(),
        source=SOURCE + note + task.note,
    )


def case_of_task(task: Task, index: int, count: int) -> CaseStats:
    """Case `index` of `count`: sizes rise from minimum over median to maximum while the slices' spacing falls."""
    share = index / (count - 1)
    spacing = [quantile([each[axis] for each in task.spacing_mm], 1 - share) for axis in (2, 1, 0)]
    z, y, x = (round(quantile([each[axis] for each in task.size_voxels], share)) for axis in (2, 1, 0))
    full = tuple(reversed(task.uncropped_size_voxels)) if task.uncropped_size_voxels else (z, y, x)
    voxel_mm3 = spacing[0] * spacing[1] * spacing[2]
    foreground = [round(1000 * volume / voxel_mm3) for volume in task.classes.values()]
    class_voxels = (max(0, z * y * x - sum(foreground)), *foreground)
    return CaseStats(
        id=f"{task.name}_{index:03d}",
        content="",
        shape_voxels=(z, y, x),
        full_shape_voxels=(full[0], full[1], full[2]),
        spacing_mm=(round(spacing[0], 4), round(spacing[1], 4), round(spacing[2], 4)),
        crop_share=z * y * x / (full[0] * full[1] * full[2]),
        class_voxels=class_voxels,
        class_mm3=tuple(round(n * voxel_mm3, 1) for n in class_voxels),
        class_components=(),
        class_median_component_voxels=(),
        intensities=(),
    )


def quantile(three: list[float], share: float) -> float:
    """Straight lines from minimum over median to maximum."""
    low, middle, high = three
    return low + (middle - low) * 2 * share if share < 0.5 else middle + (high - middle) * (2 * share - 1)


FROM_IMAGES = {
    "hippocampus": "200 cases of Medical Segmentation Decathlon Task04, computed from the images (CC-BY-SA 4.0).",
    "drive": "The 20 training photographs of DRIVE, computed from the images (CC-BY 4.0).",
    "ct": "One CT with 62 organs from TotalSegmentator's test files, computed from the image (Apache-2.0).",
}

BRAIN_NOTE = " The size after cropping to the brain is nnU-Net's (Isensee et al., arXiv 1809.10486, table 1)."

TASKS = (
    Task("msd-01-brain", 484, ("FLAIR", "T1w", "t1gd", "T2w"),
         {"edema": 11.7, "non-enhancing tumor": 15.35, "enhancing tumour": 54.19},
         ((1.0, 1.0, 1.0),) * 3, ((138, 169, 138),) * 3, (240, 240, 155), BRAIN_NOTE),
    Task("msd-02-heart", 20, ("MRI",), {"left atrium": 98.0},
         ((1.25, 1.25, 1.37),) * 3, ((320, 320, 90), (320, 320, 115), (320, 320, 130))),
    Task("msd-03-liver", 131, ("CT",), {"liver": 1586.49, "cancer": 16.11},
         ((0.5566, 0.5566, 0.7), (0.7676, 0.7676, 1.0), (1.0, 1.0, 5.0)),
         ((512, 512, 74), (512, 512, 432), (512, 512, 987)), None, " Volumes of this task are means."),
    Task("msd-04-hippocampus", 260, ("MRI",), {"Anterior": 1.72, "Posterior": 1.58},
         ((1.0, 1.0, 1.0),) * 3, ((31, 40, 24), (35, 50, 36), (43, 59, 47))),
    Task("msd-05-prostate", 32, ("T2", "ADC"), {"PZ": 15.0, "TZ": 48.0},
         ((0.6, 0.6, 3.0), (0.63, 0.63, 3.6), (0.75, 0.75, 4.0)),
         ((256, 256, 11), (320, 320, 20), (384, 384, 24))),
    Task("msd-06-lung", 63, ("CT",), {"cancer": 5.0},
         ((0.6, 0.6, 0.63), (0.79, 0.79, 1.2), (0.98, 0.98, 2.5)),
         ((512, 512, 112), (512, 512, 252), (512, 512, 636))),
    Task("msd-07-pancreas", 281, ("CT",), {"pancreas": 77.0, "cancer": 6.0},
         ((0.61, 0.61, 0.7), (0.8, 0.8, 2.5), (0.98, 0.98, 7.5)),
         ((512, 512, 37), (512, 512, 93), (512, 512, 751))),
    Task("msd-08-hepatic-vessel", 303, ("CT",), {"Vessel": 37.0, "Tumour": 32.0},
         ((0.57, 0.57, 0.8), (0.8, 0.8, 5.0), (0.97, 0.97, 8.0)),
         ((512, 512, 24), (512, 512, 49), (512, 512, 181))),
    Task("msd-09-spleen", 41, ("CT",), {"spleen": 210.0},
         ((0.61, 0.61, 1.5), (0.79, 0.79, 5.0), (0.98, 0.98, 8.0)),
         ((512, 512, 31), (512, 512, 90), (512, 512, 168))),
    Task("msd-10-colon", 126, ("CT",), {"colon cancer primaries": 22.0},
         ((0.54, 0.54, 1.3), (0.78, 0.78, 5.0), (0.98, 0.98, 7.5)),
         ((512, 512, 37), (512, 512, 95), (512, 512, 729))),
)  # fmt: skip
"""Cases are those of the training sets; sizes and spacings of the table are X Y Z as published."""


if __name__ == "__main__":
    main()
