from pathlib import Path

import numpy as np
import pytest
from whole_probabilities import read_whole, write_whole

from autoseg import store
from autoseg.errors import UserError
from autoseg.image.formats import read_labels, write_labels
from autoseg.image.probabilities import read_header
from autoseg.image.volume import Geometry, plain_geometry
from autoseg.layout import agreement_file, prediction_file, probabilities_file
from autoseg.scoring.comparison import Agreement
from autoseg.steps import ensemble as step
from autoseg.steps.ensemble import ensemble
from autoseg.steps.predicting import combine
from autoseg.steps.predicting.combine import majority, overlaps_of_maps

NAMES, VALUES = ("background", "organ", "lesion"), (0, 100, 255)
GEOMETRY = plain_geometry((4, 6, 5), (2.5, 0.7, 0.7))


def random_probabilities(seed: int) -> np.ndarray:
    logits_KZYX = np.random.default_rng(seed).normal(0, 2, (3, 4, 6, 5))
    return (np.exp(logits_KZYX) / np.exp(logits_KZYX).sum(0)).astype(np.float32)


def save(folder: Path, case: str, probabilities_KZYX: np.ndarray, geometry: Geometry = GEOMETRY, **about) -> None:
    about = {"label_names": NAMES, "label_values": VALUES} | about
    write_whole(probabilities_file(folder, case), probabilities_KZYX, geometry, **about)


