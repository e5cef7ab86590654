"""From a folder of images with label maps to a trained segmentation pipeline.

The public functions are those of the command line and do the same; each is imported when it is first asked for, so
`import autoseg` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from autoseg.steps.compare import compare
    from autoseg.steps.demo import demo
    from autoseg.steps.distill import distill
    from autoseg.steps.ensemble import ensemble, ensemble_runs
    from autoseg.steps.evaluate import evaluate, evaluate_run
    from autoseg.steps.import_nnunet import import_nnunet
    from autoseg.steps.plan import plan
    from autoseg.steps.postprocess import postprocess_apply
    from autoseg.steps.postprocess import postprocess_learn as postprocess
    from autoseg.steps.predict import Predictor, predict
    from autoseg.steps.preprocess import preprocess
    from autoseg.steps.report import report
    from autoseg.steps.run import run
    from autoseg.steps.select import select
    from autoseg.steps.study import study
    from autoseg.steps.train import train

__all__ = [
    "Predictor", "__version__", "compare", "demo", "distill", "ensemble", "ensemble_runs", "evaluate",
    "evaluate_run", "import_nnunet", "plan", "postprocess", "postprocess_apply", "predict", "preprocess", "report",
    "run", "select", "study", "train",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in PUBLIC:
        raise AttributeError(f"module 'autoseg' has no attribute {name!r}")
    module, attribute = PUBLIC[name].split(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


PUBLIC: dict[str, str] = {
    "plan": "autoseg.steps.plan:plan",
    "preprocess": "autoseg.steps.preprocess:preprocess",
    "train": "autoseg.steps.train:train",
    "predict": "autoseg.steps.predict:predict",
    "Predictor": "autoseg.steps.predict:Predictor",
    "ensemble": "autoseg.steps.ensemble:ensemble",
    "postprocess": "autoseg.steps.postprocess:postprocess_learn",
    "postprocess_apply": "autoseg.steps.postprocess:postprocess_apply",
    "ensemble_runs": "autoseg.steps.ensemble:ensemble_runs",
    "evaluate": "autoseg.steps.evaluate:evaluate",
    "evaluate_run": "autoseg.steps.evaluate:evaluate_run",
    "compare": "autoseg.steps.compare:compare",
    "report": "autoseg.steps.report:report",
    "run": "autoseg.steps.run:run",
    "import_nnunet": "autoseg.steps.import_nnunet:import_nnunet",
    "select": "autoseg.steps.select:select",
    "distill": "autoseg.steps.distill:distill",
    "study": "autoseg.steps.study:study",
    "demo": "autoseg.steps.demo:demo",
}
"""Public name -> where it lives."""
