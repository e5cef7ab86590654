"""What the data warns of: imbalance, tiny structures, cases without labels. The numbers come first, then advice."""

from collections.abc import Mapping, Sequence
from math import prod
from statistics import median

from autoseg.planning.train import few_cases_with, tubes
from autoseg.planning.wording import millimetres, percent, some
from autoseg.records import Choice, Fingerprint, Millimetres3, TrainSpec, indices_in
from autoseg.specs import forced_of

TINY_EDGE, ENOUGH_EDGE = 2, 3
"""A structure of less than 2 voxels per axis can be lost by resampling alone; 3 are a fair wish."""
SPECKS_FACTOR = 20.0
"""Components on average this many times larger than a tiny one: the small ones are specks beside the structure."""
RARE_SHARE = 1e-4
UNEVEN_FACTOR = 100.0
HIGHER_SHARE = 0.66
"""What `foreground_share` may be raised to for a rare class."""


def describe_empty(fingerprint: Fingerprint) -> Choice:
    """How many cases have no foreground, and which classes are missing in how many."""
    cases, names = fingerprint.cases, [label.name for label in fingerprint.labels]
    empty = [case.id for case in cases if not sum(case.class_voxels[1:])]
    lacking = [(sum(not case.class_voxels[k] for case in cases), names[k]) for k in range(1, len(names))]
    partly = [f"{name} in {count}" for count, name in sorted(lacking, reverse=True) if count]
    because = "every class occurs in every case."
    if partly:
        because = f"classes are missing: {some(partly)}."
    if empty:
        because += f" No foreground at all in {some(empty)}; patches of such cases teach background only."
    return Choice(field="data.empty_cases", value=f"{len(empty)} of {len(cases)}", because=because)


def warn_of_rare(fingerprint: Fingerprint) -> tuple[str, ...]:
    """A warning for every class (or region) that no case has, or one alone."""
    warnings, labels, regions = [], fingerprint.labels, fingerprint.regions
    names = [each.name for each in regions] or [each.name for each in labels[1:]]
    indices = indices_in(regions, labels) or tuple((k,) for k in range(1, len(labels)))
    for name, members in zip(names, indices, strict=True):
        having = [case.id for case in fingerprint.cases if any(case.class_voxels[k] for k in members)]
        if not having:
            warnings.append(f"{name} occurs in no case, so nothing can be learned of it.")
        elif len(having) == 1 < len(fingerprint.cases):
            warnings.append(
                f"{name} occurs in {having[0]} alone: the fold that validates on it learns nothing of {name}, and no "
                "other fold scores it."
            )
    return tuple(warnings)


def describe_imbalance(fingerprint: Fingerprint, train: TrainSpec, batches: Mapping[str, int]) -> Choice:
    """Shares of the classes, and what loss and sampling do about them; `batches` are those of the configurations."""
    totals = [sum(case.class_voxels[k] for case in fingerprint.cases) for k in range(len(fingerprint.labels))]
    everything = max(1, sum(totals))
    found = [(totals[k], label.name) for k, label in enumerate(fingerprint.labels) if k and totals[k]]
    value = f"{train.loss}, patches on foreground: {_forced(batches, train.foreground_share)}"
    if train.sampling != "foreground":
        value += f", {train.sampling}"
    if not found:
        return Choice(field="data.imbalance", value=value, because="no foreground voxel was counted.")
    (least, rarest), (most, commonest) = min(found), max(found)
    foreground = sum(count for count, _ in found) / everything
    because = (
        f"foreground fills {percent(foreground)} of the voxels; the rarest class, {rarest}, "
        f"{percent(least / everything)}. Dice weighs each class alike whatever its size"
    )
    because += "." if train.sampling == "class_balanced" else ", and forced patches draw the classes of a case evenly."
    if most > UNEVEN_FACTOR * least:
        because += f" {commonest} is {most / least:.0f} times larger than {rarest}."
    if least < RARE_SHARE * everything:
        because += (
            f" {rarest} is rare: if its Dice stays low, {_raised(batches, train.foreground_share)}compare losses that "
            "follow hard voxels: autoseg study RUN --vary loss=dice_ce,dice_focal,dice_topk."
        )
    if few := few_cases_with(fingerprint):
        named = some([f"{name} ({count} of {len(fingerprint.cases)})" for name, count in few.items()])
        because += f" In few cases: {named}; so a class is drawn first, and then a case that has it."
    if named := some(tubes([label.name for label in fingerprint.labels[1:]])):
        because += f" {named}: tubes by their name; what keeps them whole is found by --vary loss=dice_ce,dice_cldice."
    return Choice(field="data.imbalance", value=value, because=because)


