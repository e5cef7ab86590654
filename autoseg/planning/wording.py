"""How numbers are worded in reasons. 1 GB is 2**30 bytes, as on the box of a graphics card."""

from collections.abc import Sequence

GIGABYTE = 2**30


def gigabytes(size_bytes: float) -> str:
    """E.g. "4.68 GB", or "20 MB"."""
    return f"{size_bytes / GIGABYTE:.2f} GB" if size_bytes >= GIGABYTE / 10 else f"{size_bytes / 2**20:.3g} MB"


def voxels(shape: Sequence[int]) -> str:
    """E.g. "128 x 112 x 96"."""
    return " x ".join(str(each) for each in shape)


def millimetres(spacing: Sequence[float | None]) -> str:
    """E.g. "3 x 0.78 x 0.78 mm"; an axis that is never resampled shows as "as is"."""
    return " x ".join("as is" if each is None else f"{each:.4g}" for each in spacing) + " mm"


def device(name: str) -> str:
    """A card that need not be there is called "cuda"."""
    return "a CUDA card" if name == "cuda" else name


def percent(share: float) -> str:
    """E.g. "12 %", "0.031 %"."""
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
