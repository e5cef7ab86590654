"""`Predictor`: the trained networks of a run, loaded once for many images.

Images are files, arrays or those of SimpleITK.
Axes: C channel, K class, Z Y X voxels.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autoseg.cases.exchange import (
    PERMILLE,
    Ending,
    Found,
    Ready,
    finished,
    on_file_grid,
    refuse_not_finite,
    without_image,
)
from autoseg.cases.prepare import Prepared, prepare, restore, restore_probabilities
from autoseg.errors import UserError
from autoseg.events import Report, Said, silent
from autoseg.image.crop import crop
from autoseg.image.formats import read_image
from autoseg.image.labels import to_indices
from autoseg.image.resample import operators, resample_labels
from autoseg.image.volume import Volume
from autoseg.lanes import named_error
from autoseg.layout import Layout
from autoseg.network import accumulators
from autoseg.network.device import Device, pick, set_up
from autoseg.network.export import Matrices, Slab, Wanted, new_shape, slab_height, slabs
from autoseg.network.less_memory import sums_bytes, tilings, until_it_fits
from autoseg.network.sliding import OVERLAP, Progress, Scorer, Tiling, score_blocks
from autoseg.records import Configuration, Plan, Rule
from autoseg.steps.plan import checked
from autoseg.steps.predicting.images import Image, as_volume, called
from autoseg.steps.predicting.learned import rules_learned_on
from autoseg.steps.predicting.models import (
    as_trained,
    configuration_named,
    fold_and_seed,
    hash_of,
    load_network,
    trained_configuration,
    trained_models,
)

WORTH_A_LINE = 2**28


@dataclass(frozen=True)
class Speed:
    """What is given up for time, as `speeds.py` measures it; the precision is the device's own in all of them."""

    mirroring: bool
    overlap: float


SPEEDS = {
    "accurate": Speed(mirroring=True, overlap=OVERLAP),
    "balanced": Speed(mirroring=False, overlap=OVERLAP),
    "fast": Speed(mirroring=False, overlap=0.25),
}


@dataclass(frozen=True)
class Segmentation:
    """What is known of one image, on the grid of its file.

    Args:
        labels_ZYX: int32, the values of the user's files.
        probabilities_KZYX: float16, or None where not asked for.
        entropy_ZYX: how undecided the networks are, as a share of the largest possible entropy (0..1), or None.
        mutual_ZYX: how far the members of an ensemble differ, on the same scale; None for one network.
        uncertainty: one number for quality control, see `uncertainty_of`; or None.
    """

    labels_ZYX: np.ndarray
    probabilities_KZYX: np.ndarray | None = None
    entropy_ZYX: np.ndarray | None = None
    mutual_ZYX: np.ndarray | None = None
    uncertainty: float | None = None


