"""What measurements need from outside the repository: a data set, and nnU-Net, which `nnunet.py` runs.

The data set is Task04 (Hippocampus) of the Medical Segmentation Decathlon, unpacked; nnU-Net is an interpreter of an
environment with nnunetv2, PEER_PYTHON (docs/benchmarks.md says how to make one).
"""

import argparse
from pathlib import Path

DATA = "../shared/data/hippocampus"
PEER_SCRIPT = str(Path(__file__).with_name("nnunet.py"))


def data_set(text: str) -> Path:
    """The folder that an argument names; one sentence where there is none."""
    if not Path(text).is_dir():
        raise SystemExit(
            f"{text}: no such folder. Unpack Task04 (Hippocampus) of the Medical Segmentation Decathlon, and name it."
        )
    return Path(text)


def add_data(parser: argparse.ArgumentParser) -> None:
    """The argument for the data set."""
    parser.add_argument("data", type=data_set, nargs="?", default=DATA, help=f"a Decathlon folder; default: {DATA}")


def add_peer(parser: argparse.ArgumentParser) -> None:
    """The option for nnU-Net."""
    parser.add_argument("--peer", metavar="PEER_PYTHON", help="an interpreter that has nnunetv2")
