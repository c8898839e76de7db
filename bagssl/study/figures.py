"""One plotting style, and the figures that several notebooks draw, of the tidy frames of tables.py."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from bagssl.errors import InputError
from bagssl.paths import write_atomically
from bagssl.study import names, prints
from bagssl.study.tables import of_feature, title

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = {"tcr": "#0072B2", "simclr": "#D55E00", "vicreg": "#009E73", "byol": "#CC79A7", "barlow": "#E69F00",
           "moco": "#56B4E9"}  # fmt: skip
OTHERS = ("#8C564B", "#5B5B9A", "#4D4D4D")
GREY = "#7F7F7F"
LINES = {"patch-based": ("-", "o"), "multi-scale": ((0, (4, 1.5)), "s"), "untrained": ("-", "D")}


def style() -> None:
    """Set the one style of all figures: made for 7 inches of width in print."""
    matplotlib.rcdefaults()  # whatever the reader's own matplotlibrc says
    sns.set_theme(context="paper", style="ticks", rc={
        "figure.figsize": (7, 3.5), "figure.dpi": 110, "figure.constrained_layout.use": True,
        "font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9, "legend.fontsize": 8.5,
        "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E6E6E6",
        "grid.linewidth": 0.6, "axes.edgecolor": "#4D4D4D", "lines.linewidth": 1.6, "lines.markersize": 4.5,
        "legend.frameon": False, "pdf.fonttype": 42, "image.interpolation": "nearest",
        "text.parse_math": False,  # a name is no formula; our own ones: `formulas`
    })  # fmt: skip
    matplotlib.rcParams["font.family"] = ["sans-serif", *names.fallback_fonts()]
    warnings.filterwarnings("ignore", names.MISSING)  # `save_figure` tells it, once
    for library in ("matplotlib.font_manager", "fontTools"):  # of a fallback's missing weights and odd dates
        logging.getLogger(library).setLevel(logging.ERROR)


def formulas(axis: Axis) -> None:
    """Set the label of an x- or y-axis, and its powers of ten, as the formulas that they are."""
    axis.label.set_parse_math(True)
    for tick in (*axis.get_major_ticks(100), *axis.get_minor_ticks(100)):  # more than will be there
        tick.label1.set_parse_math(True)


def colour(objective: str, training: str = "patch-based") -> str:
    """The colour of an objective, the same in every figure; grey for what is untrained."""
    if training == "untrained" or objective == "none" or objective.endswith("untrained"):
        return GREY
    return COLOURS.get(objective) or OTHERS[sum(objective.encode()) % len(OTHERS)]


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write folder/figures/name.png (200 dpi) and .pdf, without a date: same figure, same bytes; for a record one for
    print as well, see prints.py. Letters that no font of `style` has become boxes, of which one line tells.
    """
    with names.missing_letters_told():
        prints.write(figure, folder, name)
        for suffix, undated in (("png", "Software"), ("pdf", "CreationDate")):
            with write_atomically(Path(folder) / "figures" / f"{name}.{suffix}") as path:
                figure.savefig(path, format=suffix, dpi=200, metadata={undated: None})
            figure.set_layout_engine("none")  # as it is laid out now it stays: that takes half of the time


