"""What several methods get wrong on the same cases: whether errors are theirs or lie in the data; and a picture.

Run: python bench/errors.py LABELS PREDICTIONS PREDICTIONS... [--images FOLDER --picture FILE] [--worst 4]
LABELS and every PREDICTIONS are folders of label maps with equal names; the cases are those of the first PREDICTIONS.
Printed: mean Dice of each folder and of their majority vote; the best of all per case, chosen by looking at the
reference, which none of them can know; how the methods' scores of cases correlate; where the wrong voxels of the vote
lie; and the Dice of the references against themselves after a majority filter of 3 voxels, which is what a network that
puts out smooth surfaces could reach if it knew the reference. The picture shows the slice with most wrong voxels of the
cases that the vote gets worst.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from scipy import ndimage

from autoseg.image.formats import read_image, read_labels
from autoseg.scoring.overlap import mean
from autoseg.steps.evaluate import score_case
from autoseg.steps.predicting.combine import majority

CROSS = ndimage.generate_binary_structure(3, 1)
CUBE = np.ones((3, 3, 3), bool)


@dataclass(frozen=True)
class Case:
    """Label maps (Z, Y, X) of one case: what is true, and what each method found."""

    name: str
    truth: np.ndarray
    found: tuple[np.ndarray, ...]


def smoothed(labels: np.ndarray, classes: int) -> np.ndarray:
    """The commonest label among each voxel and its 26 neighbours."""
    counted = [ndimage.convolve((labels == k).astype(np.int16), CUBE.astype(int)) for k in range(classes)]
    return np.stack(counted).argmax(0)


def mean_dice(one: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """Mean over the foreground classes."""
    maps = (each.astype(np.int16) for each in (one, truth))
    found = mean(score_case("", *maps, (1.0, 1.0, 1.0), classes, with_surface=False).values["dice"])
    return float("nan") if found is None else found


def at_border(truth: np.ndarray) -> np.ndarray:
    """Voxels with a neighbour across one of their six faces that has another label."""
    low, high = ndimage.minimum_filter(truth, footprint=CROSS), ndimage.maximum_filter(truth, footprint=CROSS)
    return low != high


def draw(axes: Axes, image: np.ndarray, truth: np.ndarray, found: np.ndarray, title: str) -> None:
    axes.imshow(image, cmap="gray")
    for labels, colour, style in ((truth, "#ffd166", "solid"), (found, "#06d6a0", "dashed")):
        for k in range(1, int(max(truth.max(), found.max())) + 1):
            if (labels == k).any():
                axes.contour(labels == k, [0.5], colors=colour, linestyles=style, linewidths=1.2)
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", type=Path)
    parser.add_argument("predictions", type=Path, nargs="+")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--worst", type=int, default=4, help="cases in the picture")
    options = parser.parse_args()
    names = sorted(file.name for file in options.predictions[0].glob("*.nii.gz"))
    if not names:
        parser.error(f"{options.predictions[0]}: no label map (.nii.gz) in it")
    cases = [
        Case(
            name.removesuffix(".nii.gz"), read_labels(options.labels / name)[0],
            tuple(read_labels(folder / name)[0] for folder in options.predictions),
        )
        for name in names
    ]  # fmt: skip
    classes = 1 + max(int(case.truth.max()) for case in cases)
    table = np.array([[mean_dice(each, case.truth, classes) for each in case.found] for case in cases])
    for folder, score in zip(options.predictions, table.mean(0), strict=True):
        print(f"{score:.4f}  {folder}")
    voted = [majority(case.found, [1.0] * len(case.found)) for case in cases]
    scores = np.array([mean_dice(each, case.truth, classes) for each, case in zip(voted, cases, strict=True)])
    print(f"{scores.mean():.4f}  majority vote of these; standard deviation over cases {scores.std(ddof=1):.4f}")
    print(f"{table.max(1).mean():.4f}  the best of them, case by case")
    if len(options.predictions) > 1:
        related = np.corrcoef(table.T)[np.triu_indices(table.shape[1], 1)]
        print(f"correlation of two methods' scores over cases: mean {related.mean():.2f}, least {related.min():.2f}")
    wrong = near = within = agreed = 0
    for each, case in zip(voted, cases, strict=True):
        error = each != case.truth
        wrong += int(error.sum())
        near += int((error & at_border(case.truth)).sum())
        within += int((error & (each > 0) & (case.truth > 0)).sum())
        agreed += int((error & np.all([found == each for found in case.found], axis=0)).sum())
    print(f"of the wrong voxels of the vote {near / wrong:.1%} lie at a border of the reference, {within / wrong:.1%}")
    print(f"take one foreground class for another, {agreed / wrong:.1%} are the same in all methods")
    own = np.mean([mean_dice(smoothed(case.truth, classes), case.truth, classes) for case in cases])
    print(f"{own:.4f}  the references against themselves, smoothed")
    if options.picture and options.images:
        worst = np.argsort(scores)[: options.worst]
        figure, rows = pyplot.subplots(1, len(worst), figsize=(3 * len(worst), 3.2), squeeze=False)
        for axes, number in zip(rows[0], worst, strict=True):
            case, found = cases[number], voted[number]
            image = read_image([options.images / f"{case.name}.nii.gz"]).array_CZYX[0]
            z = int((found != case.truth).sum((1, 2)).argmax())
            draw(axes, image[z], case.truth[z], found[z], f"{case.name}: {scores[number]:.3f}")
        figure.suptitle("reference yellow, vote of all methods green; the slice with most wrong voxels", fontsize=10)
        figure.tight_layout()
        figure.savefig(options.picture, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
