"""`autoseg predict`: label maps for images, on the grid of their files."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autoseg.cases.discover import discover_images
from autoseg.cases.prepare import Prepared, prepare, restore, restore_probabilities, to_indices
from autoseg.errors import UserError
from autoseg.events import Advanced, Finished, Report, Said, Started, silent
from autoseg.image.crop import crop
from autoseg.image.formats import read_image, write_labels, write_probabilities
from autoseg.image.resample import operators, resample_labels
from autoseg.image.rules import apply_rules
from autoseg.image.volume import Volume, plain_geometry
from autoseg.layout import Layout, ModelLayout, prediction_file, probabilities_file
from autoseg.network import checkpoint, unet
from autoseg.network.device import Device, channels_last, pick, set_up
from autoseg.network.export import Matrices, labels_of, probabilities_of
from autoseg.network.sliding import predict_logits
from autoseg.records import Case, Configuration, Plan, Postprocessing, Run
from autoseg.steps.plan import checked
from autoseg.store import load, remove_unfinished


def predict(
    run: Path,
    images: Path,
    output: Path,
    *,
    configuration: str | None = None,
    folds: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    save_probabilities: bool = False,
    postprocess: bool = True,
    mirroring: bool = True,
    device: str | None = None,
    report: Report = silent,
) -> tuple[Path, ...]:
    """Segment every image of a folder with the mean of the trained networks; returns the label maps written.

    Args:
        run: run folder with at least one trained network.
        images: folder whose files are named as the training images were.
        output: folder of the label maps; made if absent.
        configuration: None takes "3d_cascade" or "3d" or "2d", the first that is trained.
        folds, seeds: networks to average; None takes all that are trained. A cascade's first stage takes the same folds
            and all of their seeds.
        save_probabilities: also write float16 probabilities, for `ensemble`.
        postprocess: apply the learned rules, if there are any.
        mirroring: average over the mirrorings that training used.

    Raises:
        UserError: no images, no trained network, or a file that cannot be read; files written before stay.
    """
    predictor = Predictor(
        run, configuration=configuration, folds=folds, seeds=seeds, device=device, mirroring=mirroring,
        postprocess=postprocess,
    )  # fmt: skip
    cases = discover_images(images, len(predictor.plan.channels))
    report(Said(f"{predictor.configuration.name}: mean of {', '.join(predictor.members)}."))
    output.mkdir(parents=True, exist_ok=True)
    remove_unfinished(output)
    return segment_cases(predictor, cases, output, save_probabilities, report)


def segment_cases(
    predictor: "Predictor", cases: Sequence[Case], output: Path, save_probabilities: bool, report: Report
) -> tuple[Path, ...]:
    """Predict and write cases one after the other, reading the next one meanwhile."""
    written = []
    what = "predict"
    report(Started(what, of=len(cases)))
    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(read_image, [Path(p) for p in cases[0].images])] if cases else []
        for number, case in enumerate(cases):
            volume = coming.pop().result()
            if number + 1 < len(cases):
                coming.append(reader.submit(read_image, [Path(p) for p in cases[number + 1].images]))
            result = predictor.segment(volume, save_probabilities, case.id)
            path = prediction_file(output, case.id, predictor.plan.file_ending)
            if result.probabilities_KZYX is not None:
                labels = predictor.plan.labels
                write_probabilities(
                    probabilities_file(output, case.id), result.probabilities_KZYX, volume.geometry,
                    [label.name for label in labels], [label.value for label in labels],
                )  # fmt: skip
            write_labels(path, result.labels_ZYX, volume.geometry)
            written.append(path)
            report(Advanced(what, number + 1, len(cases), case.id))
    report(Finished(what))
    return tuple(written)


@dataclass(frozen=True)
class Segmentation:
    """Label map with the values of the user's files, and class probabilities (K, Z, Y, X) float16 if asked for."""

    labels_ZYX: np.ndarray
    probabilities_KZYX: np.ndarray | None


