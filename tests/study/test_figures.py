"""Figures draw what the frame says, cut nothing off, and are the same bytes twice."""

from __future__ import annotations

import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from test_tables import frame

from bagssl.errors import InputError
from bagssl.study import figures


@pytest.fixture(autouse=True)
def styled():
    """The one style, until the test ends: it is of the process."""
    with plt.rc_context():
        figures.style()
        yield


def test_accuracy_against_k_draws_the_numbers_of_the_frame():
    figure = figures.accuracy_against_k(frame())
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["Linear probe", "kNN"]
    drawn = [bar.lines[0].get_xydata().tolist() for bar in figure.axes[0].containers]
    assert [[1, 50.0], [16, 62.0]] in drawn and [[1, 28.0], [16, 70.0]] in drawn
    level = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert [line.get_ydata()[0] for line in level] == [61.0]  # the multi-scale centre crop
    assert figure.get_suptitle() == "TCR, patch-based: 50.0 % with K = 1, 62.0 % with K = 16 (linear probe)"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["TCR, patch-based", "TCR, multi-scale", "SimCLR, patch-based", "untrained",
                      "multi-scale, centre crop"]  # fmt: skip


def test_colour_follows_the_objective_and_grey_is_for_the_untrained():
    assert figures.colour("tcr", "patch-based") == figures.colour("tcr", "multi-scale") != figures.colour("simclr")
    assert figures.colour("tcr", "untrained") == figures.GREY
    assert figures.colour("an objective to come") in figures.OTHERS


def test_one_seed_gets_its_interval_as_bars():
    rows = frame().assign(accuracy_std=float("nan"), low=lambda d: d["accuracy_mean"] - 2,
                          high=lambda d: d["accuracy_mean"] + 1)
    axis = figures.accuracy_against_k(rows).axes[0]
    segment = axis.containers[0].lines[2][0].get_segments()[0]
    np.testing.assert_allclose(segment[:, 1], [48.0, 51.0])