class Predictor:
    """The trained networks of a run, loaded once. Threads may share one: images are computed one after the other.

    Args:
        run: run folder.
        configuration, folds, seeds, device, mirroring, postprocess, speed: as for `predict`.
        report: told where the sums of the sliding window live, and of rules learned on another configuration.

    Raises:
        UserError: nothing is trained, or a fold or seed is not, or there is no such speed.
    """

    _mirror_axes: tuple[int, ...]
    _speed: Speed
    _report: Report

    def __init__(
        self,
        run: Path | str,
        *,
        configuration: str | None = None,
        folds: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        device: str | None = None,
        mirroring: bool = True,
        postprocess: bool = True,
        speed: str = "accurate",
        report: Report = silent,
    ) -> None:
        if speed not in SPEEDS:
            raise UserError(f"There is no speed {speed!r}.", fix=f"Choose one of: {', '.join(SPEEDS)}.")
        layout, plan = Layout(Path(run)), checked(Path(run))
        name = configuration or trained_configuration(layout, plan)
        planned = configuration_named(plan, name)
        models = trained_models(layout, name, folds, seeds)
        chosen = as_trained(planned, models, plan)
        target = pick(device)
        set_up(target)
        networks = [load_network(model, target) for model in models]
        learned = rules_learned_on(layout.root, name, report) if postprocess else None
        rules: tuple[Rule, ...] = learned.rules if learned else ()
        previous = None
        if chosen.previous is not None:
            previous = Predictor(
                run, configuration=chosen.previous, folds=folds, device=device, mirroring=mirroring,
                postprocess=False, speed=speed, report=report,
            )  # fmt: skip
        mirror_axes = chosen.train.augment.mirror_axes if mirroring and SPEEDS[speed].mirroring else ()
        options: dict[str, object] = {
            "speed": speed, "mirror_axes": mirror_axes, "rules": [rule.model_dump(mode="json") for rule in rules],
            "previous": previous.content if previous else "", "configuration": name,
        }  # fmt: skip
        members = tuple(model.root.name for model in models)
        self._set(plan, chosen, target, networks, members, previous, rules, hash_of(models, plan, options))
        self._mirror_axes, self._speed, self._report = mirror_axes, SPEEDS[speed], report

    @classmethod
    def of_network(
        cls, run: Path, configuration: Configuration, network: nn.Module | Sequence[nn.Module], name: str,
        device: Device,
    ) -> "Predictor":  # fmt: skip
        """A predictor around one network or several in memory, as validation needs it; no post-processing."""
        networks = [network] if isinstance(network, nn.Module) else network
        previous = None
        if configuration.previous is not None:
            fold, _ = fold_and_seed(name)
            previous = cls(
                run, configuration=configuration.previous, folds=[fold], device=device.name, postprocess=False
            )
        predictor = cls.__new__(cls)
        predictor._set(checked(run), configuration, device, [each.eval() for each in networks], (name,), previous)
        return predictor

    def _set(
        self, plan: Plan, configuration: Configuration, device: Device, networks: Sequence[nn.Module],
        members: tuple[str, ...], previous: "Predictor | None", rules: tuple[Rule, ...] = (), content: str = "",
    ) -> None:  # fmt: skip
        self.plan, self.configuration, self.device = plan, configuration, device
        self.members, self.previous = members, previous
        self.rules, self.content = rules, content
        self._networks = networks
        self._mirror_axes = configuration.train.augment.mirror_axes
        self._speed, self._report = SPEEDS["accurate"], silent
        self._said = ""
        self._one_at_a_time = threading.Lock()

    @property
    def stages(self) -> tuple[Configuration, ...]:
        """Configurations that an image is prepared for, first stage first."""
        return (*(self.previous.stages if self.previous else ()), self.configuration)

    def __call__(
        self,
        image: Image,
        spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
        *,
        probabilities: bool = False,
        uncertainty: bool = False,
    ) -> Any:
        """Segment one image: an array (C, Z, Y, X) or (Z, Y, X), a SimpleITK image, a file, or one file per channel.

        Args:
            spacing_mm: voxel size Z Y X of an array; other images know theirs.

        Returns the label map (Z, Y, X) with the values of the training files; with `probabilities` or `uncertainty` a
        `Segmentation` that holds it.
        """
        found = self.segment(as_volume(image, spacing_mm), probabilities, called(image), uncertainty)
        return found if probabilities or uncertainty else found.labels_ZYX

    def predict(self, paths: Sequence[Path | str]) -> np.ndarray:
        """Segment the image in `paths` (one file per channel); returns its label map (Z, Y, X)."""
        return self.segment(read_image([Path(path) for path in paths]), case=called(paths)).labels_ZYX

    def segment(
        self, volume: Volume, with_probabilities: bool = False, case: str = "the image", uncertainty: bool = False
    ) -> Segmentation:
        """Segment one image that has been read; see `Segmentation`.

        Raises UserError that names the `case` where it does not fit the plan or holds NaN, or the scores do.
        """
        try:
            return self._segment(volume, with_probabilities, case, uncertainty)
        except UserError as error:
            raise named_error(error, "segmenting", case) from error

    def _segment(self, volume: Volume, with_probabilities: bool, case: str, uncertainty: bool) -> Segmentation:
        refuse_not_finite(volume, case)
        ready = Ready(tuple(prepare(volume, None, self.plan, each, case) for each in self.stages), ())
        collected: dict[int, np.ndarray] = {}

        def keep(slab: Slab) -> None:
            if slab.probabilities_KZYX is not None:
                collected[slab.window.start] = slab.probabilities_KZYX.numpy().astype(np.float16)

        found = self.compute(ready, keep if with_probabilities else None, uncertainty)
        prepared, axes = ready.stages[-1], self.configuration.axes
        ending = Ending(self.plan, self.configuration, self.rules, Path())
        shares = None
        if with_probabilities:
            regions = bool(self.plan.regions)
            shares = restore_probabilities(np.concatenate(list(collected.values()), 1), prepared, axes, regions)
        images = [
            None if each is None else on_file_grid(each, prepared, axes).astype(np.float32) / PERMILLE
            for each in (found.entropy_ZYX, found.mutual_ZYX)
        ]
        return Segmentation(
            finished(found.indices_ZYX, prepared, ending), shares, images[0], images[1], found.uncertainty
        )

    def compute(
        self, ready: Ready, put: Callable[[Slab], None] | None = None, uncertainty: bool = False,
        progress: Progress | None = None, first_height: int = 0,
    ) -> Found:  # fmt: skip
        """What the networks say of a prepared case; `put` gets every slab of probabilities on the cropped grid.

        Where a GPU runs out of memory it begins anew with less, and `put` gets the same slabs again.
        """
        prepared = ready.stages[-1]
        image_CZYX = prepared.image_CZYX
        if self.previous is not None:
            earlier = self.previous.compute(replace(ready, stages=ready.stages[:-1]), progress=progress)
            plan, stage = self.plan, self.previous.configuration
            before = without_image(ready.stages[-2])
            values_ZYX = restore(earlier.indices_ZYX, before, plan.labels, plan.ignore_value, stage.axes)
            previous_ZYX = on_grid(values_ZYX, prepared, plan, self.configuration)
            image_CZYX = np.concatenate((image_CZYX, one_hot(previous_ZYX, plan.classes)))
        wanted = self.wanted(put is not None, uncertainty)
        matrices = to_cropped_grid(prepared, self.configuration)
        image, size = torch.from_numpy(image_CZYX), prepared.image_CZYX.shape[1:]
        scorer = self.scorer(wanted)

        def attempt(tiling: Tiling) -> Found:
            blocks = score_blocks(scorer, image, tiling, progress)
            return _gathered(slabs(blocks, size, matrices, wanted, first_height), prepared, ready, put)

        with self._one_at_a_time:
            tried = self.tilings(sums_bytes(self._tiling, scorer.channels, size), scorer.channels)
            return until_it_fits(tried, attempt, self.device, self._report)

    def slab_height(self, prepared: Prepared, uncertainty: bool = False) -> int:
        """Slices of the cropped grid that `compute` passes to `put` at a time."""
        matrices, wanted = to_cropped_grid(prepared, self.configuration), self.wanted(True, uncertainty)
        return slab_height(
            new_shape(prepared.image_CZYX.shape[1:], matrices), self.scorer(wanted).channels, wanted
        )

    def wanted(self, probabilities: bool, uncertainty: bool) -> Wanted:
        """What is to be made of the scores of these networks."""
        several = len(self._networks) > 1
        index = {label.value: k for k, label in enumerate(self.plan.labels)}
        paints = tuple(index[region.paint] for region in self.plan.regions)
        kind = "sigmoid" if paints else "softmax"
        return Wanted(not several, probabilities, uncertainty, uncertainty and several, kind, paints)

    def scorer(self, wanted: Wanted) -> Scorer:
        """What the sliding window sums up."""
        outputs = len(self.plan.outputs)
        return Scorer(self._networks, outputs, self.device, mutual=wanted.mutual, activation=wanted.activation)

    def tilings(self, needed_bytes: int, channels: int) -> tuple[Tiling, ...]:
        """How an image whose sums need so many bytes is computed, and then with less memory (see `less_memory`).

        Where the sums live is said in one line.
        """
        room = accumulators.room_of(self.device)
        features = self.configuration.network.features[0]
        found = tilings(self._tiling, needed_bytes, features, channels, self.device, room)
        if needed_bytes >= WORTH_A_LINE and found[0].place != self._said:
            self._report(Said(accumulators.described(found[0].place, needed_bytes, self.device)))
            self._said = found[0].place
        return found

    @property
    def _tiling(self) -> Tiling:
        return Tiling(self.configuration.patch_voxels, self._mirror_axes, self._speed.overlap)

    @property
    def report(self) -> Report:
        """Who is told where sums live, and of memory that runs out."""
        return self._report

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """Patch axes that prediction mirrors along; none where the networks did not learn with mirroring."""
        return self._mirror_axes

    def alone(self) -> threading.Lock:
        """To be held while the networks compute: images of several threads take turns, so that memory is bounded."""
        return self._one_at_a_time


