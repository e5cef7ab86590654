"""Where every file of a run or a prediction lies; no other file joins names."""

from dataclasses import dataclass
from pathlib import Path

STUDENT = "_student_"
"""Between the configuration of the teachers and the size of the student in a student's name."""


def is_student(configuration: str) -> bool:
    """Whether `distill` made this configuration."""
    return STUDENT in configuration


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of one run folder; nothing here touches the disk."""

    root: Path

    @property
    def dataset(self) -> Path:
        return self.root / "dataset.json"

    @property
    def fingerprint(self) -> Path:
        return self.root / "fingerprint.json"

    @property
    def splits(self) -> Path:
        return self.root / "splits.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def postprocessing(self) -> Path:
        return self.root / "postprocess.json"

    @property
    def selection(self) -> Path:
        """What `predict` uses where no configuration is named."""
        return self.root / "selection.json"

    @property
    def report(self) -> Path:
        """The page that `autoseg report` writes."""
        return self.root / "report.html"

    @property
    def case_stats(self) -> Path:
        """Folder with a file per case, valid while its files are the same; an interrupted fingerprint goes on."""
        return self.root / "cache" / "fingerprint"

    def cache(self, configuration: str) -> Path:
        """Folder with one preprocessed file per case; a student sees the cases of its teachers."""
        return self.root / "cache" / configuration.partition(STUDENT)[0]

    def teachers(self, configuration: str, key: str) -> Path:
        """Folder with what an ensemble says of each case; `key` stands for its members."""
        return self.cache(configuration) / f"teachers-{key}"

    @property
    def models(self) -> Path:
        """Folder with one folder per configuration."""
        return self.root / "models"

    def configuration(self, configuration: str) -> Path:
        return self.root / "models" / configuration

    @property
    def ensembles(self) -> Path:
        """Folder with one folder per pair of configurations that was tried together on the validation cases."""
        return self.root / "ensembles"

    def cross_validation(self, name: str) -> Path:
        """Folder with the folds of a configuration, or of a pair such as "2d+3d"."""
        return self.ensembles / name if "+" in name else self.configuration(name)

    def model(self, configuration: str, fold: str, seed: int = 0) -> "ModelLayout":
        """Folder of one trained network; `fold` is "0".."4" or "all", `seed` 0 is the unnamed default."""
        name = f"fold_{fold}" if seed == 0 else f"fold_{fold}.seed_{seed}"
        return ModelLayout(self.configuration(configuration) / name)

    @property
    def studies(self) -> Path:
        """Folder with one folder per study."""
        return self.root / "studies"

    def study(self, name: str) -> "StudyLayout":
        """Folder of a study: networks that differ in what was varied."""
        return StudyLayout(self.studies / name)


@dataclass(frozen=True, slots=True)
class StudyLayout:
    """The files of one study."""

    root: Path

    @property
    def study(self) -> Path:
        return self.root / "study.json"

    @property
    def picture(self) -> Path:
        """Training curves of all settings."""
        return self.root / "study.png"

    @property
    def table(self) -> Path:
        return self.root / "study.csv"

    def setting(self, setting: str) -> Path:
        """Folder with the networks of one setting, one per seed, and their scores averaged over seeds."""
        return self.root / "".join(c if c.isalnum() or c in "=.,+-_" else "_" for c in setting)

    def model(self, setting: str, fold: str, seed: int) -> "ModelLayout":
        """Folder of one trained network, named as among the run's models."""
        name = f"fold_{fold}" if seed == 0 else f"fold_{fold}.seed_{seed}"
        return ModelLayout(self.setting(setting) / name)


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """The files of one trained network."""

    root: Path

    @property
    def weights(self) -> Path:
        """Weights at the end of training (the average, where the plan averages)."""
        return self.root / "weights.safetensors"

    @property
    def best(self) -> Path:
        return self.root / "best.safetensors"

    @property
    def resume_tensors(self) -> Path:
        """Weights, optimizer state, averages and random states of the last epoch; one file, so it cannot be torn."""
        return self.root / "resume.safetensors"

    @property
    def history(self) -> Path:
        return self.root / "history.jsonl"

    @property
    def run(self) -> Path:
        return self.root / "run.json"

    @property
    def lock(self) -> Path:
        """Held by the training that writes here; beside the folder, which a new training empties."""
        return self.root.with_name(f".{self.root.name}.lock")

    @property
    def curves(self) -> Path:
        return self.root / "curves.png"

    @property
    def tensorboard(self) -> Path:
        """Folder with the history for TensorBoard, where it was asked for."""
        return self.root / "tensorboard"

    @property
    def validation(self) -> Path:
        """Folder with the predictions of the validation cases."""
        return self.root / "validation"

    @property
    def for_next_stage(self) -> Path:
        """Folder with predictions of training cases, which the next stage of a cascade learns from."""
        return self.root / "for_next_stage"

    @property
    def scores(self) -> Path:
        return self.validation / "scores.json"

    @property
    def together(self) -> "ModelLayout":
        """Of a student: what its teachers predict as an ensemble."""
        return ModelLayout(self.root.parent / "ensemble" / self.root.name)

    @property
    def alone(self) -> "ModelLayout":
        """Of a student: the same network, trained on the labels alone."""
        return ModelLayout(self.root.parent / "alone" / self.root.name)