@pytest.mark.parametrize("largest", [16, 1024])
def test_no_text_of_the_figure_overlaps_another(largest):
    figure = figures.accuracy_against_k(frame().replace({"k": {16: largest}}))
    figure.canvas.draw()
    texts = [figure._suptitle, *figure.legends[0].get_texts()]
    for axis in figure.axes:
        low, high = axis.get_ylim()
        inside = [tick for tick in axis.get_yticklabels() if low <= tick.get_position()[1] <= high]
        texts += [axis._left_title, axis.xaxis.label, *axis.get_xticklabels(), *inside]
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    assert len(boxes) > 12
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        figures.save_figure(figures.accuracy_against_k(frame()), tmp_path, name)
    for suffix in ("png", "pdf"):
        one, two = ((tmp_path / "figures" / f"{name}.{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two and b"CreationDate" not in one
    stream = io.BytesIO()  # the control: matplotlib's own choice holds the date
    figures.accuracy_against_k(frame()).savefig(stream, format="pdf")
    assert b"CreationDate" in stream.getvalue()


def test_patch_figure_cuts_what_the_boxes_say():
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).reshape(2, 3, 8, 8)
    boxes = torch.tensor([[[0, 0, 4, 4], [4, 2, 4, 4], [1, 1, 2, 3]]] * 2)
    axes = figures.patch_figure(images, boxes).axes
    assert len(axes) == 2 * 4
    whole, _, second, third = axes[:4]
    np.testing.assert_array_equal(second.images[0].get_array(), images[0, :, 4:8, 2:6].permute(1, 2, 0))
    assert third.images[0].get_array().shape == (2, 3, 3)
    assert [patch.get_xy() for patch in whole.patches] == [(-0.5, -0.5), (1.5, 3.5), (0.5, 0.5)]


def test_a_frame_without_bags_is_refused():
    with pytest.raises(InputError, match="K above 0"):
        figures.accuracy_against_k(frame().query("k == 0"))


def test_scale_figure_shows_every_cell_and_line():
    scales = (0.06, 0.25, 1.0)
    rows = frame()[lambda rows: (rows["probe"] == "linear") & rows["objective"].isin(["tcr", "none"])
                   & (rows["training"] != "multi-scale") & (rows["k"] > 0)]  # fmt: skip
    table = pd.concat([rows.assign(scale=scale, accuracy_mean=rows["accuracy_mean"] + 10 * scale) for scale in scales])
    heat, curves = figures.accuracy_against_scale(table).axes
    shown = [text.get_text() for text in heat.texts]
    assert shown == ["62.6", "64.5", "72.0", "50.6", "52.5", "60.0"]  # K = 16 above K = 1
    drawn = {label: container.lines[0].get_ydata().tolist()
             for label, container in zip(curves.get_legend_handles_labels()[1][1:], curves.containers, strict=True)}
    assert drawn == {"K = 1": [50.6, 52.5, 60.0], "K = 16": [62.6, 64.5, 72.0]}
    floor = next(line for line in curves.lines if line.get_label() == "untrained, K = 16")
    assert floor.get_ydata().tolist() == [70.6, 72.5, 80.0]


def test_gain_figure_has_a_line_per_objective_from_the_lowest_to_the_highest():
    values = {"tcr": (50, 60, 65), "moco": (55, 52, 58)}
    table = pd.DataFrame([{"objective": objective, "representation": name, "accuracy": value, "accuracy_std": np.nan,
                           "low": value - 2, "high": value + 1} for objective, each in values.items()
                          for name, value in zip(("centre crop", "bag", "bags"), each)])  # fmt: skip
    axis = figures.gain_figure(table).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["TCR", "MoCo v3"]
    ends = [line.get_xdata() for line in axis.lines if len(line.get_xdata()) == 2]
    assert sorted(np.concatenate(ends)) == [50, 52, 58, 65]
    bars = [container.lines[2][0].get_segments()[0][:, 0].tolist() for container in axis.containers]
    assert bars[:3] == [[48, 51], [58, 61], [63, 66]]


@pytest.mark.parametrize("representations", [3, 6])
@pytest.mark.parametrize("objectives", [1, 7])
def test_gain_figure_cuts_nothing_off(representations, objectives):
    table = pd.DataFrame([{"objective": f"model {i}", "representation": f"bag of 16, in a way {j}",
                           "accuracy": 50 + i + 2 * j, "accuracy_std": 1.0}
                          for i in range(objectives) for j in range(representations)])
    figure = figures.gain_figure(table)
    figure.canvas.draw()
    legend, axis = figure.legends[0].get_window_extent(), figure.axes[0]
    assert 0 <= legend.x0 and legend.x1 <= figure.bbox.width and 0 <= legend.y0
    inside = axis.get_window_extent()
    markers = [axis.transData.transform(line.get_xydata()[0]) for line in axis.lines if line.get_marker() in "osD^vP"]
    assert len(markers) == objectives * representations
    assert all(inside.y0 + 5 < y < inside.y1 - 5 for _, y in markers)


def test_differences_stand_by_their_choice_with_their_interval_in_the_colour_of_their_kind():
    table = pd.DataFrame({"choice": ["two views", "z", "no colour"], "points": [-8.0, 1.0, -2.0],
                          "low": [-9.0, 0.5, -3.0], "high": [-7.5, 2.0, -1.0], "where": ["train", "eval", "train"]})
    tints = {"train": "#0072B2", "eval": "#000000"}
    figure = figures.difference_figure(table.set_index(pd.Index([4, 5, 6])), tints, "where")
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == list(table["choice"])
    drawn = {each.get_label(): each for each in axis.containers}
    points, _, (bars,) = drawn["train"].lines
    assert points.get_xydata().tolist() == [[-8, 0], [-2, 2]] and points.get_color() == tints["train"]
    assert [bar[:, 0].tolist() for bar in bars.get_segments()] == [[-9, -7.5], [-3, -1]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["train", "eval"]
    assert not figures.difference_figure(table[table["where"] == "train"], tints, "where").legends


@pytest.mark.parametrize("name, value", [
    ("text.usetex", True), ("savefig.transparent", True), ("axes.xmargin", 0.4), ("font.family", ["serif"]),
    ("savefig.bbox", "tight"), ("path.sketch", (1, 100, 2))])  # fmt: skip
def test_the_style_is_the_same_whatever_matplotlibrc_says(name, value):
    figures.style()
    ours = dict(matplotlib.rcParams)
    matplotlib.rcParams[name] = value
    assert dict(matplotlib.rcParams) != ours
    figures.style()
    assert dict(matplotlib.rcParams) == ours
