"""nnU-Net v2 beside autoseg, on the same data, machine and PyTorch: one JSON line of figures. Others here call it.

It runs in an environment of its own (nnU-Net needs torchvision, which brings a CUDA build of torch, several GB):
    python3 -m venv PEER && PEER/bin/pip install nnunetv2==2.8.1
Then, with WORK any empty folder and DATA a Decathlon-style folder (imagesTr, labelsTr, dataset.json):
    PEER/bin/python nnunet.py prepare DATA WORK          fingerprint + plan + preprocess; wall seconds of each process
    PEER/bin/python nnunet.py step WORK                  seconds per training step and per batch wait
    PEER/bin/python nnunet.py fit WORK --minutes 40      train fold 0 so that the schedule ends in about that time
    PEER/bin/python nnunet.py predict WORK IN OUT        predict a folder (names end in _0000) with the trained fold 0
    PEER/bin/python nnunet.py export                     62-class logits back to a 512-wide grid: seconds and peak RSS

The planner's own batch size is used unless --batch N is given. Device: --device cpu (default) or cuda.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

NAME = "Dataset004_Peer"


def set_folders(work: Path) -> None:
    """nnU-Net reads its folders from the environment, so this must run before it is imported."""
    for variable, folder in (("nnUNet_raw", "raw"), ("nnUNet_preprocessed", "pre"), ("nnUNet_results", "res")):
        os.environ[variable] = str((work / folder).resolve())
        (work / folder).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("nnUNet_n_proc_DA", str(len(os.sched_getaffinity(0))))


def prepare(data: Path, work: Path) -> dict:
    source = json.loads((data / "dataset.json").read_text())
    raw = work / "raw" / NAME
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    for pair in source["training"]:
        case = Path(pair["image"]).name.removesuffix(".nii.gz")
        shutil.copy(data / pair["image"], raw / "imagesTr" / f"{case}_0000.nii.gz")
        shutil.copy(data / pair["label"], raw / "labelsTr" / f"{case}.nii.gz")
    labels = {name: int(value) for value, name in source["labels"].items()}
    (raw / "dataset.json").write_text(json.dumps({
        "channel_names": source["modality"], "labels": labels,
        "numTraining": len(source["training"]), "file_ending": ".nii.gz"}))
    workers = str(len(os.sched_getaffinity(0)))
    start = time.perf_counter()
    subprocess.run([str(Path(sys.executable).parent / "nnUNetv2_plan_and_preprocess"), "-d", "4", "-c", "3d_fullres",
                    "-np", workers, "-npfp", workers, "--verify_dataset_integrity", "--no_pbar"],
                   check=True, stdout=subprocess.DEVNULL)
    return {"prepare_s": time.perf_counter() - start, "cases": len(source["training"])}


def trainer(work: Path, device: str, batch: int | None):
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = work / "pre" / NAME
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    if batch:
        plans["configurations"]["3d_fullres"]["batch_size"] = batch
    dataset = json.loads((folder / "dataset.json").read_text())
    return nnUNetTrainer(plans, "3d_fullres", 0, dataset, device=torch.device(device))


def time_steps(one, steps: int) -> dict:
    import torch
    sync = torch.cuda.synchronize if one.device.type == "cuda" else (lambda: None)
    one.network.train()
    waits, works = [], []
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(one.dataloader_train)
        got = time.perf_counter()
        one.train_step(batch)
        sync()
        waits.append(got - start)
        works.append(time.perf_counter() - got)
    warm = max(2, steps // 5)
    return {"step_s": statistics.median(works[warm:]), "wait_s": statistics.median(waits[warm:]),
            "batch": one.batch_size, "patch": [int(v) for v in one.configuration_manager.patch_size]}


def step(work: Path, device: str, batch: int | None, steps: int) -> dict:
    one = trainer(work, device, batch)
    one.on_train_start()
    figures = time_steps(one, steps)
    stop_workers(one)
    return figures


def stop_workers(one) -> None:
    for loader in (one.dataloader_train, one.dataloader_val):
        loader._finish()


def fit(work: Path, device: str, batch: int | None, minutes: float) -> dict:
    probe = trainer(work, device, batch)
    probe.on_train_start()
    seconds = sum(time_steps(probe, 8)[key] for key in ("step_s", "wait_s"))
    stop_workers(probe)
    one = trainer(work, device, batch)
    one.num_epochs, one.num_val_iterations_per_epoch = 10, 2
    one.num_iterations_per_epoch = max(1, int(minutes * 60 / seconds / one.num_epochs * 0.95))
    start = time.perf_counter()
    one.run_training()
    return {"fit_s": time.perf_counter() - start, "steps": one.num_epochs * one.num_iterations_per_epoch}


def predict(work: Path, source: Path, target: Path, device: str) -> dict:
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    start = time.perf_counter()
    one = nnUNetPredictor(device=torch.device(device), perform_everything_on_device=device == "cuda", allow_tqdm=False)
    one.initialize_from_trained_model_folder(
        str(work / "res" / NAME / "nnUNetTrainer__nnUNetPlans__3d_fullres"), (0,), "checkpoint_final.pth")
    workers = len(os.sched_getaffinity(0))
    one.predict_from_files(str(source), str(target), num_processes_preprocessing=workers,
                           num_processes_segmentation_export=workers)
    return {"predict_s": time.perf_counter() - start, "cases": len(list(target.glob("*.nii.gz")))}


def export(classes: int, source_zyx: list[int], target_zyx: list[int]) -> dict:
    """What nnU-Net does after the network: logits to the original grid, softmax, argmax."""
    import torch
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
    logits = torch.randn((classes, *source_zyx), generator=torch.Generator().manual_seed(0)).numpy()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    full = resample_data_or_seg_to_shape(logits, tuple(target_zyx), (3.0, 3.0, 3.0), (3.0, 1.0, 1.0),
                                         is_seg=False, order=1, order_z=0, force_separate_z=None)
    labels = torch.softmax(torch.as_tensor(full).float(), 0).argmax(0)
    return {"export_s": time.perf_counter() - start, "labels": list(labels.shape),
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "before_gb": before / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "step", "fit", "predict", "export"))
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--classes", type=int, default=62)
    parser.add_argument("--from-zyx", type=int, nargs=3, default=(112, 101, 122))
    parser.add_argument("--to-zyx", type=int, nargs=3, default=(112, 404, 488))
    given = parser.parse_args()
    if given.what == "prepare":
        set_folders(given.paths[1])
        figures = prepare(given.paths[0], given.paths[1])
    elif given.what == "export":
        figures = export(given.classes, list(given.from_zyx), list(given.to_zyx))
    else:
        set_folders(given.paths[0])
        work, *others = given.paths
        figures = {"step": lambda: step(work, given.device, given.batch, given.steps),
                   "fit": lambda: fit(work, given.device, given.batch, given.minutes),
                   "predict": lambda: predict(work, *others, given.device)}[given.what]()
    print(json.dumps({"peer": "nnunetv2", "what": given.what, "device": given.device, **figures}), flush=True)
    os._exit(0)  # its background workers outlive a normal exit


if __name__ == "__main__":
    main()