def panels(count: int, across: int = 3, high: float = 3.0, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in rows of `across`, each `high` inches high. options: of `plt.subplots`."""
    rows = -(-count // across)
    figure, axes = plt.subplots(rows, min(count, across), figsize=(7, high * rows), squeeze=False, **options)
    for spare in axes.flat[count:]:
        spare.set_axis_off()
    return figure, list(axes.flat[:count])


def accuracy_against_k(frame: pd.DataFrame, feature: str = "h", heading: str | None = None) -> Figure:
    """Accuracy of a bag against its number of patches K, one panel per probe, one line per arm.

    Centre crops stand left of K = 1; that of a multi-scale encoder, the usual protocol, goes on as a
    dotted line. Bars: standard deviation over seeds or, for one seed, from low to high if the frame has them.
    The heading says what is seen, by default the best arm from its smallest to its largest bag.
    """
    chosen = of_feature(frame, feature)
    ks = sorted(set(chosen["k"]) - {0})
    if not ks:
        raise InputError("accuracy_against_k needs at least one K above 0")
    probes = [probe for probe in ("linear", "knn") if probe in set(chosen["probe"])]
    figure, axes = plt.subplots(1, len(probes), figsize=(7, 3.5), sharey=True, squeeze=False)
    centre = ks[0] / max(2.0, (ks[-1] / ks[0]) ** 0.18)  # left of the smallest K, by a fixed part of the axis
    handles: dict[str, Any] = {}
    for axis, probe in zip(axes[0], probes, strict=True):
        arms = chosen[chosen["probe"] == probe].groupby(["objective", "training"], sort=False)
        for (objective, training), arm in arms:
            label = "untrained" if training == "untrained" else f"{title(objective)}, {training}"
            handles.setdefault(label, _draw_arm(axis, arm, centre, colour(objective, training), training))
        axis.set_xscale("log", base=2)
        axis.set_xticks([centre, *ks], ["centre\ncrop", *map(str, ks)])
        axis.minorticks_off()
        margin = (ks[-1] / centre) ** 0.06
        axis.set_xlim(centre / margin, ks[-1] * margin)
        axis.grid(False, axis="x")
        axis.set(xlabel="K, patches in the bag", title=title(probe))
    axes[0][0].set_ylabel("accuracy (%)")
    if ((chosen["training"] == "multi-scale") & (chosen["k"] == 0)).any():
        handles["multi-scale, centre crop"] = Line2D([], [], color="#4D4D4D", linestyle=":", linewidth=1.2)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(handles)))
    figure.suptitle(heading or _heading(chosen), x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure


def _errors(rows: pd.DataFrame, mean: str = "accuracy_mean") -> np.ndarray:
    both = np.stack([rows["accuracy_std"], rows["accuracy_std"]]).astype(float)
    if {"low", "high"} <= set(rows.columns):
        interval = np.stack([rows[mean] - rows["low"], rows["high"] - rows[mean]])
        both = np.where(np.isnan(both), interval.astype(float), both)
    return np.nan_to_num(both)


def _draw_arm(axis: Axes, arm: pd.DataFrame, centre: float, tint: str, training: str):
    """The line of an arm's bags, and its centre crop at `centre` on the axis of K; what the legend shows of it."""
    arm, (line, marker) = arm.sort_values("k"), LINES.get(training, ("-", "o"))
    bags, crop = arm[arm["k"] > 0], arm[arm["k"] == 0]
    fill = "white" if training == "multi-scale" else tint
    looks = {"color": tint, "marker": marker, "markerfacecolor": fill, "capsize": 2, "elinewidth": 1}
    drawn = axis.errorbar(bags["k"], bags["accuracy_mean"], _errors(bags), linestyle=line, **looks)
    if len(crop):
        axis.errorbar([centre], crop["accuracy_mean"], _errors(crop), linestyle="none", **looks)
    if len(crop) and training == "multi-scale":
        axis.axhline(crop["accuracy_mean"].iloc[0], color=tint, linestyle=":", linewidth=1.2, zorder=1)
    return drawn


def _heading(frame: pd.DataFrame) -> str:
    """What is seen: the arm that is best with the largest bag, from one patch to all."""
    trained = frame[(frame["k"] > 0) & (frame["training"] != "untrained")]
    trained = trained if len(trained) else frame[frame["k"] > 0]
    largest = trained[trained["k"] == trained["k"].max()]
    best = largest.loc[largest["accuracy_mean"].idxmax()]
    arm = ["objective", "training", "probe"]
    own = trained[(trained[arm] == best[arm]).all(axis=1)]
    first = own.loc[own["k"].idxmin()]
    one, many = (f"{row['accuracy_mean']:.1f} % with K = {row['k']}" for row in (first, best))
    probe = title(best["probe"]).replace("Linear", "linear")
    return f"{title(best['objective'])}, {best['training']}: {one}, {many} ({probe})"


def accuracy_curves(axis: Axes, frame: pd.DataFrame, x: str, by: str, label: str) -> None:
    """Accuracy against the column `x` on a logarithmic axis, one line per value of `by`, from light to dark.

    Bars as in `accuracy_against_k`; `label` is a format such as "K = {}".
    """
    values = sorted(frame[by].unique())
    for value, tint in zip(values, sns.color_palette("crest", len(values)), strict=True):
        rows = frame[frame[by] == value].sort_values(x)
        axis.errorbar(rows[x], rows["accuracy_mean"], _errors(rows), color=tint, marker="o", capsize=2,
                      elinewidth=1, label=label.format(value))  # fmt: skip
    axis.set_xscale("log")
    axis.set_xticks(sorted(frame[x].unique()), [f"{value:,g}" for value in sorted(frame[x].unique())])
    axis.minorticks_off()
    axis.set_ylabel("accuracy (%)")


def accuracy_against_scale(frame: pd.DataFrame) -> Figure:
    """Accuracy over patch scale and K: as a heat map, and as curves against the scale with the untrained encoder.

    frame: rows of `comparison.over_seeds` of one objective, probe and feature, with a column `scale`.
    """
    trained, untrained = (frame[(frame["training"] == "untrained") == flag] for flag in (False, True))
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.2), width_ratios=(1, 1.15))
    grid = trained.pivot(index="k", columns="scale", values="accuracy_mean").sort_index(ascending=False)
    sns.heatmap(grid, ax=left, cmap="crest", annot=True, fmt=".1f", cbar=False, linewidths=1)
    left.set(xlabel="patch scale (share of the area)", ylabel="K, patches in the bag", title="accuracy (%)")
    accuracy_curves(right, trained, "scale", "k", "K = {}")
    largest = untrained["k"].max()
    floor = untrained[untrained["k"] == largest].sort_values("scale")
    right.plot(floor["scale"], floor["accuracy_mean"], color=GREY, marker="D", label=f"untrained, K = {largest}")
    right.set(xlabel="patch scale (share of the area)")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def gain_figure(frame: pd.DataFrame) -> Figure:
    """A line per objective from the accuracy of its centre crop to those of its bags.

    frame: columns objective, representation, accuracy, accuracy_std, low, high; the first representation is the line's
    start. Bars as in `accuracy_against_k`.
    """
    markers = dict(zip(frame["representation"].unique(), "osD^vP", strict=False))
    few, count = len(markers) <= 3, frame["objective"].nunique()
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.42 * count if few else 1.1 + 0.6 * count))
    aside = dict(zip(markers, np.linspace(-0.3, 0.3, len(markers)) * (not few), strict=True))  # many may be close
    for row, (objective, rows) in enumerate(frame.groupby("objective", sort=False)):
        tint = colour(objective)
        axis.plot([rows["accuracy"].min(), rows["accuracy"].max()], [row, row], color=tint, lw=4, alpha=0.25, zorder=1)
        errors = _errors(rows, "accuracy").T[:, :, None]
        for name, value, bars in zip(rows["representation"], rows["accuracy"], errors, strict=True):
            fill = "white" if markers[name] == "o" else tint
            looks = {"color": tint, "ms": 7, "mfc": fill, "elinewidth": 1, "capsize": 2.5}
            axis.errorbar(value, row + aside[name], xerr=bars, fmt=markers[name], **looks)
    axis.set_yticks(range(count), [title(name) for name in frame["objective"].unique()])
    axis.set(ylim=(count - 0.5, -0.5), xlabel="accuracy (%)")
    keys = [Line2D([], [], color="#4D4D4D", marker=marker, linestyle="none", label=name,
                   markerfacecolor="white" if marker == "o" else "#4D4D4D") for name, marker in markers.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=3)
    return figure


