"""Everything autoseg saves, as frozen records. No behaviour beyond small derived properties.

Axes: arrays and tuples are in NumPy order Z Y X (slowest first), also for spacings. A 2D image is a volume with one
slice. Units stand in the names: `_mm`, `_voxels`, `_bytes`, `_share` (0..1).
A variant is `record.model_copy(update=...)` or an edited JSON file, never a subclass.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from autoseg.record import BelowOne, FileName, Positive, Record, Saved, Share
from autoseg.specs import AugmentSpec, NetworkSpec

Voxels3 = tuple[int, int, int]
Millimetres3 = tuple[float, float, float]
PatientAxis = Literal["head-foot", "front-back", "left-right"]
PatientAxes = tuple[PatientAxis, ...]
PatientAxes3 = tuple[PatientAxes, PatientAxes, PatientAxes]
"""For Z, Y and X of a file the axis of the patient that it runs along, or several where it lies between them."""


# ------------------------------------------------------------------------------------------------ the data


class Label(Record):
    """One class. Its index in `Dataset.labels` is its value inside autoseg, `value` the one in the user's files."""

    name: str
    value: int


class Region(Record):
    """A union of labels that is segmented as one, such as a whole tumour; regions may overlap.

    `labels` are values in the user's files; `paint` is the value that a predicted label map gets where the region is,
    over those of the regions before it.
    """

    name: str
    labels: Annotated[tuple[int, ...], Field(min_length=1)]
    paint: int


def indices_in(regions: tuple[Region, ...], labels: tuple[Label, ...]) -> tuple[tuple[int, ...], ...]:
    """Label indices of each region."""
    index = {label.value: k for k, label in enumerate(labels)}
    return tuple(tuple(index[value] for value in region.labels) for region in regions)


class Case(Record):
    """One patient image: one file per channel (or one file with all channels), and its label map if there is one.

    `annotated` names the labels (or regions) that somebody drew in it; None is all of them.
    """

    id: FileName
    images: Annotated[tuple[str, ...], Field(min_length=1)]
    label: str | None = None
    group: str | None = None
    annotated: tuple[str, ...] | None = None


class LeftOut(Record):
    """A case that `--skip-bad` went on without, and why."""

    id: str
    problem: str