def prediction_file(folder: Path, case: str, ending: str) -> Path:
    """Label map of `case` in a prediction folder."""
    return folder / f"{case}{ending}"


PROBABILITIES = (".probabilities.b2nd", ".probabilities.npz")
"""Endings of files of class probabilities: the one that is written, and that of earlier versions."""


def probabilities_file(folder: Path, case: str) -> Path:
    """Class probabilities of `case` in a prediction folder (compressed, see image/probabilities.py)."""
    return folder / f"{case}{PROBABILITIES[0]}"


def all_probabilities_files(folder: Path, case: str) -> tuple[Path, ...]:
    """The same under the names of every version."""
    return tuple(folder / f"{case}{ending}" for ending in PROBABILITIES)


def entropy_file(folder: Path, case: str, ending: str) -> Path:
    """How undecided the network was at every voxel of `case`, beside its label map."""
    return folder / "entropy" / f"{case}{ending}"


def mutual_file(folder: Path, case: str, ending: str) -> Path:
    """How far the members of an ensemble differed at every voxel of `case`."""
    return folder / "mutual_information" / f"{case}{ending}"


def prediction_record(folder: Path, case: str) -> Path:
    """What the prediction of `case` was made from; by it `--resume` knows what is done."""
    return folder / "records" / f"{case}.json"


def flagged_file(folder: Path) -> Path:
    """The cases of a prediction folder by uncertainty."""
    return folder / "flagged.csv"


def teacher_file(folder: Path, case: str, key: str) -> Path:
    """What an ensemble says of `case`, which was preprocessed with this key, in the folder `Layout.teachers`."""
    return folder / f"{case}.{key[:12]}.b2nd"


def distillation_file(folder: Path) -> Path:
    """How a student learned and what it is worth, in its model folder."""
    return folder.parent / f"{folder.name}.distill.json"


def scores_file(folder: Path) -> Path:
    """Scores of a prediction folder."""
    return folder / "scores.json"


def scores_csv(folder: Path) -> Path:
    """The same scores as a table for spreadsheets."""
    return folder / "scores.csv"


def speeds_file(folder: Path) -> Path:
    """What each speed of prediction takes and costs, in the folder `Layout.cross_validation`."""
    return folder / "speeds.json"


def case_stats_file(folder: Path, case: str) -> Path:
    """What the fingerprint knows of `case`, in the folder `Layout.case_stats`."""
    return folder / f"{case}.json"


@dataclass(frozen=True, slots=True)
class CachedFiles:
    """The files of one preprocessed case in the folder `Layout.cache(configuration)`; `mark` is written last."""

    folder: Path
    case: str

    @property
    def image(self) -> Path:
        return self.folder / f"{self.case}.image.b2nd"

    @property
    def labels(self) -> Path:
        return self.folder / f"{self.case}.labels.b2nd"

    @property
    def locations(self) -> Path:
        return self.folder / f"{self.case}.locations.npz"

    @property
    def mark(self) -> Path:
        return self.folder / f"{self.case}.json"


def comparison_file(folder: Path) -> Path:
    """What a comparison of several sets of scores found."""
    return folder / "comparison.json"


def comparison_picture(folder: Path) -> Path:
    """Its differences with their intervals as a picture."""
    return folder / "comparison.png"


def agreement_file(folder: Path) -> Path:
    """How well the members of an ensemble agree with each other and with it."""
    return folder / "agreement.json"
