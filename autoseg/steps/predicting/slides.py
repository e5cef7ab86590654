"""Segments 2D images too large for memory, band by band, from file to file.

The tiles are those of the sliding window over the whole image, so the result is the same as in memory. Axes: C channel,
K score, Y X pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from autoseg.cases.listing import read_or_none
from autoseg.cases.prepare import to_values
from autoseg.errors import UserError
from autoseg.events import Report, Warned
from autoseg.image.formats import LARGEST_LABEL
from autoseg.image.labels import some
from autoseg.image.slides import (
    BAND_ROWS,
    Box2,
    Slide,
    channels_of,
    is_slide,
    nonzero_box,
    normalizers,
    open_slide,
    write_slide,
)
from autoseg.network.accumulators import accumulator_bytes
from autoseg.network.export import Wanted, slabs
from autoseg.network.less_memory import until_it_fits
from autoseg.network.sliding import Progress, Tiling, row_blocks
from autoseg.records import Case, Configuration
from autoseg.steps.predicting.predictor import Predictor


def segment_slide(predictor: Predictor, path: Path, output: Path, progress: Progress | None = None) -> None:
    """Segment one slide and write its label map, a tiled TIFF. Learned rules are not applied: they need it whole.

    Raises UserError when the configuration cannot work band by band, or the file cannot be read.
    """
    configuration, plan = predictor.configuration, predictor.plan
    with open_slide(path) as slide:
        channels = channels_of(slide)
        _check(configuration, channels, len(plan.channels), path)
        box = nonzero_box(slide, channels)
        wanted = predictor.wanted(False, False)
        dtype = _dtype_for([label.value for label in plan.labels], output)
        empty = to_values(np.zeros((), np.int16), plan.labels, plan.ignore_value)
        size = tuple(max(edge, high - low) for edge, (low, high) in zip(configuration.patch_voxels, box, strict=True))

        def attempt(tiling: Tiling) -> None:
            rows = _label_rows(predictor, slide, box, wanted, tiling, progress)
            write_slide(output, slide, _on_whole(rows, slide, box, int(empty), dtype, predictor), dtype)

        scores = predictor.scorer(wanted).channels
        tried = predictor.tilings(accumulator_bytes(scores, size, configuration.patch_voxels), scores)
        until_it_fits(tried, attempt, predictor.device, predictor.report)


def say_what_slides_lack(cases: Sequence[Case], asked: Sequence[str], report: Report) -> None:
    """Warn in one line of the cases that are slides, which go without what is `asked` for, such as "probabilities"."""
    large = [case.id for case in cases if asked and read_or_none(is_slide, case.images)]
    if large:
        report(Warned(f"Too large to be segmented whole, and therefore without {', '.join(asked)}: {some(large)}."))


def refuse_slides(cases: Sequence[Case]) -> None:
    """Raise UserError where a case is a slide, of which there are no probabilities and one network writes the map."""
    for case in cases:
        if read_or_none(is_slide, case.images):
            raise UserError(
                f"{case.images[0]}: an image this large cannot be segmented by several configurations together.",
                fix="Predict with one: autoseg predict -c 2d; its folds and seeds are averaged all the same.",
            )


def _check(configuration: Configuration, channels: int, planned: int, path: Path) -> None:
    if configuration.dimension != 2 or configuration.previous is not None:
        raise UserError(f"{path}: only a 2d configuration can segment an image this large.", fix="Use -c 2d.")
    if channels != planned:
        raise UserError(f"{path}: {channels} channel(s), but the plan was made for {planned}.")
    if any(configuration.mask_for_normalization):
        raise UserError(f"{path}: images normalized within a mask cannot be segmented band by band.")
    if any(target not in (None, 1.0) for target in configuration.spacing_mm):
        raise UserError(
            f"{path}: the plan resamples images to {configuration.spacing_mm[-1]} mm, which needs them whole.",
            fix="Train on photographs of the slides' own resolution.",
        )


def _dtype_for(values: Sequence[int], path: Path) -> np.dtype:
    """The type of the file's pixels. Raises UserError where TIFF cannot hold the values."""
    if min(values) < 0 or max(values) > LARGEST_LABEL[".tif"]:
        raise UserError(
            f"{path}: this format holds labels 0 to {LARGEST_LABEL['.tif']}, not {min(values)} to {max(values)}.",
            fix="Give the labels other values, and plan anew.",
        )
    return np.dtype(np.uint8 if max(values) < 256 else np.uint16)