class Predictor:
    """The trained networks of a run, loaded once.

    Args:
        run: run folder.
        configuration, folds, seeds, device, mirroring, postprocess: as for `predict`.

    Raises:
        UserError: nothing is trained, or a fold or seed is not.
    """

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
    ) -> None:
        layout = Layout(Path(run))
        self.plan = checked(Path(run))
        self.device = pick(device)
        set_up(self.device)
        name = configuration or _trained_configuration(layout, self.plan)
        self.configuration = configuration_named(self.plan, name)
        models = trained_models(layout, name, folds, seeds)
        self.members = tuple(model.root.name for model in models)
        self._networks = [load_network(model, self.device) for model in models]
        self._mirror_axes = self.configuration.train.augment.mirror_axes if mirroring else ()
        has_rules = postprocess and layout.postprocessing.is_file()
        self._rules = load(layout.postprocessing, Postprocessing).rules if has_rules else ()
        self._previous: Predictor | None = None
        if self.configuration.previous is not None:
            self._previous = Predictor(
                run, configuration=self.configuration.previous, folds=folds, device=device, mirroring=mirroring,
                postprocess=False,
            )  # fmt: skip

    @classmethod
    def of_network(
        cls, run: Path, configuration: Configuration, network: nn.Module | Sequence[nn.Module], name: str,
        device: Device,
    ) -> "Predictor":  # fmt: skip
        """A predictor around one network or several in memory, as validation needs it; no post-processing."""
        networks = [network] if isinstance(network, nn.Module) else network
        predictor = cls.__new__(cls)
        predictor.plan, predictor.device, predictor.configuration = checked(run), device, configuration
        predictor.members, predictor._networks = (name,), [each.eval() for each in networks]
        predictor._mirror_axes, predictor._rules = configuration.train.augment.mirror_axes, ()
        fold, _ = _fold_and_seed(name)
        predictor._previous = None
        if configuration.previous is not None:
            predictor._previous = cls(
                run, configuration=configuration.previous, folds=[fold], device=device.name, postprocess=False
            )
        return predictor

    def __call__(self, image: np.ndarray, spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)) -> np.ndarray:
        """Segment an array: (C, Z, Y, X), or (Z, Y, X) with one channel, with its voxel size in mm.

        Returns the label map (Z, Y, X) with the values of the training files.
        """
        array_CZYX = np.asarray(image, np.float32)
        array_CZYX = array_CZYX[None] if array_CZYX.ndim == 3 else array_CZYX
        if array_CZYX.ndim != 4:
            raise UserError(f"An image needs axes (C, Z, Y, X) or (Z, Y, X), this has shape {array_CZYX.shape}.")
        z, y, x = (float(each) for each in spacing_mm)
        size = (array_CZYX.shape[1], array_CZYX.shape[2], array_CZYX.shape[3])
        return self.segment(Volume(array_CZYX, plain_geometry(size, (z, y, x)))).labels_ZYX

    def predict(self, paths: Sequence[Path | str]) -> np.ndarray:
        """Segment the image in `paths` (one file per channel); returns its label map (Z, Y, X)."""
        return self.segment(read_image([Path(path) for path in paths])).labels_ZYX

    def segment(self, volume: Volume, with_probabilities: bool = False, case: str = "the image") -> Segmentation:
        """Segment one image that has been read; see `Segmentation`."""
        prepared = prepare(volume, None, self.plan, self.configuration, case)
        image_CZYX = prepared.image_CZYX
        if self._previous is not None:
            values_ZYX = self._previous.segment(volume, case=case).labels_ZYX
            previous_ZYX = on_grid(values_ZYX, prepared, self.plan, self.configuration)
            image_CZYX = np.concatenate((image_CZYX, one_hot(previous_ZYX, self.plan.classes)))
        scores, are_logits = self._scores(torch.from_numpy(image_CZYX))
        return self._finish(scores, are_logits, prepared, with_probabilities)

    def _scores(self, image_CZYX: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Logits of the only network, or the mean probabilities of several; (K, Z, Y, X) on the network's grid."""
        classes, axes = self.plan.classes, self._mirror_axes
        return mean_scores(self._networks, image_CZYX, self.configuration, classes, self.device, axes)

    def _finish(
        self, scores: torch.Tensor, are_logits: bool, prepared: Prepared, with_probabilities: bool
    ) -> Segmentation:
        matrices = to_cropped_grid(prepared, self.configuration)
        axes, plan = self.configuration.axes, self.plan
        probabilities = None
        if with_probabilities:
            probabilities = restore_probabilities(
                probabilities_of(scores, matrices, are_logits).numpy(), prepared, axes
            )
        indices_ZYX = labels_of(scores, matrices).numpy()
        if self._rules:
            spacing = prepared.spacing_mm
            indices_ZYX = apply_rules(indices_ZYX, self._rules, plan.labels, spacing)
        return Segmentation(restore(indices_ZYX, prepared, plan.labels, plan.ignore_value, axes), probabilities)


def mean_scores(
    networks: Sequence[nn.Module],
    image_CZYX: torch.Tensor,
    configuration: Configuration,
    classes: int,
    device: Device,
    mirror_axes: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[torch.Tensor, bool]:
    """Logits of the only network, or the unweighted mean of the probabilities of several, on the network's grid.

    Returns (K, Z, Y, X) float32 on the host, and whether these are logits.
    """
    total: torch.Tensor | None = None
    for network in networks:
        logits = predict_logits(
            network, image_CZYX, configuration.patch_voxels, classes, device, mirror_axes, progress
        )
        if len(networks) == 1:
            return logits, True
        probabilities = torch.softmax(logits, 0)
        total = probabilities if total is None else total.add_(probabilities)
    if total is None:
        raise ValueError("at least one network is needed")
    return total.div_(len(networks)), False


def to_cropped_grid(prepared: Prepared, configuration: Configuration) -> Matrices:
    """The operators from the network's grid to the cropped region of the file, None per axis where sizes agree."""
    old = prepared.image_CZYX.shape[1:]
    spacing = [
        own if target is None else target
        for own, target in zip(prepared.spacing_mm, configuration.spacing_mm, strict=True)
    ]
    found = operators(old, prepared.cropped_shape, spacing, 1, configuration.resampling.anisotropy)
    # cached matrices are read-only, which torch warns of; they are small
    z, y, x = (None if matrix is None else torch.from_numpy(matrix.copy()) for matrix in found)
    return z, y, x


def on_grid(values_ZYX: np.ndarray, prepared: Prepared, plan: Plan, configuration: Configuration) -> np.ndarray:
    """Label indices (int16) of a label map of the file, on the grid of a prepared image."""
    cropped = crop(values_ZYX.transpose(configuration.axes), prepared.box)
    indices_ZYX = to_indices(cropped, plan.labels, plan.ignore_value, "the previous stage")
    new_shape = prepared.image_CZYX.shape[1:]
    return resample_labels(indices_ZYX, prepared.spacing_mm, new_shape, 1, configuration.resampling.anisotropy)


def one_hot(indices_ZYX: np.ndarray, classes: int) -> np.ndarray:
    """One float32 channel per foreground class: (K - 1, Z, Y, X)."""
    return np.stack([indices_ZYX == k for k in range(1, classes)]).astype(np.float32)


def load_network(model: ModelLayout, device: Device) -> nn.Module:
    """The trained network of a model folder, ready to predict on `device`."""
    network = unet.build(load(model.run, Run).configuration.network)
    checkpoint.load_weights(model.weights, network)
    network = network.to(device.torch_device).eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return channels_last(network, network.spec.dimension)


def trained_models(
    layout: Layout, configuration: str, folds: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> tuple[ModelLayout, ...]:
    """The finished networks of a configuration, by fold and seed.

    Raises UserError that lists what is trained, when nothing fits or a named fold or seed is missing.
    """
    found = sorted(path.parent for path in layout.configuration(configuration).glob("fold_*/weights.safetensors"))
    names = {folder.name: _fold_and_seed(folder.name) for folder in found}
    chosen = [
        folder
        for folder in found
        if (folds is None or names[folder.name][0] in folds) and (seeds is None or names[folder.name][1] in seeds)
    ]
    missing = [fold for fold in folds or () if fold not in {names[folder.name][0] for folder in chosen}]
    missing_seeds = [seed for seed in seeds or () if seed not in {names[folder.name][1] for folder in chosen}]
    if missing or missing_seeds or not chosen:
        what = ", ".join([*missing, *(f"seed {seed}" for seed in missing_seeds)]) or "any fold"
        seed = f" --seed {missing_seeds[0]}" if missing_seeds else ""
        raise UserError(
            f"{layout.root}: {configuration} is not trained for {what} "
            f"(trained: {', '.join(names) or 'nothing yet'}).",
            fix=f"Run: autoseg train {layout.root} -c {configuration} -f {[*missing, *(folds or ()), '0'][0]}{seed}",
        )
    return tuple(ModelLayout(folder) for folder in chosen)


def configuration_named(plan: Plan, name: str) -> Configuration:
    """The configuration of that name. Raises UserError that lists the valid names."""
    for configuration in plan.configurations:
        if configuration.name == name:
            return configuration
    names = ", ".join(each.name for each in plan.configurations)
    raise UserError(f"The plan has no configuration {name!r}.", fix=f"Choose one of: {names}.")


def default_configuration(plan: Plan) -> str:
    """What is trained when nothing is named: "3d" where the plan has it, else "2d"."""
    names = [each.name for each in plan.configurations]
    return "3d" if "3d" in names else names[0]


def _trained_configuration(layout: Layout, plan: Plan) -> str:
    names = [each.name for each in plan.configurations]
    preferred = ("3d_cascade", "3d", "3d_lowres", "2d")
    wanted = [name for name in preferred if name in names] + [name for name in names if name not in preferred]
    for name in wanted:
        if any(layout.configuration(name).glob("fold_*/weights.safetensors")):
            return name
    return wanted[0]


def _fold_and_seed(folder: str) -> tuple[str, int]:
    fold, _, seed = folder.removeprefix("fold_").partition(".seed_")
    return fold, int(seed or 0)
