"""Which devices a request may have at all: architectures, families of them, models, labels. Pure.

Owns the table of families. A request names what its code was compiled for, so a device that does not match is never given,
however empty it is.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Final

from manager.core.shapes import Labels, Resources

FAMILIES: Final[dict[str, tuple[str, ...]]] = {
    "cdna1": ("gfx908",),
    "cdna2": ("gfx90a",),
    "cdna3": ("gfx940", "gfx941", "gfx942"),
    "cdna4": ("gfx950",),
    "rdna2": ("gfx1030", "gfx1031", "gfx1032"),
    "rdna3": ("gfx1100", "gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1151"),
    "rdna4": ("gfx1200", "gfx1201"),
    "volta": ("sm_70",),
    "turing": ("sm_75",),
    "ampere": ("sm_80", "sm_86", "sm_87"),
    "ada": ("sm_89",),
    "hopper": ("sm_90",),
    "blackwell": ("sm_100", "sm_103", "sm_120", "sm_121"),
}
"""Names that people use for several architectures at once."""
_ARCHITECTURE: Final = re.compile(r"gfx[0-9a-f]{2,5}|sm_[0-9]{2,3}[a-z]?")
_BEGINNING: Final = re.compile(r"(gfx[0-9a-f]{0,5}|sm_[0-9]{0,3})\*")
_MODEL: Final = re.compile(r"[a-z0-9][a-z0-9 ._-]{0,62}")
_LABEL: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
MODELS_MAX: Final = 16
"""Device models of one request, any of which will do."""
LABELS_MAX: Final = 32
"""Labels of one node or request."""


def architectures_of(names: Iterable[str]) -> tuple[str, ...]:
    """What a request names as architectures, in its one form.

    Raises:
        ValueError: says what was wrong and what would be right.
    """
    found: set[str] = set()
    for name in names:
        text = name.strip().lower()
        if text not in FAMILIES and not _ARCHITECTURE.fullmatch(text) and not _BEGINNING.fullmatch(text):
            near = difflib.get_close_matches(text, FAMILIES, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{name[:40]!r} is not an architecture{hint}: write a name such as 'gfx942' or 'sm_90', a beginning such as "
                f"'gfx94*', or a family ({', '.join(FAMILIES)})"
            )
        found.add(text)
    return tuple(sorted(found))


def device_model_of(text: str) -> str:
    """What a request names as device model, in its one form: a part of a name, or several with ``|`` between.

    Raises:
        ValueError: says what was wrong and what would be right.
    """
    if not text.strip():
        return ""
    models = {" ".join(part.lower().split()) for part in text.split("|")}
    if len(models) > MODELS_MAX:
        raise ValueError(f"{len(models)} device models are more than the {MODELS_MAX} that a request may name")
    if not all(_MODEL.fullmatch(model) for model in models):
        raise ValueError(
            f"{text[:40]!r} is not a device model: write a part of its name, such as 'MI300X', or several as 'MI300X|MI325X'"
        )
    return "|".join(sorted(models))


def labels_of(pairs: Iterable[tuple[str, str]]) -> Labels:
    """Labels of a node or a request, in their one form.

    Raises:
        ValueError: says what was wrong and what would be right.
    """
    found = dict(pairs)
    if len(found) > LABELS_MAX:
        raise ValueError(f"{len(found)} labels are more than the {LABELS_MAX} that there may be")
    for name, value in found.items():
        for text in (name, value):
            if not _LABEL.fullmatch(text):
                raise ValueError(
                    f"{text[:70]!r} is neither a label's name nor its value: up to 63 letters, digits, '.', '_', '/' and '-', "
                    "with a letter or digit at both ends"
                )
    return tuple(sorted(found.items()))


def has_architecture(resources: Resources, architecture: str) -> bool:
    """Whether a device of this architecture will do."""
    if not resources.architectures:
        return True
    for wanted in resources.architectures:
        if wanted == architecture or architecture in FAMILIES.get(wanted, ()):
            return True
        if wanted.endswith("*") and architecture.startswith(wanted[:-1]):
            return True
    return False


def has_model(resources: Resources, model: str) -> bool:
    """Whether a device of this model will do: all words of one of the models that were named occur in it."""
    name = model.lower()
    return any(all(word in name for word in wanted.split()) for wanted in resources.device_model.split("|"))


def has_labels(resources: Resources, labels: Labels) -> bool:
    """Whether a node with these labels will do."""
    return set(resources.labels) <= set(labels)