def describe_tiny(fingerprint: Fingerprint, spacing_mm: Millimetres3) -> tuple[Choice, tuple[str, ...]]:
    """Classes whose median component is under a few voxels at the target spacing; a proposal and warnings if any."""
    tiny, enough = TINY_EDGE**fingerprint.dimension, ENOUGH_EDGE**fingerprint.dimension
    sizes = _component_voxels(fingerprint, spacing_mm)
    names = {k: label.name for k, label in enumerate(fingerprint.labels)}
    if not sizes:
        return Choice(field="data.tiny_structures", value="unknown", because="no component was counted."), ()
    k = min(sizes, key=lambda k: sizes[k][0])
    because = (
        f"the smallest median component is that of {names[k]} with {sizes[k][0]:.3g} voxels at the target spacing, "
        f"{sizes[k][1]:.3g} on average; under {tiny} would be too few."
    )
    small = sorted((median_voxels, k) for k, (median_voxels, _) in sizes.items() if median_voxels < tiny)
    found = [(size, k) for size, k in small if sizes[k][1] < SPECKS_FACTOR * tiny]
    if not found:
        because += " The small ones are taken for specks beside a large structure." if small else ""
        return Choice(field="data.tiny_structures", value="none", because=because), ()
    proposal = _finer(spacing_mm, enough / found[0][0], fingerprint.dimension)
    wanted = ",".join(f"{each:.4g}" for each in proposal[3 - fingerprint.dimension :])
    named = some([f"{names[k]} ({size:.2g} voxels)" for size, k in found])
    warning = (
        f"{named}: the median component is under {tiny} voxels at {millimetres(spacing_mm)}. Unless these are specks "
        f"of noise in the labels, plan with --spacing {wanted}, which gives {enough}."
    )
    return Choice(field="data.tiny_structures", value=some([names[k] for _, k in found]), because=warning), (warning,)


def _forced(batches: Mapping[str, int], share: float) -> str:
    """E.g. "4 of 12 (2d), 1 of 2 (3d, 3d_lowres)"."""
    names: dict[str, list[str]] = {}
    for name, batch in batches.items():
        names.setdefault(f"{forced_of(batch, share)} of {batch}", []).append(name)
    return ", ".join(f"{forced} ({', '.join(those)})" for forced, those in names.items())


def _raised(batches: Mapping[str, int], share: float) -> str:
    """What a higher share would force; nothing where it adds no patch to the batch, or leaves none that is free."""
    more = {n: b for n, b in batches.items() if forced_of(b, share) < forced_of(b, HIGHER_SHARE) < b}
    forced = f"which puts {_forced(more, HIGHER_SHARE)} on foreground"
    return f"raise foreground_share in plan.json to {HIGHER_SHARE}, {forced}, or " if more else ""


def _component_voxels(fingerprint: Fingerprint, spacing_mm: Millimetres3) -> dict[int, tuple[float, float]]:
    """Label index -> median over cases of the median and of the mean size of its components, in target voxels."""
    sizes: dict[int, tuple[float, float]] = {}
    first = 3 - fingerprint.dimension  # slices are not resampled across
    for k in range(1, len(fingerprint.labels)):
        cases = [case for case in fingerprint.cases if k < len(case.class_components) and case.class_components[k]]
        scales = [prod(case.spacing_mm[first:]) / prod(spacing_mm[first:]) for case in cases]
        medians = [c.class_median_component_voxels[k] * scale for c, scale in zip(cases, scales, strict=True)]
        means = [c.class_voxels[k] / c.class_components[k] * scale for c, scale in zip(cases, scales, strict=True)]
        if cases:
            sizes[k] = median(medians), median(means)
    return sizes


def _finer(spacing_mm: Sequence[float], missing: float, dimension: int) -> tuple[float, ...]:
    """The same spacing, refined on its coarsest axes first, until voxels are `missing` times smaller; 2D keeps Z."""
    spacing, allowed = list(spacing_mm), range(3 - dimension, 3)
    while missing > 1.0001:
        coarsest = max(spacing[a] for a in allowed)
        axes = [a for a in allowed if spacing[a] >= 0.9999 * coarsest]
        below = max((spacing[a] for a in allowed if a not in axes), default=0.0)
        factor = missing ** (1 / len(axes))
        if below:
            factor = min(factor, coarsest / below)
        for a in axes:
            spacing[a] /= factor
        missing /= factor ** len(axes)
    return tuple(spacing)
