"""`autoseg demo`: a small synthetic data set, and the whole pipeline on it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from autoseg import store
from autoseg.errors import UserError
from autoseg.events import Report, Said, silent
from autoseg.layout import Layout, prediction_file
from autoseg.records import Scores

LABELS = ("background", "large", "small")
FOLDS = ("0", "1")
HELD_OUT = 4


def demo(folder: Path, *, max_seconds: float = 50.0, report: Report = silent) -> tuple[Scores, Path]:
    """Make data, train two networks, ensemble them on held-out images, and score that.

    Returns the scores of the held-out images and the path of a picture of one of them.

    Args:
        folder: for all files; what is there already from an earlier demo is used again.
        max_seconds: for each of the two trainings.
        report: receives progress.
    """
    from autoseg.steps.ensemble import ensemble
    from autoseg.steps.evaluate import evaluate
    from autoseg.steps.plan import plan
    from autoseg.steps.postprocess import postprocess_apply, postprocess_learn
    from autoseg.steps.predict import predict
    from autoseg.steps.preprocess import preprocess
    from autoseg.steps.run import is_trained
    from autoseg.steps.train import train

    data, run, results = folder / "data", folder / "run", folder / "results"
    if not (data / "dataset.json").is_file():
        write_dataset(data, cases=20, shape=(16, 32, 32), held_out=HELD_OUT)
    plan(data, run, memory="2GB", report=report)
    preprocess(run, configuration="3d", report=report)
    for fold in FOLDS:
        if not is_trained(Layout(run), "3d", fold):
            train(run, configuration="3d", fold=fold, max_seconds=max_seconds, resume="auto", report=report)
    postprocess_learn(run, report=report)
    predictions = [folder / f"predicted_by_fold_{fold}" for fold in FOLDS]
    for fold, output in zip(FOLDS, predictions, strict=True):
        predict(
            run, data / "imagesTs", output, configuration="3d", folds=(fold,), save_probabilities=True,
            postprocess=False, report=report,
        )  # fmt: skip
    ensemble(predictions, folder / "ensemble", report=report)
    postprocess_apply(run, folder / "ensemble", results, report=report)
    scores = evaluate(results, data / "labelsTs", report=report)
    picture = folder / "picture.png"
    draw(picture, data, results, scores.cases[0].id)
    report(Said(f"Scored {len(scores.cases)} images that no network has seen."))
    return scores, picture


# ------------------------------------------------------------------------------------------------ the data


def write_dataset(
    folder: Path,
    cases: int = 8,
    shape: Sequence[int] = (24, 32, 28),
    dimension: Literal[2, 3] = 3,
    layout: Literal["decathlon", "nnunet", "plain"] = "decathlon",
    seed: int = 0,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    channels: int = 1,
    label_values: tuple[int, int] = (1, 2),
    held_out: int = 0,
) -> Path:
    """Write noisy images of a large bright and a small dark blob, with their label maps, and return `folder`.

    Args:
        shape: voxels, Z Y X (the last two where `dimension` is 2).
        layout: Medical Segmentation Decathlon, nnU-Net v2 raw, or plain images/ + labels/ without a dataset.json.
        spacing_mm: Z Y X.
        label_values: values of the large and the small blob in the files.
        held_out: so many further cases go to imagesTs/ and labelsTs/, not named in dataset.json.
    """
    if cases < 1 or len(shape) < dimension:
        raise UserError(f"{cases} cases of shape {tuple(shape)}: at least one case with {dimension} axes is needed.")
    ending = ".png" if dimension == 2 else ".nii.gz"
    images, labels = ("images", "labels") if layout == "plain" else ("imagesTr", "labelsTr")
    for name in (images, labels, *(("imagesTs", "labelsTs") if held_out else ())):
        store.make_folder(folder / name)
    names = [f"case_{number:02d}" for number in range(cases + held_out)]
    for number, name in enumerate(names):
        rng = np.random.default_rng([seed, number])
        image_CZYX, labels_ZYX = draw_case(rng, tuple(shape)[-dimension:], channels)
        into = (images, labels) if number < cases else ("imagesTs", "labelsTs")
        values_ZYX = np.array((0, *label_values), np.uint8)[labels_ZYX]
        _write_image(folder / into[0], name, ending, image_CZYX, spacing_mm, separate=layout == "nnunet")
        _write(prediction_file(folder / into[1], name, ending), values_ZYX, spacing_mm)
    if layout != "plain":
        described = DESCRIPTIONS[layout](names[:cases], ending, channels, label_values)
        store.write_text(folder / "dataset.json", json.dumps(described, indent=1) + "\n")
    return folder


def draw_case(rng: np.random.Generator, shape: tuple[int, ...], channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (C, *shape) float32 and its label indices (*shape) uint8: 0 background, 1 large, 2 small."""
    centre = np.array(shape) * rng.uniform(0.38, 0.62, len(shape))
    radii = np.array(shape) * rng.uniform(0.2, 0.3, len(shape))
    towards = rng.normal(size=len(shape))
    large = _ellipsoid(shape, centre, radii)
    small = _ellipsoid(shape, centre + 0.7 * radii * towards / np.linalg.norm(towards), 0.6 * radii)
    labels = large.astype(np.uint8)
    labels[small] = 2
    clean = np.array([0.0, 2.0, -2.0])[labels]
    brightness = rng.uniform(20.0, 200.0)
    images = []
    for _ in range(channels):
        texture = gaussian_filter(rng.normal(size=shape), 3.0)
        noisy = gaussian_filter(clean, 0.7) + 0.6 * rng.normal(size=shape) + 0.7 * texture / texture.std()
        images.append(brightness * (noisy + 6.0))
    return np.stack(images).astype(np.float32), labels


