"""40 hippocampus cases from raw files to written label maps: autoseg and nnU-Net with one and the same network.

    python bench/predict.py --peer PEER_PYTHON [DATA] [--work FOLDER] [--minutes 5] [--cases 40]
                            [--trained RUN/models/3d/fold_0]

nnU-Net plans, preprocesses and trains for half a minute, which makes a checkpoint. A network of so little training is
undecided nearly everywhere, and rounding decides; so autoseg trains nnU-Net's network and patch for --minutes, mirrored
along all axes as nnU-Net does, and lends its weights to that checkpoint (--trained lends those of a finished training).
Then the model is imported (`autoseg import-nnunet`), so that weights, patch, grid, normalization and mirroring are the
same. All of it is kept in --work: a second run starts with predicting.
Then both predict the same folder, one after the other, `--times` times. Ours is the whole command, imports included;
nnU-Net's seconds begin when its libraries are loaded. Printed: seconds, their ratio, and the share of equal voxels.

At the end, and without --peer alone: resident memory over 200 predictions through one `Predictor`, with a small network
of random weights.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from outside import DATA, PEER_SCRIPT, add_peer, data_set

ROOT = Path(__file__).parent.parent
MODEL = "res/Dataset004_Peer/nnUNetTrainer__nnUNetPlans__3d_fullres"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=data_set, nargs="?", help=f"with --peer: a Decathlon folder; default: {DATA}")
    add_peer(parser)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--trained", type=Path, help="model folder whose weights nnU-Net's checkpoint gets")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if given.peer:
            pair(given, given.work or Path(name))
        print(json.dumps({"what": "200 predictions"} | memory_over_predictions(Path(name))), flush=True)


def pair(given: argparse.Namespace, work: Path) -> None:
    """Both tools on the same folder."""
    data = given.data or data_set(DATA)

    def peer(*words: object) -> dict:
        command = [given.peer, PEER_SCRIPT, *map(str, words)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    if not (work / MODEL / "fold_0" / "checkpoint_final.pth").is_file():
        peer("prepare", data.resolve(), work)
        peer("fit", work, "--minutes", 0.5)
    lend_weights(given.trained or trained_by_us(data, work, given.minutes), work / MODEL)
    images, run = work / "images", work / "run"
    for folder in (images, run):
        shutil.rmtree(folder, ignore_errors=True)
    images.mkdir()
    raw = sorted((work / "raw" / "Dataset004_Peer" / "imagesTr").glob("*_0000.nii.gz"))
    for path in raw[-given.cases :]:
        shutil.copy(path, images)
    autoseg("import-nnunet", work / MODEL, "-o", run)
    ours, theirs = [], []
    for _ in range(given.times):
        for folder in ("ours", "theirs"):
            shutil.rmtree(work / folder, ignore_errors=True)
        start = time.perf_counter()
        autoseg("predict", run, "-i", images, "-o", work / "ours", "--device", "cpu")
        ours.append(time.perf_counter() - start)
        theirs.append(peer("predict", work, images, work / "theirs")["predict_s"])
        print(json.dumps({"autoseg_s": ours[-1], "nnunet_s": theirs[-1]}), flush=True)
    ratio = statistics.median(ours) / statistics.median(theirs)
    equal = agreement(work / "ours", work / "theirs")
    print(json.dumps({"cases": given.cases, "ratio": ratio} | equal), flush=True)


def trained_by_us(data: Path, work: Path, minutes: float) -> Path:
    """The model folder of nnU-Net's network and patch after some minutes of autoseg's training."""
    sys.path[:0] = [str(ROOT / "bench")]
    from train import PLAN_FILE, like_the_peer

    from autoseg.layout import Layout
    from autoseg.records import Configuration, Plan
    from autoseg.store import load, save

    layout = Layout(work / "trained")
    if not layout.model("3d", "0").weights.is_file():
        autoseg("plan", data.resolve(), "-o", layout.root)
        made = load(layout.plan, Plan)
        fields = like_the_peer(made.configurations[-1], work / PLAN_FILE).model_dump()
        fields["train"]["augment"] |= {"mirror_axes": (0, 1, 2), "mirror_from_patches": 0}
        save(layout.plan, made.model_copy(update={"configurations": (Configuration.model_validate(fields),)}))
        autoseg("train", layout.root, "-c", "3d", "-f", "0", "--max-time", f"{60 * minutes:g}s", "--resume", "auto")
    return layout.model("3d", "0").root


def lend_weights(trained: Path, model: Path) -> None:
    """Put weights that autoseg trained into nnU-Net's checkpoint; biases that autoseg leaves out become 0."""
    import torch

    from autoseg.layout import ModelLayout
    from autoseg.network import checkpoint, nnunet
    from autoseg.network.unet import UNet
    from autoseg.records import Run
    from autoseg.store import load

    network = UNet(load(ModelLayout(trained).run, Run).configuration.network)
    checkpoint.load_weights(ModelLayout(trained).weights, network)
    weights = network.state_dict()
    spec = nnunet.spec_from_nnunet(
        nnunet.architecture_of(nnunet.read_json(model / "plans.json"), "3d_fullres"), network.spec.in_channels,
        network.spec.classes,
    )  # fmt: skip
    path = model / "fold_0" / "checkpoint_final.pth"
    theirs = torch.load(path, weights_only=False)  # made by the peer on this machine a moment ago
    wanted = nnunet.weights_from_nnunet(theirs["network_weights"], spec)
    for name, tensor in wanted.items():
        shape = tuple(weights[name].shape) if name in weights else None
        if shape != tuple(tensor.shape) and not (shape is None and name.endswith(".bias")):
            found = f"lacks {name}" if shape is None else f"has {name} of shape {shape}, not {tuple(tensor.shape)}"
            raise SystemExit(f"{trained} is not nnU-Net's network: it {found}. Leave --trained out.")
    for name, tensor in wanted.items():
        if name in weights:
            tensor.copy_(weights[name])  # in place, so that it changes under all the names that it has
        else:
            tensor.zero_()
    torch.save(theirs, path)


