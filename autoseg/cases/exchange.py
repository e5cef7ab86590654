"""What goes into the network and comes out of it for one case, without the network.

Worker processes do both while the network computes another case: files are read and prepared, label maps finished and
written. Nothing here imports torch. Axes: K class, Z Y X voxels.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoseg.cases.predicted import InputFile, Predicted
from autoseg.cases.prepare import Prepared, prepare, restore
from autoseg.errors import UserError
from autoseg.image.companions import files_of, hash_into
from autoseg.image.crop import insert
from autoseg.image.formats import READABLE, TIFF, ending_of, read_image, stem_of, write_labels
from autoseg.image.labels import some
from autoseg.image.rules import apply_rules
from autoseg.image.slides import is_slide
from autoseg.image.volume import Geometry, Volume
from autoseg.layout import (
    all_probabilities_files,
    entropy_file,
    mutual_file,
    prediction_file,
    prediction_record,
    probabilities_file,
)
from autoseg.records import Case, Configuration, Plan, Rule
from autoseg.store import load, make_folder, remove_unfinished, save

ELSEWHERE = "Write the label maps to another folder."
UncertaintyFile = Callable[[Path, str, str], Path]
"""`layout.entropy_file` or `layout.mutual_file`."""
PERMILLE = 1000
"""Uncertainty images hold whole numbers, 1000 for the largest possible entropy."""


@dataclass(frozen=True)
class Ready:
    """A case prepared for every stage of a cascade, the last one is the one asked for; and what its files are.

    A 2D image too large for memory has no stages: it is read while it is computed.
    """

    stages: tuple[Prepared, ...]
    inputs: tuple[InputFile, ...]


@dataclass(frozen=True)
class Found:
    """What the network says of a case, on its cropped grid.

    Args:
        indices_ZYX: int16 label indices.
        prepared: the case without its image; None for a slide, whose label map is written already.
        inputs: its files.
        entropy_ZYX, mutual_ZYX: uint16 in `PERMILLE`, or None.
        uncertainty: one number for the case, or None.
    """

    indices_ZYX: np.ndarray
    prepared: Prepared | None
    inputs: tuple[InputFile, ...]
    entropy_ZYX: np.ndarray | None = None
    mutual_ZYX: np.ndarray | None = None
    uncertainty: float | None = None


@dataclass(frozen=True)
class Ending:
    """How results are finished and where they go; `model` is the hash kept in the records, "" for no records."""

    plan: Plan
    configuration: Configuration
    rules: tuple[Rule, ...]
    output: Path
    model: str = ""


def read_case(plan: Plan, configurations: Sequence[Configuration], case: Case, _: object = None) -> Ready:
    """Read a case and prepare it for each configuration. Raises UserError that names the case or its file."""
    inputs = tuple(input_file(Path(path)) for path in case.images)
    if is_slide(case.images):
        return Ready((), inputs)
    volume = read_image([Path(path) for path in case.images])
    _refuse_other_dimension(volume.geometry, plan.dimension, case)
    refuse_not_finite(volume, case.id)
    return Ready(tuple(prepare(volume, None, plan, each, case.id) for each in configurations), inputs)


def write_case(ending: Ending, case: Case, found: Found) -> Path:
    """Finish the labels of a case and write them, on the grid of its file; the record comes last."""
    prepared, axes, planned = found.prepared, ending.configuration.axes, ending.plan.file_ending
    if prepared is None:
        written = slide_file(ending.output, case.id, planned)
    else:
        written = prediction_file(ending.output, case.id, planned)
        if ending.model:
            begin_record(ending.output, case.id)
        write_labels(written, finished(found.indices_ZYX, prepared, ending), prepared.geometry)
    for values_ZYX, name in ((found.entropy_ZYX, entropy_file), (found.mutual_ZYX, mutual_file)):
        if values_ZYX is not None and prepared is not None:
            path = name(ending.output, case.id, _uncertainty_ending(planned))
            write_labels(path, on_file_grid(values_ZYX, prepared, axes), prepared.geometry)
    if ending.model:
        keep_record(ending.output, case.id, ending.model, found.inputs, written, found.uncertainty)
    return written


def _uncertainty_ending(planned: str) -> str:
    """That of images of uncertainty, beside label maps with this one: values in BMP files end at 255."""
    return ".png" if planned == ".bmp" else planned


def slide_file(folder: Path, case: str, planned: str) -> Path:
    """Label map of a slide, which is a TIFF file whatever ending is planned."""
    return prediction_file(folder, case, planned if planned in TIFF else ".tif")


# ------------------------------------------------------------------------------------------------ what is done


def begin_record(output: Path, case: str) -> None:
    """Write down that the label map of a case is about to be written: that of a killed process is autoseg's, too."""
    save(prediction_record(output, case), Predicted(case=case, inputs=(), model="", written=""), durable=False)