def difference_figure(frame: pd.DataFrame, tints: Mapping[str, str], by: str) -> Figure:
    """A row per choice: what it changes against the recipe, in points, with its interval.

    frame: columns choice, points, low, high, and `by`, of whose values `tints` gives the colours.
    """
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.35 * len(frame)))
    axis.axvline(0, color=GREY, linewidth=1)
    for (kind, rows) in frame.reset_index(drop=True).groupby(by, sort=False):
        bars = [rows["points"] - rows["low"], rows["high"] - rows["points"]]
        axis.errorbar(rows["points"], rows.index, xerr=bars, color=tints[kind], fmt="o", capsize=2, label=kind)
    axis.set_yticks(range(len(frame)), [names.short(each, 40) for each in frame["choice"]])
    axis.set(xlabel="difference to the recipe (points)", ylim=(len(frame) - 0.5, -0.5))
    if frame[by].nunique() > 1:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=len(tints))
    return figure


def patch_figure(images: Tensor, boxes: Tensor) -> Figure:
    """Each image with its patches drawn on it, and beside it the patches cut out, framed in the same colour.

    images: uint8 [N,3,H,W]; boxes: int64 [N,K,4] as top, left, height, width in pixels.
    """
    columns = -(-boxes.shape[1] // 2)  # two rows of patches beside each image
    width = 5 / (2.15 + columns)
    figure = plt.figure(figsize=(5, 2.1 * width * len(images)))
    grid = figure.add_gridspec(2 * len(images), 1 + columns, width_ratios=[2.15] + [1] * columns)
    tints = sns.color_palette("colorblind", boxes.shape[1])

    for i, image in enumerate(images):
        whole = picture(figure.add_subplot(grid[2 * i : 2 * i + 2, 0]), image)
        for j, ((top, left, high, wide), tint) in enumerate(zip(boxes[i].tolist(), tints, strict=True)):
            corner, place = (left - 0.5, top - 0.5), grid[2 * i + j // columns, 1 + j % columns]
            whole.add_patch(Rectangle(corner, wide, high, fill=False, color=tint, linewidth=1.8))
            patch = picture(figure.add_subplot(place), image[:, top : top + high, left : left + wide])
            patch.spines[:].set(visible=True, color=tint, linewidth=2.5)
    return figure


# ---- patches in their images


def picture(axis: Axes, pixels: Tensor, box: Sequence[int] | None = None, tint: str = "#FFD400") -> Axes:
    """An image [3, H, W] without axes, and on it a box outlined in dark and bright, seen on any picture; the axis."""
    axis.imshow(pixels.permute(1, 2, 0).cpu().numpy())
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)
    if box is not None:
        top, left, high, wide = map(int, box)
        for width, edge in ((2.6, "black"), (1.3, tint)):
            corner, looks = (left - 0.5, top - 0.5), {"color": edge, "linewidth": width}
            axis.add_patch(Rectangle(corner, wide, high, fill=False, **looks))
    return axis


def gallery(pixels: Tensor, boxes: Tensor | None, kinds: Sequence[Sequence[str]], heading: str) -> Figure:
    """One row per query: the query's image, then its neighbours, nearest first, the patches outlined.

    pixels: uint8 [rows, columns, 3, H, W]; boxes: whole numbers [rows, columns, 4], None where whole images
    are compared; kinds [rows][columns] stand above the images, in bold where a neighbour's is the query's.
    """
    rows, columns = pixels.shape[:2]
    figure, axes = plt.subplots(rows, columns + 1, figsize=(7, 0.32 + rows * 8 / (columns + 0.5)), squeeze=False,
                                width_ratios=[1, 0.15, *[1] * (columns - 1)])  # a gap after the query
    for row in range(rows):
        axes[row, 1].set_axis_off()
        for column, axis in enumerate(axes[row, [0, *range(2, columns + 1)]]):
            box = None if boxes is None else boxes[row, column]
            picture(axis, pixels[row, column], box, "#FFD400" if column else "#56B4E9")
            weight = "bold" if column and kinds[row][column] == kinds[row][0] else "normal"
            axis.set_title(names.short(kinds[row][column]), fontsize=7, loc="center", pad=2, fontweight=weight)
    figure.suptitle(heading, x=0.01, ha="left", fontsize=9.5, fontweight="bold")
    return figure


def similarity_maps(pixels: Tensor, maps: Mapping[str, np.ndarray], box: Sequence[int], step: int) -> Figure:
    """How similar one patch is to each place of some images: the images, then a row per kind of feature.

    pixels: uint8 [N, 3, H, W], of which the first shows the query's `box`; maps: title -> cosines [N, rows,
    columns] at every `step`-th position, drawn where the centres of the patches lie. One scale from -1 to 1.
    """
    count, (high, wide) = len(pixels), pixels.shape[2:]
    figure, axes = plt.subplots(1 + len(maps), count, figsize=(7, 0.2 + 6.3 * (1 + len(maps)) / count), squeeze=False)
    for column, image in enumerate(pixels):
        picture(axes[0, column], image, None if column else box, "#56B4E9")
    for row, (name, each) in enumerate(maps.items(), start=1):
        for column, axis in enumerate(axes[row]):
            grey = pixels[column].float().mean(dim=0, keepdim=True).byte().expand(3, -1, -1)
            picture(axis, grey, None if column else box, "#56B4E9")
            down, across = each[column].shape
            left, top = (np.array((box[3], box[2])) - step - 1) / 2
            extent = (left, left + across * step, top + down * step, top)
            drawn = axis.imshow(each[column], extent=extent, cmap="RdBu_r", vmin=-1, vmax=1, alpha=0.85)
            axis.set(xlim=(-0.5, wide - 0.5), ylim=(high - 0.5, -0.5))
        axes[row, 0].set_ylabel(name)
    figure.colorbar(drawn, ax=axes[1:].ravel().tolist(), shrink=0.8, label="centred cosine")
    return figure
