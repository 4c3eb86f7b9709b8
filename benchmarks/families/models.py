"""Every row of the table by name, in the groups that docs/support.md shows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from . import attention, encoder_decoder, modes, recurrent, settings, vision, windows, wrappers
from .cases import Case


@dataclass(frozen=True)
class Row:
    """
    One row.

    Attributes:
        group (`str`): Key of `GROUPS`.
        label (`str`): What it is called inside of its group.
        make (`Callable[[], Case]`): Builds it; raises `Missing` where this installation lacks something.
    """

    group: str
    label: str
    make: Callable[[], Case]

    @property
    def about(self) -> dict[str, str]:
        """What the results say of a row beside its cells."""
        return {"group": self.group, "label": self.label}


# Group -> what a label of it gets behind it to be unique among all, and its rows.
GROUPS: Mapping[str, tuple[str, Mapping[str, Callable[[], Case]]]] = {
    "full attention": ("", attention.ROWS),
    "windows or chunks, text within": (", within the window", windows.WITHIN_WINDOW),
    "windows or chunks, text past": (", past the window", windows.PAST_WINDOW),
    "sparse attention, all tokens selected": (", within the selection", windows.WITHIN_SELECTION),
    "sparse attention, few tokens selected": (", past the selection", windows.PAST_SELECTION),
    "recurrent and hybrid": ("", recurrent.ROWS),
    "vision-language, text only": (", text only", vision.TEXT_ONLY),
    "vision-language, with images": (", with images", vision.WITH_IMAGES),
    "encoder-decoder": ("", encoder_decoder.ROWS),
    "wrappers": ("", wrappers.ROWS),
    "modes": ("", modes.ROWS),
    "generation settings": ("", settings.ROWS),
}
ROWS: Mapping[str, Row] = {
    f"{label}{suffix}": Row(group, label, make)
    for group, (suffix, rows) in GROUPS.items()
    for label, make in rows.items()
}
