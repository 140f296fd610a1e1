"""Rules for perturbation labels and cell types, used by `prepare` and by `check`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple
from urllib.parse import quote

_CONTROL_NAMES = frozenset(
    {
        "control",
        "controls",
        "ctrl",
        "dmso",
        "negativecontrol",
        "negctrl",
        "nontarget",
        "nontargeting",
        "nt",
        "ntc",
        "safetargeting",
        "scramble",
        "scrambled",
        "unperturbed",
        "untreated",
        "vehicle",
    }
)
_NUMBERED_CONTROLS = ("nontargeting", "negativecontrol", "negctrl", "safetargeting", "scramble")
_NO_LABELS = frozenset({"", "nan", "none", "null", "na", "n/a", "<na>", "nat"})
# file systems take 255 bytes; the manifest of a part, while it is written, has 32 more than the part
_LONGEST_FILE_NAME = 255 - len("..manifest.json.partial-01234567")
_SEPARATOR = "+"


def plain(label: str) -> str:
    """Return a label in lower case without punctuation."""
    return "".join(letter for letter in label.casefold() if letter.isalnum())


def is_control_name(label: str, control: str) -> bool:
    """Return whether a label looks like another name of the control.

    >>> [is_control_name(label, "non-targeting") for label in ("NTC", "non-targeting_3", "TP53")]
    [True, True, False]
    """
    if label == control:
        return False
    name, own = plain(label), plain(control)
    return name in _CONTROL_NAMES or name == own or name.rstrip("0123456789") in {*_NUMBERED_CONTROLS, own}


def is_no_label(label: str) -> bool:
    """Return whether a label means that there is none: empty, "nan", "None" and the like."""
    return label.strip().casefold() in _NO_LABELS


def file_name(label: str) -> str:
    """Return the name of a label's part file."""
    return f"{quote(label, safe=' +-_.')}.h5ad"


def too_long(label: str) -> str | None:
    """Return why a label cannot name a file, or ``None``."""
    size = len(file_name(label))
    if size <= _LONGEST_FILE_NAME:
        return None
    return f"it is too long for a file name ({size} bytes with escapes, at most {_LONGEST_FILE_NAME})"


class DubiousLabel(NamedTuple):
    """A label that is likely a mistake: why, and the likely intended label ("" if unknown)."""

    label: str
    why: str
    meant: str


def dubious_labels(
    cells: Mapping[str, int], *, control: str | None, are_perts: bool = True, kept: Iterable[str] = ()
) -> list[DubiousLabel]:
    """Return every label that is likely a mistake, in alphabetical order; cell types have no genes and no files."""
    sure = set(kept)
    found: list[DubiousLabel] = []
    # of several spellings the control is right, else the one of the most cells
    order = sorted(cells, key=lambda label: (label != control, -cells[label], label))
    spelling: dict[str, str] = {}
    members: dict[tuple[str, ...], str] = {}
    for label in order:
        stripped = label.strip()
        known = spelling.setdefault(stripped.casefold(), stripped)
        genes = tuple(sorted(gene.strip().casefold() for gene in label.split(_SEPARATOR)))
        same_genes = members.setdefault(genes, label)
        if label in sure or label == control:
            continue
        if is_no_label(label):
            found.append(DubiousLabel(label, "it is no label", ""))
        elif label != stripped:
            found.append(DubiousLabel(label, "it has spaces around it", known))
        elif label != known:
            found.append(DubiousLabel(label, f"it is another case of {known!r}", known))
        elif control is not None and is_control_name(label, control):
            found.append(DubiousLabel(label, f"it is another name for the control {control!r}", control))
        elif are_perts and same_genes != label:
            found.append(DubiousLabel(label, f"it names the same genes as {same_genes!r}", same_genes))
        elif are_perts and (why := too_long(label)):
            found.append(DubiousLabel(label, why, ""))
    return sorted(found)