def autoseg(*words: object) -> None:
    """A command of ours in a process of its own."""
    subprocess.run([sys.executable, "-m", "autoseg", *map(str, words)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def agreement(one: Path, other: Path) -> dict:
    """Shares of equal voxels over all cases: all of them, and those where either is foreground."""
    from autoseg.image.formats import read_labels

    equal = total = inside_equal = inside = 0
    for path in sorted(one.glob("*.nii.gz")):
        first, second = read_labels(path)[0], read_labels(other / path.name)[0]
        foreground = (first > 0) | (second > 0)
        equal, total = equal + int((first == second).sum()), total + first.size
        inside_equal += int((first == second)[foreground].sum())
        inside += int(foreground.sum())
    return {"equal_voxels": equal / total, "equal_foreground_voxels": inside_equal / max(1, inside)}


def memory_over_predictions(folder: Path) -> dict:
    """Resident memory after 100 and after 200 predictions of images of changing size, in a fresh process."""
    code = (
        "import json, sys, numpy as np; from pathlib import Path; sys.path.insert(0, 'bench')\n"
        "from predict import small_run, resident\nfrom autoseg import Predictor\n"
        "predictor = Predictor(small_run(Path(sys.argv[1])), device='cpu', mirroring=False); read = []\n"
        "chance = np.random.default_rng(0)\n"
        "for number in range(200):\n"
        "    predictor(chance.normal(size=chance.integers(16, 33, 3)), probabilities=number % 2 == 0)\n"
        "    read.append(resident())\n"
        "print(json.dumps({'rss_mb_after_100': read[99], 'rss_mb_after_200': read[199],"
        " 'growth': read[199] / read[99] - 1, 'largest_of_last_100': max(read[100:]) / read[99] - 1}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "small")], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    return json.loads(done.stdout.splitlines()[-1])


def small_run(folder: Path) -> Path:
    """A run with one 3D network of random weights."""
    sys.path[:0] = [str(ROOT / "tests")]
    from planned import a_configuration, a_network, a_planned_run
    from synthetic import write_dataset
    from test_predict import write_network

    data = write_dataset(folder / "data", cases=2, shape=(20, 24, 22), label_values=(1, 2))
    configuration = a_configuration(patch_voxels=(32, 32, 32), network=a_network())
    run = a_planned_run(folder / "run", data, configuration)
    write_network(run, configuration, "0")
    return run


def resident() -> float:
    """Resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    np.seterr(all="ignore")
    main()
