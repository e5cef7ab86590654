"""Seconds from raw files to a planned and preprocessed data set: autoseg, and nnU-Net beside it.

    python bench/prepare.py [DATA] --peer PEER_PYTHON

PEER_PYTHON is the interpreter of an environment with nnunetv2 2.8.1. Without --peer only autoseg is timed. Every
reading is of whole processes in a fresh folder, imports included; the pairs alternate, the ratio is of the medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from outside import PEER_SCRIPT, add_data, add_peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser)
    add_peer(parser)
    parser.add_argument("--times", type=int, default=3)
    given = parser.parse_args()
    ours, theirs = [], []
    for _ in range(given.times):
        ours.append(seconds_of_autoseg(given.data))
        if given.peer:
            theirs.append(seconds_of_peer(given.data, given.peer))
        print(f"autoseg {ours[-1]:.1f} s" + (f", nnU-Net {theirs[-1]:.1f} s" if theirs else ""), flush=True)
    line = {"what": "plan and preprocess", "autoseg_s": statistics.median(ours), "times": given.times}
    if theirs:
        line |= {"nnunet_s": statistics.median(theirs), "ratio": statistics.median(ours) / statistics.median(theirs)}
    print(json.dumps(line))


def seconds_of_autoseg(data: Path) -> float:
    """All configurations of the plan, which is more than the peer is asked for."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for command in (["plan", str(data), "-o", folder], ["preprocess", folder]):
            subprocess.run([sys.executable, "-m", "autoseg", *command], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def seconds_of_peer(data: Path, python: str) -> float:
    """Only its 3d_fullres configuration; the seconds it reports leave its copying of the raw files out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, PEER_SCRIPT, "prepare", str(data), folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return float(json.loads(done.stdout.splitlines()[-1])["prepare_s"])


if __name__ == "__main__":
    main()
