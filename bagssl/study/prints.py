"""Figures for print: of each that is 7 inches wide, two columns of a journal, one that is set anew for one column."""

import contextlib
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.legend import Legend
from matplotlib.text import Text

from bagssl.errors import InputError, check_choice
from bagssl.paths import write_atomically

WIDTHS = {"double": 7.0, "single": 3.5}  # inches
HIGH = 2.3  # inches of a panel, where panels that stood side by side come to stand below each other
SMALL = 6.0  # points of the smallest type
LINE = 48  # letters of a title


def write(figure: Figure, folder: Path, name: str) -> None:
    """Write folder/figures/name-single.pdf where $BAGSSL_PRINT asks for it, as the batch does for records."""
    if os.environ.get("BAGSSL_PRINT"):
        path = Path(folder) / "figures" / f"{name}-single.pdf"
        with narrowed(figure), write_atomically(path) as temporary:
            figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})


def copies(record: Path, to: Path, suffix: str = "pdf", width: str = "double") -> list[Path]:
    """Copy the figures that a record holds, as pdf or png, 7 inches wide or, as pdf, 3.5; where they are now.

    Raises InputError for another suffix or width, or when the record has no such figures.
    """
    check_choice("format", suffix, ("pdf", "png"))
    check_choice("width", width, WIDTHS)
    if suffix == "png" and width == "single":
        raise InputError("figures of single width are there as pdf alone")
    found = [path for path in sorted((record / "figures").glob(f"*.{suffix}"))
             if path.stem.endswith("-single") == (width == "single")]  # fmt: skip
    if not found:
        raise InputError(f"{record} has no figures as {suffix} of {width} width; `bagssl reproduce {record.name} "
                         f"--profile {record.parent.name}` makes them (single: in laptop and paper)")  # fmt: skip
    for path in found:
        with write_atomically(to / f"{record.name}-{path.name}") as temporary:
            temporary.write_bytes(path.read_bytes())
    return [to / f"{record.name}-{path.name}" for path in found]


@contextlib.contextmanager
def narrowed(figure: Figure) -> Iterator[Figure]:
    """Within it the figure is set for one column: plots that stood side by side stand below each other, with their
    own labels; pictures stay side by side, smaller. No type is smaller than SMALL. Afterwards it is as it was.
    """
    wide, engine, panels = figure.get_size_inches().copy(), figure.get_layout_engine(), _panels(figure)
    texts = {text: (text.get_text(), text.get_fontsize()) for text in figure.findobj(Text)}
    before = [(axis, axis.get_subplotspec(), axis.yaxis.get_tick_params().get("labelleft", True)) for axis in panels]
    small = figure.axes and (panels or len(figure.axes) == 1) and not figure.axes[0].images
    with contextlib.ExitStack() as stack:
        for legend in figure.legends:
            stack.enter_context(_two_columns(legend))
        stack.callback(_restore, figure, wide, engine, texts, before)
        figure.set_layout_engine("constrained")
        for text, (words, points) in texts.items():
            text.set_fontsize(max(min(points, SMALL), points * (0.85 if small else 0.7)))
            if text is figure._suptitle:
                text.set_text(textwrap.fill(words, LINE))
        for axis, place in zip(panels, GridSpec(max(1, len(panels)), 1, figure=figure), strict=False):
            axis.set_subplotspec(place)
            axis.tick_params("y", labelleft=True)
            axis.set_ylabel(axis.get_ylabel() or panels[0].get_ylabel())
        figure.set_size_inches(WIDTHS["single"], HIGH * len(panels) or wide[1] * (0.7 if small else 0.55))
        yield figure


def _restore(figure: Figure, wide: Any, engine: Any, texts: Mapping[Text, tuple[str, float]],
             before: Sequence[tuple[Axes, Any, bool]]) -> None:  # fmt: skip
    for axis, place, labelled in before:
        axis.set_subplotspec(place)
        axis.tick_params("y", labelleft=labelled)
    for text, (words, points) in texts.items():
        text.set(text=words, fontsize=points)
    figure.set_size_inches(wide)
    figure.set_layout_engine(engine or "none")


@contextlib.contextmanager
def _two_columns(legend: Legend) -> Iterator[None]:
    """Within it a legend of more columns has two: matplotlib lays it out once, when it is made."""
    box = legend._legend_handle_box
    columns = box._children
    before = [list(column._children) for column in columns]
    items = [item for each in before for item in each]
    if len(columns) > 2:
        half = -(-len(items) // 2)
        box._children, columns[0]._children, columns[1]._children = columns[:2], items[:half], items[half:]
    try:
        yield
    finally:
        box._children = columns
        for column, each in zip(columns, before, strict=True):
            column._children = each


def _panels(figure: Figure) -> list[Axes]:
    """Plots of one row, which can stand below each other; none where pictures are among them, or more rows."""
    places = [axis.get_subplotspec() for axis in figure.axes]
    if len(places) < 2 or None in places or any(axis.images or not axis.axison for axis in figure.axes):
        return []
    return figure.axes if {place.get_gridspec().nrows for place in places} == {1} else []
