"""What every record is: a frozen value, checked when it is made, and where it is a file of its own, versioned."""

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]


class Record(BaseModel):
    """A frozen value; unknown fields are refused so that a typing error in an edited file is not silently ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Saved(Record):
    """A record that is a file of its own. `SCHEMA` is its version; `store.py` writes and checks it."""

    SCHEMA: ClassVar[int] = 1
