"""Small data sets for tests: the generator of `autoseg demo`, so that what users see first is what is tested."""

from autoseg.steps.demo import write_dataset

__all__ = ["write_dataset"]