def save_map(folder: Path, case: str, labels_ZYX: np.ndarray, geometry: Geometry = GEOMETRY) -> None:
    write_labels(prediction_file(folder, case, ".nii.gz"), labels_ZYX, geometry)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three members with two cases each, probabilities only."""
    members = [tmp_path / name for name in ("one", "two", "three")]
    for seed, folder in enumerate(members):
        for number, case in enumerate(("a", "b")):
            save(folder, case, random_probabilities(10 * seed + number))
    return members


def half(seed: int) -> np.ndarray:
    return random_probabilities(seed).astype(np.float16).astype(np.float32)


def test_the_ensemble_is_the_largest_mean_probability_in_the_users_values(folders, tmp_path):
    written = ensemble(folders, tmp_path / "out", save_probabilities=True)
    assert [path.name for path in written] == ["a.nii.gz", "b.nii.gz"]
    labels, geometry = read_labels(written[1])
    mean = (half(1) + half(11) + half(21)) / 3
    assert np.array_equal(labels, np.array(VALUES)[mean.argmax(0)])
    assert geometry.spacing_mm == pytest.approx(GEOMETRY.spacing_mm)
    assert geometry.origin == GEOMETRY.origin
    saved, names, _ = read_whole(probabilities_file(tmp_path / "out", "b"))
    assert names == NAMES
    assert np.allclose(saved, mean, atol=1e-3)


def test_weights_move_the_mean(folders, tmp_path):
    (folders[0] / "._a.probabilities.b2nd").touch()  # as macOS leaves on other file systems
    ensemble(folders, tmp_path / "out", weights=(0, 2, 0))
    assert np.array_equal(read_labels(tmp_path / "out" / "a.nii.gz")[0], np.array(VALUES)[half(10).argmax(0)])
    assert not list((tmp_path / "out").glob("*.probabilities.*"))
    for wrong in ((1, 2), (1, -1, 1), (0, 0, 0), (1, float("nan"), 1)):
        with pytest.raises(UserError, match="weights"):
            ensemble(folders, tmp_path / "other", weights=wrong)


@pytest.mark.parametrize("weights", [(1, 0, 0), (3, 1, 0), (3, 1, 4)])
def test_every_weight_is_that_of_its_folder(folders, tmp_path, weights):
    ensemble(folders, tmp_path / "out", weights=weights, save_probabilities=True)
    mean = sum(weight * half(seed) for weight, seed in zip(weights, (0, 10, 20), strict=True)) / sum(weights)
    found, _, _ = read_whole(probabilities_file(tmp_path / "out", "a"))
    np.testing.assert_allclose(found, mean, atol=1e-3)
    assert np.array_equal(read_labels(tmp_path / "out" / "a.nii.gz")[0], np.array(VALUES)[mean.argmax(0)])


def test_the_result_does_not_depend_on_the_slabs(folders, tmp_path, monkeypatch):
    ensemble(folders, tmp_path / "whole", save_probabilities=True)
    monkeypatch.setattr(combine, "SLAB_VALUES", 1)
    assert combine.slab_depth((3, 4, 6, 5)) == 1
    ensemble(folders, tmp_path / "slices", save_probabilities=True)
    for case in ("a", "b"):
        whole, slices = (read_labels(tmp_path / name / f"{case}.nii.gz")[0] for name in ("whole", "slices"))
        assert np.array_equal(whole, slices)
        whole, slices = (read_whole(probabilities_file(tmp_path / n, case))[0] for n in ("whole", "slices"))
        assert np.array_equal(whole, slices)
    both = [store.load(agreement_file(tmp_path / name), Agreement) for name in ("whole", "slices")]
    assert both[0] == both[1]


def test_slabs_are_as_thick_as_memory_allows_and_whole_blocks_on_disk():
    assert combine.slab_depth((62, 300, 512, 512)) == 8
    assert combine.slab_depth((3, 40, 64, 64)) == 40
    assert combine.slab_depth((500, 40, 512, 512)) == 1


def test_how_well_members_agree_is_said_per_pair_and_class_and_saved(folders, tmp_path):
    heard: list = []
    ensemble(folders, tmp_path / "out", report=heard.append)
    agreement = store.load(agreement_file(tmp_path / "out"), Agreement)
    assert agreement.labels == ("organ", "lesion")
    assert agreement.cases == 2
    assert [pair.first[-3:] for pair in agreement.pairs if pair.second == "ensemble"] == ["one", "two", "ree"]
    assert len(agreement.pairs) == 6
    one_two = agreement.pairs[0]
    expected = []
    for k in (1, 2):
        dice = []
        for number in (0, 1):
            one, two = half(number).argmax(0) == k, half(10 + number).argmax(0) == k
            dice.append(2 * (one & two).sum() / (one.sum() + two.sum()))
        expected.append(np.mean(dice))
    assert one_two.per_label == pytest.approx(expected)
    assert one_two.dice == pytest.approx(np.mean(expected))
    said = [event.text for event in heard if "agree" in getattr(event, "text", "")]
    assert len(said) == 6
    assert "(organ 0." in said[0]


def test_agreement_knows_negative_and_huge_values():
    one = np.array([[[0, -5, 1_000_000, 1_000_000]]])
    other = np.array([[[0, -5, -5, 1_000_000]]])
    found = overlaps_of_maps([one, other])
    assert found.names == ("-5", "1000000")
    assert found.voxels_MMK[0, 1].tolist() == [1, 1]
    assert combine.dice_of(found)[0, 1] == pytest.approx([2 / 3, 2 / 3])


def test_regions_are_painted_in_their_order_where_they_are_likelier_than_not(tmp_path):
    """Two regions, the second inside the first; means 0.7 and 0.4, then 0.7 and 0.6, then 0.4 and 0.4."""
    regions = {"label_names": ("whole", "core"), "label_values": (7, 9), "background": 3}
    for name, add in (("one", 0.1), ("two", -0.1)):
        probabilities = np.zeros((2, 4, 6, 5), np.float32)
        probabilities[0], probabilities[1] = 0.7 + add, 0.4 - add
        probabilities[1, 1], probabilities[0, 2] = 0.6 + add, 0.4 + add
        save(tmp_path / name, "a", probabilities, **regions)
    ensemble([tmp_path / "one", tmp_path / "two"], tmp_path / "out", save_probabilities=True)
    labels = read_labels(tmp_path / "out" / "a.nii.gz")[0]
    assert [set(np.unique(labels[z]).tolist()) for z in (0, 1, 2)] == [{7}, {9}, {3}]
    assert read_header(probabilities_file(tmp_path / "out", "a")).background == 3
    save(tmp_path / "two", "a", np.full((2, 4, 6, 5), 1.5, np.float32), **regions)
    refused([tmp_path / "one", tmp_path / "two"], tmp_path / "other", "probabilities are 0 to 1.5, not 0 to 1")


def test_label_maps_vote_and_ties_go_to_the_first_folder(tmp_path):
    maps = [np.full((4, 6, 5), value, np.int32) for value in (7, 8, 9)]
    maps[1][0], maps[2][0] = 9, 9
    for number, labels in enumerate(maps):
        save_map(tmp_path / str(number), "a", labels)
    heard: list = []
    ensemble([tmp_path / str(n) for n in range(3)], tmp_path / "out", report=heard.append)
    voted = read_labels(tmp_path / "out" / "a.nii.gz")[0]
    assert (voted[0] == 9).all()
    assert (voted[1:] == 7).all()
    assert sum("agrees with the ensemble" in getattr(event, "text", "") for event in heard) == 3
    assert (majority(maps, (0.2, 0.2, 0.6)) == 9).all()
    assert (majority([maps[0], maps[1], maps[1]], (1 / 3, 1 / 3, 1 / 3))[1:] == 8).all()


def test_one_folder_without_probabilities_makes_all_vote(folders, tmp_path):
    for folder in folders:
        for case in ("a", "b"):
            save_map(folder, case, np.full((4, 6, 5), 100))
    save_map(tmp_path / "four", "a", np.zeros((4, 6, 5)))
    save_map(tmp_path / "four", "b", np.zeros((4, 6, 5)))
    heard: list = []
    ensemble([*folders, tmp_path / "four"], tmp_path / "out", report=heard.append)
    assert (read_labels(tmp_path / "out" / "a.nii.gz")[0] == 100).all()
    assert any("holds no probabilities" in getattr(event, "text", "") for event in heard)
    with pytest.raises(UserError, match="four: there are no probabilities"):
        ensemble([*folders, tmp_path / "four"], tmp_path / "other", method="mean")


def test_staple_trusts_the_members_that_agree(tmp_path):
    truth = np.zeros((4, 6, 5), np.int32)
    truth[1:3, 1:5, 1:4] = 255
    noisy = np.random.default_rng(0).choice([0, 255], truth.shape)
    for number, labels in enumerate((noisy, truth, truth)):
        save_map(tmp_path / str(number), "a", labels)
    ensemble([tmp_path / str(n) for n in range(3)], tmp_path / "out", method="staple")
    assert np.array_equal(read_labels(tmp_path / "out" / "a.nii.gz")[0], truth)


def refused(folders: list[Path], output: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ensemble(folders, output)
    assert not output.exists()
    assert not list(output.parent.glob(f"{output.name}*"))


def test_different_cases_are_named_and_nothing_is_written(folders, tmp_path):
    save(folders[2], "c", random_probabilities(5))
    refused(folders, tmp_path / "out", "different cases: only .*three has c")


def test_different_classes_are_named_and_nothing_is_written(folders, tmp_path):
    save(folders[1], "b", random_probabilities(5), label_names=("background", "organ", "vessel"))
    refused(folders, tmp_path / "out", "b: .*one and .*two have different classes: .*lesion 255 against .*vessel 255")
    save(folders[1], "b", random_probabilities(5), label_values=(0, 1, 2))
    refused(folders, tmp_path / "out", "lesion 255 against .*lesion 2")


def test_different_grids_are_named_and_nothing_is_written(folders, tmp_path):
    save(folders[1], "b", random_probabilities(5), plain_geometry((4, 6, 5), (2.5, 0.7, 0.8)))
    refused(folders, tmp_path / "out", "b: .* lie on different grids")


def test_what_does_not_sum_to_one_is_named_and_nothing_is_written(folders, tmp_path):
    save(folders[1], "b", random_probabilities(5) * 2)
    refused(folders, tmp_path / "out", r"two/b\.prob.*sum to 2 to 2, not to 1")
    broken = random_probabilities(5)
    broken[0, 0, 0, 0] = np.nan
    save(folders[1], "b", broken)
    refused(folders, tmp_path / "out", r"two/b\.prob.*sum to nan")


def test_a_damaged_file_is_named_and_nothing_is_written(folders, tmp_path):
    path = probabilities_file(folders[1], "b")
    path.write_bytes(path.read_bytes()[:-40])
    refused(folders, tmp_path / "out", r"two/b\.probabilities\.b2nd: these are no probabilities")


def test_one_folder_or_probabilities_without_values_are_refused(folders, tmp_path):
    refused(folders[:1], tmp_path / "out", "at least two")
    for folder in folders:
        save(folder, "a", random_probabilities(1), label_values=None)
    refused(folders, tmp_path / "out", "does not say which values")


def test_label_maps_and_probabilities_alone_do_not_mix(folders, tmp_path):
    for case in ("a", "b"):
        save_map(tmp_path / "maps", case, np.zeros((4, 6, 5), np.int32))
    with pytest.raises(UserError, match=r"one: there are no label maps .* or all probabilities"):
        ensemble([tmp_path / "maps", folders[0]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_output_may_be_the_folder_one_is_in(folders, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert [path.name for path in ensemble(folders, Path())] == ["a.nii.gz", "b.nii.gz"]
    assert sorted(path.name for path in tmp_path.glob("here*")) == ["here"]


def test_probabilities_of_a_vote_are_refused_not_left_out(folders, tmp_path):
    with pytest.raises(UserError, match="the method is vote"):
        ensemble(folders, tmp_path / "out", method="vote", save_probabilities=True)
    assert not (tmp_path / "out").exists()


def test_an_ensemble_replaces_neither_its_members_nor_what_autoseg_has_not_written(folders, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folders[0])
    for output in (folders[1], link):
        with pytest.raises(UserError, match="the predictions to combine lie there"):
            ensemble(folders, output)
    save_map(tmp_path / "drawn", "b", np.zeros((4, 6, 5), np.int32))
    before = (tmp_path / "drawn" / "b.nii.gz").read_bytes()
    with pytest.raises(UserError, match=r"drawn: b\.nii\.gz would be replaced, which autoseg has not written"):
        ensemble(folders, tmp_path / "drawn")
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["b.nii.gz"]
    assert (tmp_path / "drawn" / "b.nii.gz").read_bytes() == before


def test_probabilities_of_an_earlier_ensemble_do_not_stay_beside_new_label_maps(folders, tmp_path):
    out = tmp_path / "out"
    ensemble(folders, out, save_probabilities=True)
    save(out, "other", random_probabilities(7))
    ensemble(folders, out, weights=(0, 0, 1))
    assert [path.name for path in out.glob("*.probabilities.*")] == ["other.probabilities.b2nd"]


@pytest.mark.parametrize("why", ["mount", "parent"])
def test_an_output_that_is_a_place_of_its_own_is_filled_from_within(folders, tmp_path, monkeypatch, why):
    """A mounted folder: what lies beside it is on another file system, or may not be written."""
    (tmp_path / "out").mkdir()
    if why == "mount":
        monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "out")
    else:
        monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    beside: list[Path] = []
    original = step.publish

    def noting(staging: Path, output: Path) -> tuple[Path, ...]:
        beside.append(staging.parent)
        return original(staging, output)

    monkeypatch.setattr(step, "publish", noting)
    assert [path.name for path in ensemble(folders, tmp_path / "out")] == ["a.nii.gz", "b.nii.gz"]
    assert beside == [tmp_path / "out"]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a.nii.gz", "agreement.json", "b.nii.gz", "records"]


def test_files_already_in_the_output_stay_and_what_a_killed_run_left_goes(folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out.unfinished-1").mkdir()
    elsewhere = store.temporary_beside(tmp_path / "out")  # of a process that lives: this one
    elsewhere.mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    ensemble(folders, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a.nii.gz", "agreement.json", "b.nii.gz", "notes.txt", "records"]
    assert list(tmp_path.glob("*unfinished*")) == [elsewhere]
