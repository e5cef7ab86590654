"""network/distributed.py: two processes learn what one learns, and notice when the other is gone."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from planned import a_configuration, a_network, a_planned_run
from safetensors.numpy import load_file
from synthetic import write_dataset
from torch import nn

from autoseg.errors import EndedElsewhere, UserError
from autoseg.layout import Layout
from autoseg.network import distributed
from autoseg.network.device import Device
from autoseg.network.distributed import ALONE, Team, joined, own_device, whole_batch_statistics
from autoseg.network.patches import InMemory
from autoseg.records import AugmentSpec, Configuration, Run, Scores, TrainSpec
from autoseg.steps.preprocess import preprocess
from autoseg.steps.train import train
from autoseg.steps.training.batches import Batches
from autoseg.store import load

ROOT = Path(__file__).parent.parent


def tiny() -> Configuration:
    spec = TrainSpec(
        epochs=2, steps_per_epoch=2, warmup_steps=1, average_decay=0.9,
        augment=AugmentSpec(rotation_rad=(0.5,) * 3, mirror_axes=(1,)),
    )  # fmt: skip
    return a_configuration(network=a_network(), train=spec, batch_dice=True, batch_size=3)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    data = write_dataset(tmp_path / "data", cases=4, shape=(8, 10, 12))
    run = a_planned_run(tmp_path / "run", data, tiny())
    preprocess(run, workers=1)
    return run


def test_two_processes_have_the_gradient_of_one_and_one_notices_that_the_other_died() -> None:
    port = str(free_port())
    started = []
    for rank in ("0", "1"):
        known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | known | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, str(ROOT / "tests" / "two_processes.py")]
        started.append(
            subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    said, errors = started[0].communicate()
    started[1].communicate()
    assert (started[0].returncode, started[1].returncode) == (0, 9), errors
    rows = [line.split() for line in said.splitlines() if not line.startswith("noticed")]
    assert len(rows) == 10
    assert [row for row in rows if float(row[2]) > 1e-5] == []
    assert "noticed: Another process of this training has ended" in said


def test_torchrun_trains_to_the_weights_and_scores_of_one_process(planned: Path) -> None:
    alone = planned.with_name("alone")
    shutil.copytree(planned, alone)
    record = train(alone, configuration="3d", device="cpu", precision="fp32", workers=1)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    options = ["-m", "autoseg", "train", str(planned), "-c", "3d", "--workers", "1"]
    options += ["--device", "cpu", "--precision", "fp32"]
    ended = subprocess.run(words + options, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("3d, fold 0: finished") == 1
    assert ended.stderr.count("preprocess 3d: done") == 1
    model, other = Layout(planned).model("3d", "0"), Layout(alone).model("3d", "0")
    weights, expected = load_file(model.weights), load_file(other.weights)
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name], value, atol=1e-4, err_msg=name)
    shared = load(model.run, Run)
    assert (shared.processes, shared.steps, shared.finished) == (2, record.steps, True)
    scores, whole = load(model.scores, Scores), load(other.scores, Scores)
    assert [case.id for case in scores.cases] == [case.id for case in whole.cases]
    assert scores.foreground_mean["dice"] == pytest.approx(whole.foreground_mean["dice"], abs=0.02)


def test_the_shares_of_a_batch_are_the_batch() -> None:
    chance = np.random.default_rng(0)
    sources = []
    for _ in range(3):
        labels = chance.integers(0, 3, (9, 10, 12)).astype(np.int16)
        places = {k: np.argwhere(labels == k) for k in (1, 2)}
        sources.append(InMemory(chance.normal(size=(1, *labels.shape)).astype(np.float32), labels, places))
    cpu, ids, told = Device(torch.device("cpu"), "fp32"), ("a", "b", "c"), set[tuple[str, ...]]()
    annotated = {"a": (True, True, False), "c": (True, False, True)}

    def drawn(team: Team) -> list[tuple[torch.Tensor, ...]]:
        with Batches(tiny(), 0, 1, 3, cpu, 1, team, annotated=annotated) as batches:
            batch = batches.draw(sources, ids, 4)
        told.add(batch.cases)
        assert batch.annotated is not None
        return list(zip(batch.image, batch.labels, batch.annotated, strict=True))

    whole, first, second = drawn(ALONE), drawn(Team(0, 2)), drawn(Team(1, 2))
    assert (len(whole), len(first), len(second)) == (3, 2, 1)
    for one, other in zip(whole, (first[0], second[0], first[1]), strict=True):
        torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[2], other[2])
    [cases] = told  # every process can name them all, as where one holds numbers that are not finite
    assert [annotated.get(case, (True,) * 3) for case in cases] == [tuple(row[2].tolist()) for row in whole]


def test_without_torchrun_there_is_one_process() -> None:
    with joined("cpu") as team:
        assert team == ALONE
    assert own_device("cuda:1") == "cuda:1"


def test_processes_of_torchrun_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        distributed, "torchrun_setting", lambda name, otherwise: {"WORLD_SIZE": 4, "LOCAL_RANK": 3}[name]
    )
    assert own_device("cuda") == "cuda:3"
    assert own_device("cpu") == "cpu"
    with pytest.raises(UserError, match="its own GPU"):
        own_device("cuda:1")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:1"), ""),
        (RuntimeError("[unbound_buffer.cc:84] Timed out waiting 1800000ms for recv operation to complete"), ""),
        (torch.distributed.DistNetworkError("The client socket has failed"), ""),
        (torch.distributed.DistBackendError("NCCL error: unhandled\nmore"), "NCCL error: unhandled"),
    ],
)
def test_an_error_between_processes_says_its_reason_where_it_may_be_its_own(error: Exception, reason: str) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(EndedElsewhere, match="has ended or cannot be reached") as ended:
        distributed._heard(fail)
    assert ended.value.reason == reason
    assert reason in str(ended.value)


@pytest.mark.parametrize("text", ["CUDA error: device-side assert triggered", "CUDA out of memory"])
def test_an_error_of_this_process_is_not_taken_for_one_of_another(text: str) -> None:
    def fail() -> None:
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match=text):
        distributed._heard(fail)


def test_batch_norm_is_not_shared_on_a_cpu() -> None:
    with pytest.raises(UserError, match="Batch norm cannot be shared"):
        whole_batch_statistics(nn.BatchNorm2d(2), Team(0, 2))
    assert whole_batch_statistics(nn.InstanceNorm2d(2), Team(0, 2))


def test_a_batch_smaller_than_the_team_is_refused(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autoseg.events import silent
    from autoseg.steps.training.options import Machine, Options
    from autoseg.steps.training.work import look_up

    with pytest.raises(UserError, match="A batch of 3 cannot be shared by 4 processes"):
        look_up(planned, "3d", "0", 0, "no", Options(), Machine("cpu"), Team(1, 4), silent)