class Dataset(Saved):
    """What is to be learned from: channels, labels (background first) and the cases, with absolute paths.

    `dimension` is 2 when every image has a single slice, else 3. `ignore_value` is the value in the files that marks
    voxels nobody annotated.
    """

    name: str
    dimension: Literal[2, 3]
    channels: Annotated[tuple[str, ...], Field(min_length=1)]
    labels: Annotated[tuple[Label, ...], Field(min_length=2)]
    regions: tuple[Region, ...] = ()
    ignore_value: int | None = None
    file_ending: str = ".nii.gz"
    cases: tuple[Case, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


# ------------------------------------------------------------------------------------------------ the fingerprint


class Intensities(Record):
    """Foreground intensities of one channel, in the units of the file."""

    mean: float
    std: float
    median: float
    minimum: float
    maximum: float
    percentile_00_5: float
    percentile_99_5: float


class CaseStats(Saved):
    """What one case tells the planner. Shapes and shares are those after cropping to the nonzero region.

    `class_voxels[k]` and `class_mm3[k]` count label index k, background included at 0. `class_components[k]` is its
    number of connected components and `class_median_component_voxels[k]` their median size; both are 0 for background.
    `intensity_sample[c]` holds foreground intensities of channel c at evenly spaced ranks.
    `content` is the hash of the files' bytes and of the label values it was computed with. `patient_axes` is None where
    the files do not tell how they lie in the patient: 2D files, photographs, and fingerprints before schema 2.
    """

    SCHEMA = 2

    id: str
    content: str
    shape_voxels: Voxels3
    full_shape_voxels: Voxels3
    spacing_mm: Millimetres3
    crop_share: Share
    class_voxels: tuple[int, ...]
    class_mm3: tuple[float, ...]
    class_components: tuple[int, ...]
    class_median_component_voxels: tuple[float, ...]
    intensities: tuple[Intensities, ...]
    intensity_sample: tuple[tuple[float, ...], ...] = ()
    patient_axes: PatientAxes3 | None = None


class Fingerprint(Saved):
    """All that planning needs to know of a data set; a plan can be made from this file alone."""

    SCHEMA = 2

    dataset: str
    dimension: Literal[2, 3]
    channels: tuple[str, ...]
    labels: tuple[Label, ...]
    regions: tuple[Region, ...] = ()
    ignore_value: int | None = None
    cases: Annotated[tuple[CaseStats, ...], Field(min_length=1)]
    intensities: tuple[Intensities, ...]
    source: str = ""


# ------------------------------------------------------------------------------------------------ the plan


class Budget(Record):
    """The memory to plan for. `device` is "cuda:0", "cpu" or the name of a card that is not there.

    `precision` is what the device multiplies fastest ("bf16", "fp16", "fp32"), empty where it is not known.
    """

    device: str
    total_bytes: Positive
    budget_bytes: Positive
    driver: str = ""
    torch_version: str = ""
    precision: str = ""


class Choice(Record):
    """One decision: the field it set, the value it got, and why in one sentence with numbers."""

    field: str
    value: str
    because: str


class Attempt(Record):
    """One reading of the planner: this patch and batch size need this many bytes in one training step."""

    patch_voxels: tuple[int, ...]
    batch_size: Positive
    peak_bytes: int
    fits: bool


class Memory(Record):
    """Where the planner's bytes came from (read off the device, or replayed), and every attempt."""

    source: Literal["measured", "simulated", "assumed"]
    peak_bytes: int
    attempts: tuple[Attempt, ...] = ()


class TrainSpec(Record):
    """How the network is trained. `schedule` runs over the share of the training done, in epochs or in time.

    `sampling` is the way cases and classes of patches are drawn (network/sampling.py); `class_rates` names classes with
    the rate they are drawn at, the others share what is left.
    """

    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    momentum: BelowOne = 0.99
    schedule: Literal["polynomial", "cosine", "constant"] = "polynomial"
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    epochs: Positive = 1000
    steps_per_epoch: Positive = 250
    clip_norm: Annotated[float, Field(gt=0)] = 12.0
    loss: str = "dice_ce"
    foreground_share: Share = 0.33
    sampling: Literal["foreground", "class_balanced", "case_balanced", "hard"] = "foreground"
    class_rates: tuple[tuple[str, Share], ...] = ()
    average_decay: BelowOne = 0.0
    augment: AugmentSpec


class Resampling(Record):
    """Spline orders of images and labels; an axis over `anisotropy` times thicker than the finest goes by nearest."""

    image_order: Literal[0, 1, 3] = 3
    label_order: Literal[0, 1] = 1
    anisotropy: Annotated[float, Field(ge=1)] = 3.0


class Configuration(Record):
    """One network with its grid. `axes` transposes Z Y X of the file so that the coarsest axis comes first.

    `spacing_mm` and `median_shape_voxels` are after that transposition; a 2D configuration works on slices of the
    first axis (whose spacing is then None: slices are never resampled) and its `patch_voxels` has two numbers.
    """

    name: str
    dimension: Literal[2, 3]
    axes: Voxels3 = (0, 1, 2)
    spacing_mm: tuple[float | None, float, float]
    median_shape_voxels: tuple[Positive, Positive, Positive]
    patch_voxels: tuple[int, ...]
    batch_size: Annotated[int, Field(ge=1)]
    normalization: tuple[str, ...]
    mask_for_normalization: tuple[bool, ...]
    resampling: Resampling = Resampling()
    batch_dice: bool = False
    network: NetworkSpec
    train: TrainSpec
    memory: Memory
    previous: str | None = None

    @model_validator(mode="after")
    def _patch_fits_network(self) -> "Configuration":
        divisors = self.network.divisors
        if len(self.patch_voxels) != self.dimension or self.network.dimension != self.dimension:
            raise ValueError(f"configuration {self.name}: patch_voxels and network need dimension {self.dimension}")
        wrong = [a for a, (p, d) in enumerate(zip(self.patch_voxels, divisors, strict=True)) if p % d or p < 1]
        if wrong:
            below = tuple(max(d, p // d * d) for p, d in zip(self.patch_voxels, divisors, strict=True))
            above = tuple(-(-p // d) * d for p, d in zip(self.patch_voxels, divisors, strict=True))
            raise ValueError(
                f"configuration {self.name}: patch_voxels {self.patch_voxels} cannot be divided by the strides' "
                f"product {divisors}; the nearest that work are {below} and {above}"
            )
        return self


class Plan(Saved):
    """Every decision about a data set, with its reasons; the only thing train and predict need besides the weights."""

    SCHEMA = 2

    autoseg_version: str
    dataset: str
    dimension: Literal[2, 3]
    channels: tuple[str, ...]
    labels: tuple[Label, ...]
    regions: tuple[Region, ...] = ()
    ignore_value: int | None = None
    file_ending: str
    intensities: tuple[Intensities, ...]
    preset: str = "standard"
    budget: Budget
    configurations: Annotated[tuple[Configuration, ...], Field(min_length=1)]
    choices: tuple[Choice, ...]

    @property
    def classes(self) -> int:
        """Number of classes, background included."""
        return len(self.labels)

    @property
    def outputs(self) -> tuple[Label, ...]:
        """What the network has an output for: the labels, background first; or the regions with what they paint."""
        return tuple(Label(name=each.name, value=each.paint) for each in self.regions) or self.labels

    @property
    def region_indices(self) -> tuple[tuple[int, ...], ...]:
        """Label indices of each region."""
        return indices_in(self.regions, self.labels)


# ------------------------------------------------------------------------------------------------ training and scores


class Fold(Record):
    """Ids of the cases to learn from and to validate on."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


class Splits(Saved):
    """The folds of the cross-validation; `grouped` says whether cases of one patient were kept together."""

    seed: int
    grouped: bool
    folds: tuple[Fold, ...]


class Run(Saved):
    """What a training really used, once options and plan values were put together, and how it ended.

    `planned`, `channels`, `labels`, `regions` (names) and `intensities` are the plan's, to see later whether it
    changed; `cases` those it learns from and is validated on, None where an older version did not write them down;
    `fresh` the tensors that `init` lacked; `asked_precision` is empty where the device decided; `max_seconds` is half
    of `of_seconds` where two stages of a cascade share these.
    """

    SCHEMA = 3

    autoseg_version: str
    torch_version: str
    configuration: Configuration
    planned: Configuration | None = None
    channels: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    intensities: tuple[Intensities, ...] = ()
    init: str = ""
    fresh: tuple[str, ...] = ()
    freeze: str = ""
    asked_precision: str = ""
    deterministic: bool = False
    processes: int = 1
    fold: str
    cases: Fold | None = None
    seed: int
    device: str
    precision: str
    compiled: bool
    max_seconds: float | None = None
    of_seconds: float | None = None
    seconds: float = 0.0
    steps: int = 0
    finished: bool = False
    notes: tuple[str, ...] = ()
    validation_dice: tuple[float | None, ...] = ()


class CaseScore(Record):
    """Scores of one case: `values[metric][k - 1]` of label index k (None: not defined); `content` hashes its files."""

    id: str
    values: dict[str, tuple[float | None, ...]]
    content: str = ""


class Scores(Saved):
    """Scores of predictions against references. `mean[metric][k - 1]` is over the cases where it is defined."""

    prediction: str
    reference: str
    labels: tuple[str, ...]
    policy: str
    cases: tuple[CaseScore, ...]
    mean: dict[str, tuple[float | None, ...]]
    foreground_mean: dict[str, float | None]
    tolerances_mm: tuple[float, ...] = ()


class Rule(Record):
    """One post-processing step for one label (or the joined foreground: `label` None) and what it gained in learning.

    `drop_small` sets components below `fraction` of the largest to background; `keep_largest` all but the largest;
    `drop_volume` those below `minimum_mm3`; `fill_holes` gives enclosed background to the label. Dice and the volume of
    false positives are means per case over the cases learned on; `p_value` is None where no test was asked for.
    """

    label: str | None
    action: Literal["drop_small", "keep_largest", "drop_volume", "fill_holes"]
    fraction: float = 1.0 / 3.0
    minimum_mm3: float = 0.0
    connectivity: int = 1
    dice_before: float
    dice_after: float
    false_positive_mm3_before: float = 0.0
    false_positive_mm3_after: float = 0.0
    p_value: float | None = None


class Postprocessing(Saved):
    """The rules to apply, in this order; empty when nothing helped."""

    learned_on: str
    cases: int
    rules: tuple[Rule, ...] = ()
