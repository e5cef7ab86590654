"""Networks trained together as one average, against the same networks trained alone and averaged, in equal time.

Run: python bench/averaged.py RUN [--members 5] [--max-time 5m] [--student small] [-f 0] [-c 3d] [--folder PLACE]
The members are networks of the student's size, so that all of them fit into one training step. "together" is one
network of the averaged form: its output is the mean of its members' probabilities, and the loss sees only that mean.
"apart" trains each member alone for its share of the time, with the same batch size, and averages the probabilities
afterwards. Both are validated on the fold's cases as `autoseg train` does; RUN must be planned, and gets no model.
Prints one JSON line per network, then one with both averages, what averaging gains over the mean member on either side,
and Wilcoxon's P values over cases. The same command again with --folder keeps finished trainings.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from autoseg import store
from autoseg.arguments import parse_duration
from autoseg.cases.split import make_splits
from autoseg.layout import Layout, ModelLayout
from autoseg.network import checkpoint, unet
from autoseg.network.device import lay_out, pick, set_up
from autoseg.network.distributed import ALONE
from autoseg.planning.student import SIZES, choose_student
from autoseg.records import Configuration, Dataset, Fold, NetworkSpec, Run, Scores, Splits
from autoseg.scoring import overlap, statistics
from autoseg.steps.plan import checked
from autoseg.steps.predicting.models import configuration_named, default_configuration, load_network
from autoseg.steps.train import train_one
from autoseg.steps.training.options import Machine, Options
from autoseg.steps.training.validate import validate_fold
from autoseg.steps.training.work import Instead, fold_cases

BATCH = 2


class Averaged(nn.Module):
    """Several networks as one: the logarithm of the mean of their probabilities, which a softmax leaves as it is."""

    def __init__(self, members: Sequence[nn.Module], spec: NetworkSpec) -> None:
        super().__init__()
        self.members, self.spec = nn.ModuleList(members), spec

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Input and output as of each member: in training a list, highest resolution first."""
        outputs = [member(x) for member in self.members]
        if isinstance(outputs[0], Tensor):
            return log_mean(outputs)
        return [log_mean(level) for level in zip(*outputs, strict=True)]


def log_mean(logits: Sequence[Tensor]) -> Tensor:
    """log(mean of softmax), (B, K, ...) float32, stable where all members are sure."""
    logs = torch.stack([torch.log_softmax(each.float(), 1) for each in logits])
    return torch.logsumexp(logs, 0) - float(np.log(len(logits)))


def averaged_of(members: int) -> Callable[[NetworkSpec], nn.Module]:
    """A function that builds the averaged form; each member has weights of its own."""
    build = unet.build
    return lambda spec: Averaged([build(spec) for _ in range(members)], spec)


@dataclass(frozen=True)
class Bench:
    """What both sides share."""

    run: Path
    folder: Path
    own: Configuration
    fold: str
    cases: Fold
    members: int
    max_seconds: float

    def trained(self, name: str, seed: int, seconds: float) -> ModelLayout:
        """Train one network, or keep a finished one."""
        model = ModelLayout(self.folder / name / f"fold_{self.fold}")
        if not model.run.is_file() or not store.load(model.run, Run).finished:
            asked = Options(max_seconds=seconds, batch_size=BATCH)
            instead = Instead(self.own, model.root, keeps_norm=False)
            train_one(self.run, None, self.fold, seed, "auto", asked, Machine(), ALONE, lambda event: None, instead)
        return model

    def dice_of(self, name: str, networks: Sequence[nn.Module]) -> np.ndarray:
        """Validate networks, averaged if there are several; mean foreground Dice per case."""
        layout, device = Layout(self.run), pick(None)
        model = ModelLayout(self.folder / name / f"fold_{self.fold}")
        dataset = store.load(layout.dataset, Dataset)
        scores = validate_fold(
            self.run, model, self.own, networks, self.cases, dataset, checked(self.run), device, lambda event: None
        )
        return per_case(scores)


def per_case(scores: Scores) -> np.ndarray:
    """Mean Dice over the foreground per case, NaN where none is defined."""
    means = [overlap.mean(case.values["dice"]) for case in sorted(scores.cases, key=lambda case: case.id)]
    return np.array([np.nan if mean is None else mean for mean in means])


