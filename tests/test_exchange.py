"""cases/exchange.py: images that do not fit the plan and folders that cannot be written to are refused in words."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from planned import a_configuration, a_plan

from autoseg.cases.exchange import (
    Ending,
    Found,
    read_case,
    refuse_folder_of_images,
    slide_file,
    without_image,
    write_case,
)
from autoseg.errors import UserError
from autoseg.image.formats import read_labels
from autoseg.records import Case


def an_image(path: Path, shape: tuple[int, ...]) -> Case:
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(np.prod(shape), dtype=np.int16).reshape(shape)), str(path))
    return Case(id="case_7", images=(str(path),))


def test_a_flat_image_is_no_image_for_a_3d_plan(tmp_path: Path) -> None:
    configuration = a_configuration()
    with pytest.raises(UserError, match="case_7: a 2D image, but the plan was made for 3D"):
        read_case(a_plan(configuration), (configuration,), an_image(tmp_path / "flat.nii.gz", (9, 10)))
    assert read_case(a_plan(configuration), (configuration,), an_image(tmp_path / "thin.nii.gz", (1, 9, 10))).stages


def test_a_stack_is_no_image_for_a_2d_plan(tmp_path: Path) -> None:
    configuration = a_configuration(dimension=2, name="2d", spacing_mm=(None, 1.0, 1.0))
    plan = a_plan(configuration, dimension=2)
    with pytest.raises(UserError, match="case_7: 4 slices, but the plan was made for 2D"):
        read_case(plan, (configuration,), an_image(tmp_path / "stack.nii.gz", (4, 9, 10)))
    for shape in ((1, 9, 10), (9, 10)):
        assert read_case(plan, (configuration,), an_image(tmp_path / "one.nii.gz", shape)).stages


def test_an_image_with_nan_is_refused_before_normalizing_spreads_it(tmp_path: Path) -> None:
    array_ZYX = np.ones((4, 5, 6), np.float32)
    array_ZYX[1, 2, 3], array_ZYX[0] = np.inf, np.nan
    sitk.WriteImage(sitk.GetImageFromArray(array_ZYX), str(tmp_path / "a.nii.gz"))
    configuration = a_configuration()
    with pytest.raises(UserError, match=r"case_7: channel 0 has 31 voxel\(s\) that are NaN or infinite"):
        read_case(a_plan(configuration), (configuration,), Case(id="case_7", images=(str(tmp_path / "a.nii.gz"),)))


def test_uncertainty_beside_bmp_label_maps_is_png(tmp_path: Path) -> None:
    """Thousandths do not fit into a BMP file, whose values end at 255."""
    configuration = a_configuration(dimension=2, name="2d", spacing_mm=(None, 1.0, 1.0))
    plan = a_plan(configuration, dimension=2, file_ending=".bmp")
    case = an_image(tmp_path / "case_7.nii.gz", (9, 10))
    prepared = without_image(read_case(plan, (configuration,), case).stages[0])
    shape = prepared.cropped_shape
    found = Found(np.ones(shape, np.int16), prepared, (), np.full(shape, 1000, np.uint16))
    written = write_case(Ending(plan, configuration, (), tmp_path / "out"), case, found)
    assert written == tmp_path / "out" / "case_7.bmp"
    assert read_labels(tmp_path / "out" / "entropy" / "case_7.png")[0].max() == 1000


def test_the_label_map_of_a_slide_is_called_what_it_is() -> None:
    assert slide_file(Path("out"), "a", ".png") == Path("out/a.tif")
    assert slide_file(Path("out"), "a", ".tiff") == Path("out/a.tiff")


def test_label_maps_do_not_go_among_the_images(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.nii.gz").touch()
    for given in (images, images / "a.nii.gz"):
        with pytest.raises(UserError, match="the images lie there"):
            refuse_folder_of_images(given, tmp_path / "other" / ".." / "images")
    refuse_folder_of_images(images, images / "below")