def _gathered(
    made: Iterator[Slab], prepared: Prepared, ready: Ready, put: Callable[[Slab], None] | None
) -> Found:
    """The slabs of a case as whole arrays; probabilities only pass through."""
    labels: list[np.ndarray] = []
    entropy: list[np.ndarray] = []
    mutual: list[np.ndarray] = []
    for slab in made:
        if put is not None:
            put(slab)
        labels.append(slab.labels_ZYX.numpy())
        for values, images in ((slab.entropy_ZYX, entropy), (slab.mutual_ZYX, mutual)):
            if values is not None:
                images.append(np.rint(values.numpy() * PERMILLE).astype(np.uint16))
    indices_ZYX = labels[0] if len(labels) == 1 else np.concatenate(labels)
    entropy_ZYX, mutual_ZYX = (np.concatenate(each) if each else None for each in (entropy, mutual))
    doubt_ZYX = mutual_ZYX if mutual_ZYX is not None else entropy_ZYX
    number = None if doubt_ZYX is None else uncertainty_of(doubt_ZYX, indices_ZYX)
    return Found(indices_ZYX, without_image(prepared), ready.inputs, entropy_ZYX, mutual_ZYX, number)


def uncertainty_of(doubt_ZYX: np.ndarray, indices_ZYX: np.ndarray) -> float:
    """One number for a case: mean doubt (0..1) where something was found, or anywhere if nothing was."""
    found_ZYX = indices_ZYX > 0
    return float((doubt_ZYX[found_ZYX] if found_ZYX.any() else doubt_ZYX).mean()) / PERMILLE