def _label_rows(
    predictor: Predictor, slide: Slide, box: Box2, wanted: Wanted, tiling: Tiling, progress: Progress | None
) -> Iterator[np.ndarray]:
    """Label indices of the box in bands (rows, X), as rows become final."""
    configuration = predictor.configuration
    (y0, y1), (x0, x1) = box
    patch = configuration.patch_voxels
    before = [max(0, edge - (high - low)) // 2 for edge, (low, high) in zip(patch, box, strict=True)]
    size = (max(patch[0], y1 - y0), max(patch[1], x1 - x0))
    scorer = predictor.scorer(wanted)
    tile_of = _reader(slide, box, before, normalizers(
        slide, box, configuration.normalization, predictor.plan.intensities
    ))  # fmt: skip
    kept = slice(before[1], before[1] + x1 - x0)
    with predictor.alone():
        for start, block_NKYX in row_blocks(scorer, tile_of, size, tiling, progress):
            rows = slice(max(before[0] - start, 0), max(before[0] + y1 - y0 - start, 0))
            scores_KZYX = block_NKYX[0, :, rows, kept].unsqueeze(1)
            if scores_KZYX.numel():
                for slab in slabs([scores_KZYX], scores_KZYX.shape[1:], (None, None, None), wanted):
                    yield slab.labels_ZYX[0].numpy()


def _reader(
    slide: Slide, box: Box2, before: list[int], scaled: list[Callable[[np.ndarray], np.ndarray]]
) -> Callable[[tuple[slice, ...]], torch.Tensor]:
    """A function that gives the normalized tile of a window; the band that tiles share is kept as in the file."""
    (y0, y1), (x0, x1) = box
    kept: dict[str, np.ndarray | int] = {"start": -1, "stop": -1}

    def band(start: int, stop: int) -> np.ndarray:
        if (kept["start"], kept["stop"]) != (start, stop):
            kept["rows"], kept["start"], kept["stop"] = slide.rows(start, stop), start, stop
        return np.asarray(kept["rows"])

    def tile_of(window: tuple[slice, ...]) -> torch.Tensor:
        tile = np.zeros((1, len(scaled), *(each.stop - each.start for each in window)), np.float32)
        top, bottom = (max(0, each - before[0]) for each in (window[0].start, window[0].stop))
        left, right = (max(0, each - before[1]) for each in (window[1].start, window[1].stop))
        bottom, right = min(bottom, y1 - y0), min(right, x1 - x0)
        rows = band(y0 + top, y0 + bottom)[: len(scaled), :, x0 + left : x0 + right]
        down, along = top + before[0] - window[0].start, left + before[1] - window[1].start
        for c, scale in enumerate(scaled):
            tile[0, c, down : down + bottom - top, along : along + right - left] = scale(rows[c].astype(np.float32))
        return torch.from_numpy(tile)

    return tile_of


def _on_whole(
    rows: Iterator[np.ndarray], slide: Slide, box: Box2, empty: int, dtype: np.dtype, predictor: Predictor
) -> Iterator[np.ndarray]:
    """Values of the label map for all rows of the slide, in bands."""
    (y0, y1), (x0, x1) = box
    plan = predictor.plan
    _, height, width = slide.shape
    yield from empty_bands(y0, width, empty, dtype)
    for indices_YX in rows:
        whole = np.full((len(indices_YX), width), empty, dtype)
        whole[:, x0:x1] = to_values(indices_YX, plan.labels, plan.ignore_value)
        yield whole
    yield from empty_bands(height - y1, width, empty, dtype)


def empty_bands(rows: int, width: int, value: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """So many rows of one value, in bands that fit into memory: a margin may be most of a slide."""
    for start in range(0, rows, BAND_ROWS):
        yield np.full((min(BAND_ROWS, rows - start), width), value, dtype)