def keep_record(
    output: Path, case: str, model: str, inputs: tuple[InputFile, ...], written: Path,
    uncertainty: float | None = None,
) -> None:  # fmt: skip
    """Write down what the label map `written` was made from; `forget` it before another one takes its place."""
    record = Predicted(
        case=case, inputs=inputs, model=model, written=written.name, result=input_file(written),
        uncertainty=uncertainty,
    )  # fmt: skip
    save(prediction_record(output, case), record, durable=False)


def forget(output: Path, case: str) -> None:
    """Remove what lies beside the label map of a case that is about to be written anew.

    Probabilities and images of uncertainty that are not written again would be taken for those of the new label map.
    The record goes on saying that the old one is autoseg's, but not of which network.
    """
    if (known := _recorded(output, case)) is not None:
        kept = known.model_copy(update={"model": "", "uncertainty": None})
        save(prediction_record(output, case), kept, durable=False)
    for path in all_probabilities_files(output, case):
        path.unlink(missing_ok=True)
    for ending in READABLE:
        for name in (entropy_file, mutual_file):
            name(output, case, ending).unlink(missing_ok=True)


def done_before(
    case: Case, output: Path, model: str, probabilities: bool, beside: Sequence[UncertaintyFile] = ()
) -> Path | None:
    """The label map of a case that lies there as it would be made now, from the same files; None otherwise.

    Probabilities, and the images of uncertainty that `beside` names, have to lie there, too; slides have neither.
    """
    record = _recorded(output, case.id)
    if record is None:
        return None
    written = output / record.written
    known = len(record.inputs) == len(case.images) and record.model == model and written.is_file()
    if not known or not (record.result is None or is_unchanged(written, record.result)):
        return None
    if not all(is_unchanged(Path(name), known) for name, known in zip(case.images, record.inputs, strict=True)):
        return None
    wanted = [probabilities_file(output, case.id)] if probabilities else []
    wanted += [file(output, case.id, _uncertainty_ending(ending_of(written))) for file in beside]
    return written if all(path.is_file() for path in wanted) or is_slide(case.images) else None


def _recorded(output: Path, case: str) -> Predicted | None:
    """The record of a case, an empty one where it cannot be read; None where there is none."""
    path = prediction_record(output, case)
    try:
        return load(path, Predicted) if path.is_file() else None
    except UserError:
        return Predicted(case=case, inputs=(), model="", written="")


def finished(indices_ZYX: np.ndarray, prepared: Prepared, ending: Ending) -> np.ndarray:
    """Rules applied, brought back to the file: (Z, Y, X) with the values of the user's files."""
    plan = ending.plan
    if ending.rules:
        indices_ZYX = apply_rules(indices_ZYX, ending.rules, plan.labels, prepared.spacing_mm)
    return restore(indices_ZYX, prepared, plan.labels, plan.ignore_value, ending.configuration.axes)


def on_file_grid(values_ZYX: np.ndarray, prepared: Prepared, axes: tuple[int, int, int]) -> np.ndarray:
    """Numbers on the cropped grid as numbers on the file's, 0 around them."""
    size = prepared.geometry.size_voxels
    whole_ZYX = insert(values_ZYX, prepared.box, tuple(size[axis] for axis in axes), 0)
    return np.ascontiguousarray(whole_ZYX.transpose(np.argsort(axes)))


def _refuse_other_dimension(geometry: Geometry, planned: int, case: Case) -> None:
    slices = geometry.size_voxels[0]
    if planned == 3 and geometry.dimension == 2:
        raise UserError(f"{case.id}: a 2D image, but the plan was made for 3D.", fix="Leave this case out.")
    if planned == 2 and slices > 1:
        raise UserError(f"{case.id}: {slices} slices, but the plan was made for 2D.", fix="Save each slice by itself.")