def to_cropped_grid(prepared: Prepared, configuration: Configuration) -> Matrices:
    """The operators from the network's grid to the cropped region of the file, None per axis where sizes agree."""
    old = prepared.image_CZYX.shape[1:]
    spacing = [
        own if target is None else target
        for own, target in zip(prepared.spacing_mm, configuration.spacing_mm, strict=True)
    ]
    how, back_mm = configuration.resampling, prepared.spacing_mm
    found = operators(old, prepared.cropped_shape, spacing, back_mm, 1, how.anisotropy)
    # cached matrices are read-only, which torch warns of; they are small
    z, y, x = (None if matrix is None else torch.from_numpy(matrix.copy()) for matrix in found)
    return z, y, x


def on_grid(values_ZYX: np.ndarray, prepared: Prepared, plan: Plan, configuration: Configuration) -> np.ndarray:
    """Label indices (int16) of a label map of the file, on the grid of a prepared image."""
    cropped = crop(values_ZYX.transpose(configuration.axes), prepared.box)
    indices_ZYX = to_indices(cropped, plan.labels, plan.ignore_value, "the previous stage")
    new_shape, how = prepared.image_CZYX.shape[1:], configuration.resampling
    return resample_labels(
        indices_ZYX, prepared.spacing_mm, configuration.spacing_mm, new_shape, 1, how.anisotropy
    )


def one_hot(indices_ZYX: np.ndarray, classes: int) -> np.ndarray:
    """One float32 channel per foreground class: (K - 1, Z, Y, X)."""
    return np.stack([indices_ZYX == k for k in range(1, classes)]).astype(np.float32)
