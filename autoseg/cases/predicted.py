"""The record of a prediction, by which `--resume` knows what is done."""

from autoseg.records import Record, Saved


class InputFile(Record):
    """A file that a prediction was made from; `content` is a hash of its bytes."""

    name: str
    size_bytes: int
    time_ns: int
    content: str


class Predicted(Saved):
    """What the prediction of one case was made from: its files, and a hash of networks, plan and options.

    `result` is the label map `written` as it was left; None in records of earlier versions.
    """

    case: str
    inputs: tuple[InputFile, ...]
    model: str
    written: str
    result: InputFile | None = None
    uncertainty: float | None = None
