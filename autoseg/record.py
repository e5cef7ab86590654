"""What every record is: a frozen value, checked when made, versioned in a file."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(gt=0)]


def _fit_for_files(case: str) -> str:
    """A case's id, after which files are named. Raises ValueError where no whole file can be called so."""
    if not case or case.startswith(".") or {"/", "\\"} & set(case) or ".unfinished" in case:
        raise ValueError(
            f"a case cannot be called {case!r}: files are named after it, so it must not be empty, begin with a dot, "
            "or hold / or \\ or .unfinished"
        )
    return case


FileName = Annotated[str, AfterValidator(_fit_for_files)]


class Record(BaseModel):
    """A frozen value; unknown fields are refused so that a typing error in an edited file is not silently ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Saved(Record):
    """A record that is a file of its own. `SCHEMA` is its version; `store.py` writes and checks it."""

    SCHEMA: ClassVar[int] = 1