def _ellipsoid(shape: tuple[int, ...], centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    places = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    return (((places - centre) / radii) ** 2).sum(axis=-1) < 1


def _write_image(
    folder: Path, name: str, ending: str, image_CZYX: np.ndarray, spacing_mm: Sequence[float], separate: bool
) -> None:
    if separate or len(image_CZYX) > 1:
        for channel, array in enumerate(image_CZYX):
            _write(folder / f"{name}_{channel:04d}{ending}", array, spacing_mm)
    else:
        _write(folder / f"{name}{ending}", image_CZYX[0], spacing_mm)


def _write(path: Path, array: np.ndarray, spacing_mm: Sequence[float]) -> None:
    if path.name.endswith(".png"):
        if array.dtype != np.uint8:
            array = (array * (250.0 / array.max())).clip(0, 255).astype(np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
        return
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in reversed(tuple(spacing_mm)[-array.ndim :])])
    image.SetOrigin([12.5, -30.25, 7.0][: array.ndim])
    sitk.WriteImage(image, str(path), useCompression=True)


def _decathlon(names: Sequence[str], ending: str, channels: int, label_values: tuple[int, int]) -> dict:
    return {
        "name": "blobs",
        "modality": {str(c): f"modality {c}" for c in range(channels)},
        "labels": {str(value): name for name, value in zip(LABELS, (0, *label_values), strict=True)},
        "training": [{"image": f"./imagesTr/{n}{ending}", "label": f"./labelsTr/{n}{ending}"} for n in names],
        "test": [],
    }


def _nnunet(names: Sequence[str], ending: str, channels: int, label_values: tuple[int, int]) -> dict:
    return {
        "channel_names": {str(c): f"modality {c}" for c in range(channels)},
        "labels": dict(zip(LABELS, (0, *label_values), strict=True)),
        "numTraining": len(names),
        "file_ending": ending,
    }


# ------------------------------------------------------------------------------------------------ the picture


def draw(picture: Path, data: Path, predictions: Path, case: str) -> None:
    """Draw the middle slice of `case`: the image, the image with the reference, and with the prediction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    image_ZYX = sitk.GetArrayFromImage(sitk.ReadImage(str(data / "imagesTs" / f"{case}.nii.gz")))
    reference_ZYX = sitk.GetArrayFromImage(sitk.ReadImage(str(prediction_file(data / "labelsTs", case, ".nii.gz"))))
    predicted_ZYX = sitk.GetArrayFromImage(sitk.ReadImage(str(prediction_file(predictions, case, ".nii.gz"))))
    z = int(np.argmax((reference_ZYX == 2).sum(axis=(1, 2))))
    figure = Figure(figsize=(9.0, 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {"image": None, "reference": reference_ZYX, "prediction": predicted_ZYX}
    for axes, (title, labels_ZYX) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axes.imshow(image_ZYX[z], cmap="gray", interpolation="nearest")
        if labels_ZYX is not None:
            shown = np.ma.masked_equal(labels_ZYX[z], 0)
            axes.imshow(shown, cmap="cool", vmin=1, vmax=2, alpha=0.45, interpolation="nearest")
        axes.set_title(title)
        axes.set_axis_off()
    with store.replacing(picture, suffix=".png") as temporary:
        figure.savefig(temporary, dpi=120)


DESCRIPTIONS = {"decathlon": _decathlon, "nnunet": _nnunet}