def say(**figures: object) -> None:
    print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}), flush=True)


def trained_together(bench: Bench) -> tuple[np.ndarray, list[np.ndarray]]:
    """Dice per case of the averaged form, and of each of its members by itself."""
    with patch.object(unet, "build", averaged_of(bench.members)):
        model = bench.trained("together", 0, bench.max_seconds)
    record, device = store.load(model.run, Run), pick(None)
    network = averaged_of(bench.members)(record.configuration.network)
    assert isinstance(network, Averaged)
    checkpoint.load_weights(model.weights, network)
    dimension = bench.own.dimension
    members = [lay_out(member.to(device.torch_device), dimension, device).eval() for member in network.members]
    say(network="together", steps=record.steps, seconds=record.seconds)
    alone = []
    for number, member in enumerate(members):
        alone.append(bench.dice_of(f"together_member_{number}", [member]))
        say(network=f"together, member {number} by itself", dice=float(np.nanmean(alone[-1])))
    return per_case(store.load(model.scores, Scores)), alone


def trained_apart(bench: Bench) -> tuple[np.ndarray, list[np.ndarray]]:
    """Dice per case of the average of networks that never met, and of each of them."""
    networks, alone, device = [], [], pick(None)
    for seed in range(bench.members):
        model = bench.trained(f"apart_{seed}", seed, bench.max_seconds / bench.members)
        record = store.load(model.run, Run)
        alone.append(per_case(store.load(model.scores, Scores)))
        dice = float(np.nanmean(alone[-1]))
        say(network=f"apart, seed {seed}", steps=record.steps, seconds=record.seconds, dice=dice)
        networks.append(load_network(model, device))
    return bench.dice_of("apart", networks), alone


def chance(one: np.ndarray, other: np.ndarray) -> float | None:
    """Wilcoxon's P value over cases, None where they are too few."""
    differences = (one - other)[~np.isnan(one - other)]
    return statistics.wilcoxon(differences) if differences.size >= statistics.FEWEST else None


def measure(bench: Bench) -> None:
    set_up(pick(None))
    apart, apart_members = trained_apart(bench)
    together, together_members = trained_together(bench)
    mean_apart, mean_together = np.mean(apart_members, 0), np.mean(together_members, 0)
    say(
        cases=len(apart), members=bench.members, seconds_each_side=bench.max_seconds, apart=float(np.nanmean(apart)),
        together=float(np.nanmean(together)), p_apart_against_together=chance(apart, together),
        gain_of_averaging_apart=float(np.nanmean(apart - mean_apart)), p_gain_apart=chance(apart, mean_apart),
        gain_of_averaging_together=float(np.nanmean(together - mean_together)),
        p_gain_together=chance(together, mean_together),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--max-time", default="5m", help="of each side")
    parser.add_argument("--student", choices=SIZES, default="small")
    parser.add_argument("-f", "--fold", default="0")
    parser.add_argument("-c", "--configuration", default=None)
    parser.add_argument("--folder", type=Path, default=None, help="where trainings are kept")
    given = parser.parse_args()
    layout, plan = Layout(given.run), checked(given.run)
    planned = configuration_named(plan, given.configuration or default_configuration(plan))
    own, _ = choose_student(planned, given.student, lambda configuration: 0, "assumed")
    augment = own.train.augment.model_copy(update={"mirror_axes": ()})  # the same for both sides
    train = own.train.model_copy(update={"augment": augment})
    own = own.model_copy(update={"name": planned.name, "train": train})  # the name that the plan and its cache know
    dataset = store.load(layout.dataset, Dataset)
    splits = store.load(layout.splits, Splits) if layout.splits.is_file() else make_splits(dataset.cases)
    cases = fold_cases(splits, dataset, given.fold)
    with tempfile.TemporaryDirectory() as place:
        folder = given.folder or Path(place)
        measure(Bench(given.run, folder, own, given.fold, cases, given.members, parse_duration(given.max_time)))


if __name__ == "__main__":
    main()