def refuse_not_finite(volume: Volume, case: str) -> None:
    """Raise UserError where a voxel is NaN or infinite: normalizing would spread it over the whole image."""
    for number, channel_ZYX in enumerate(volume.array_CZYX):
        if not (np.isfinite(channel_ZYX.min()) and np.isfinite(channel_ZYX.max())):  # min and max pass NaN on
            count = int(np.count_nonzero(~np.isfinite(channel_ZYX)))
            raise UserError(
                f"{case}: channel {number} has {count} voxel(s) that are NaN or infinite.",
                fix="Give them a value, such as that of the air around.",
            )


def refuse_folder_of_images(images: Path, output: Path, what: str = "images") -> None:
    """Raise UserError where label maps would lie among the images: they would replace them, or be taken for some."""
    folder = images.parent if images.is_file() else images
    if output.resolve() == folder.resolve():
        raise UserError(f"{output}: the {what} lie there.", fix=ELSEWHERE)


def refuse_loss(output: Path, targets: Iterable[Path], originals: Iterable[Path | str]) -> None:
    """Raise UserError where writing `targets` into `output` would replace what autoseg has not written.

    Args:
        targets: label maps to be written; one that is there, without a record or not as its record says, is somebody
            else's, or was corrected by hand.
        originals: files of which none may lie in `output`, also where links lead there.
    """
    folder = output.resolve()
    for path in (Path(each).resolve() for each in originals):
        if path.parent == folder and path.exists():
            raise UserError(f"{output}: {path.name} lies there, an image or label map of the data.", fix=ELSEWHERE)
    there = sorted({path.name for path in targets if path.exists() and not _is_own(output, path)})
    if there:
        raise UserError(
            f"{output}: {some(there)} would be replaced, which autoseg has not written, or somebody has changed since.",
            fix=f"Move {'it' if len(there) == 1 else 'them'} away, or choose another folder.",
        )


def _is_own(output: Path, path: Path) -> bool:
    """Whether a label map is what autoseg wrote; also where a process was killed, or an earlier version did not say."""
    record = _recorded(output, stem_of(path))
    return record is not None and (record.result is None or is_unchanged(path, record.result))


def files_of_cases(cases: Iterable[Case]) -> Iterator[str]:
    """The images and reference label maps of cases."""
    for case in cases:
        yield from case.images
        if case.label is not None:
            yield case.label


def begin_output(output: Path) -> None:
    """Make a folder for label maps with one for their records; what killed processes left half-written in it goes."""
    make_folder(prediction_record(output, "").parent)
    below = (prediction_record(output, "x"), entropy_file(output, "x", ""), mutual_file(output, "x", ""))
    for folder in (output, *(file.parent for file in below)):
        remove_unfinished(folder)


def without_image(prepared: Prepared) -> Prepared:
    """The same without voxels: what bringing results back to the file needs."""
    empty = np.zeros((len(prepared.image_CZYX), 0, 0, 0), np.float32)
    return Prepared(empty, None, prepared.box, prepared.cropped_shape, prepared.spacing_mm, prepared.geometry)


def input_file(path: Path) -> InputFile:
    """Size, time and content of a file. Raises UserError when it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        hash_into(digest, path)
        size, time_ns = _size_and_time(path)
    except OSError as error:
        raise UserError(f"{path}: this file cannot be read ({error.strerror}).", fix="Is the disk there?") from error
    return InputFile(name=path.name, size_bytes=size, time_ns=time_ns, content=digest.hexdigest())


def _size_and_time(path: Path) -> tuple[int, int]:
    """Bytes of an image's files, and when the newest of them was written."""
    found = [part.stat() for part in files_of(path)]
    return sum(each.st_size for each in found), max(each.st_mtime_ns for each in found)


def is_unchanged(path: Path, known: InputFile) -> bool:
    """Whether a file is what it was: by size and time, and where only the time differs by its content."""
    if not path.is_file() or path.name != known.name:
        return False
    size, time_ns = _size_and_time(path)
    return size == known.size_bytes and (time_ns == known.time_ns or input_file(path).content == known.content)

