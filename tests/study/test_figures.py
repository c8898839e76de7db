"""Tables say what the frame says; files are the same bytes twice; nothing of the paper is made up."""

from __future__ import annotations

import io
import re
from html import unescape

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from bagssl.errors import InputError
from bagssl.study import figures


def frame() -> pd.DataFrame:
    """Patch-based TCR rises from 50 to 62 with K; multi-scale is best, 61, on its centre crop."""
    rows = []
    for objective, training, values in [
        ("tcr", "patch-based", (55.0, 50.0, 62.0)), ("tcr", "multi-scale", (61.0, 45.0, 58.0)),
        ("simclr", "patch-based", (50.0, 48.0, 57.0)), ("none", "untrained", (30.0, 28.0, 70.0)),
    ]:  # fmt: skip
        for probe in ("linear", "knn"):
            for k, value in zip((0, 1, 16), values, strict=True):
                rows.append({"objective": objective, "training": training, "k": k, "probe": probe, "feature": "h",
                             "accuracy_mean": value - 5 * (probe == "knn"), "accuracy_std": 0.25, "seeds": 2})
    return pd.DataFrame(rows)


@pytest.fixture(autouse=True)
def styled():
    """The one style, until the test ends: it is of the process."""
    with plt.rc_context():
        figures.style()
        yield


def test_comparison_table_has_each_arm_once_and_one_bold_cell_per_probe_and_objective():
    table = figures.comparison_table(frame())
    assert list(table.columns) == ["centre crop", "K = 1", "K = 16"]
    assert table.loc[("Linear probe", "TCR", "patch-based")].tolist() == ["55.0 ± 0.2", "50.0 ± 0.2", "62.0 ± 0.2"]
    assert table.loc[("kNN", "TCR", "multi-scale"), "centre crop"] == "56.0 ± 0.2"
    bold = table.map(lambda text: isinstance(text, figures.Bold))
    assert bold.loc[("Linear probe", "TCR", "patch-based")].tolist() == [False, False, True]
    assert bold.to_numpy().sum() == 4  # two probes, two objectives
    assert not bold.xs("untrained", level="training").to_numpy().any()  # though it is best, at 70


def test_what_was_not_measured_is_a_dash_and_one_seed_has_no_deviation():
    rows = frame()
    rows = rows[~((rows["k"] == 1) & (rows["objective"] == "simclr"))].assign(accuracy_std=float("nan"))
    table = figures.comparison_table(rows)
    assert table.loc[("kNN", "SimCLR", "patch-based"), "K = 1"] == "–"
    assert table.loc[("kNN", "SimCLR", "patch-based"), "K = 16"] == "52.0"


def test_the_untrained_encoder_is_shown_once_whatever_objective_it_is_listed_under():
    rows = frame()
    untrained = rows[rows["training"] == "untrained"]
    copies = pd.concat([rows[rows["training"] != "untrained"], untrained.assign(objective="tcr"),
                        untrained.assign(objective="simclr")])
    pd.testing.assert_frame_equal(figures.comparison_table(copies), figures.comparison_table(rows))


def test_csv_is_the_truth_and_markdown_and_latex_show_the_table(tmp_path):
    rows = frame()
    figures.write_table(rows, tmp_path, "c2", figures.comparison_table(rows))
    read = pd.read_csv(tmp_path / "tables" / "c2.csv")
    assert list(read.columns) == list(rows.columns)
    np.testing.assert_allclose(read["accuracy_mean"], rows["accuracy_mean"])
    text = (tmp_path / "tables" / "c2.md").read_text()
    lines = text.splitlines()
    assert "**62.0 ± 0.2**" in text and len(lines) == 2 + 8 and len({line.count("|") for line in lines}) == 1
    tex = (tmp_path / "tables" / "c2.tex").read_text()
    assert r"\textbf{62.0 $\pm$ 0.2}" in tex and tex.count(r"\\") == 9 and "–" not in tex


def test_latex_and_markdown_escape():
    table = pd.DataFrame({"a_b": ["50 % & more", "x|y"]})
    assert r"50 \% \& more" in figures.latex(table) and r"a\_b" in figures.latex(table)
    assert r"x\|y" in figures.markdown(table)


def test_floats_of_a_column_have_the_same_decimals():
    table = pd.DataFrame({"a": [36.0, -33.52, np.nan], "b": [1.0, 2.0, 3.0], "c": ["x", 0.5, -0.001], "d": [1, 2, 3]})
    lines = figures.markdown(table).splitlines()
    assert [[word.strip() for word in line.split("|")[1:-1]] for line in lines[2:]] == [
        ["36.00", "1", "x", "1"], ["-33.52", "2", "0.5", "2"], ["–", "3", "0.0", "3"]]
    assert figures.markdown(table.iloc[:0]).count("\n") == 2


def test_a_table_shows_every_cell_as_html_and_stands_alone():
    ours = [figures.Bold("65.0 ± 0.2"), np.nan]
    frame = pd.DataFrame({"<b>name": ["a & b", "</script>"], "ours": ours}, dtype=object)
    shown = figures.Table(frame)
    html = shown._repr_html_()
    cells = [unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", html)]
    assert cells == ["<b>name", "ours", "a & b", "<strong>65.0 ± 0.2</strong>", "</script>", figures.DASH]
    assert html.count("<strong>") == html.count("<script>") == html.count("</script>") == 1
    assert "http" not in html and "import" not in html and html == figures.Table(frame)._repr_html_()
    assert repr(shown) == shown._repr_markdown_() == figures.markdown(frame)


def test_whatever_stands_in_a_cell_stays_in_it():
    frame = pd.DataFrame({"class": ["a\nb", "![i](http://example.org)", "x | y", ""], "n": [1, 2, 3, 4]})
    html = figures.Table(frame)._repr_html_()
    assert html.count("<tr>") == 5 and html.count("<td>") == 8 and "<img" not in html and "<a " not in html
    assert figures.markdown(frame).count("\n") == 6


def test_the_paper_has_one_verified_value_with_its_source():
    values = figures.paper_values()
    assert list(values.columns) == ["artefact", "dataset", "setting", "metric", "value", "source"]
    assert len(values) == 1 and values["value"].item() == 62 and "2206.08954" in values["source"].item()


def test_delta_stands_where_a_value_is_verified_and_only_there(monkeypatch):
    rows = frame()
    empty = figures.with_paper(rows, "Table 1", "cifar10")
    assert empty["paper"].isna().all() and empty["delta"].isna().all()
    assert figures.markdown(empty).count("| –") == 2 * len(rows)
    known = pd.DataFrame([["Table 1", "cifar10", "tcr patch-based k=16 linear h", "top-1 %", 60.5, "page 6"]],
                         columns=figures.paper_values().columns)
    monkeypatch.setattr(figures, "paper_values", lambda: known)
    found = figures.with_paper(rows, "Table 1", "cifar10")
    row = found[found["delta"].notna()]
    assert row[["objective", "training", "k", "probe", "paper", "delta"]].values.tolist() == [
        ["tcr", "patch-based", 16, "linear", 60.5, 1.5]]
    assert figures.with_paper(rows, "Table 1", "cifar100")["paper"].isna().all()


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


def test_wrong_frames_are_refused():
    with pytest.raises(InputError, match="feature 'z'"):
        figures.comparison_table(frame(), feature="z")
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
    table = pd.DataFrame([{"objective": objective, "representation": name, "accuracy": value}
                          for objective, values in {"tcr": (50, 60, 65), "moco": (55, 52, 58)}.items()
                          for name, value in zip(("centre crop", "bag", "bags"), values)])  # fmt: skip
    axis = figures.gain_figure(table).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["TCR", "MoCo v3"]
    ends = [line.get_xdata() for line in axis.lines if len(line.get_xdata()) == 2]
    assert sorted(np.concatenate(ends)) == [50, 52, 58, 65]


@pytest.mark.parametrize("representations", [3, 6])
@pytest.mark.parametrize("objectives", [1, 7])
def test_gain_figure_cuts_nothing_off(representations, objectives):
    table = pd.DataFrame([{"objective": f"model {i}", "representation": f"bag of 16, in a way {j}",
                           "accuracy": 50 + i + 2 * j} for i in range(objectives) for j in range(representations)])
    figure = figures.gain_figure(table)
    figure.canvas.draw()
    legend, axis = figure.legends[0].get_window_extent(), figure.axes[0]
    assert 0 <= legend.x0 and legend.x1 <= figure.bbox.width and 0 <= legend.y0
    inside = axis.get_window_extent()
    markers = [axis.transData.transform(line.get_xydata()[0]) for line in axis.lines if line.get_marker() != "None"]
    assert len(markers) == objectives * representations
    assert all(inside.y0 + 5 < y < inside.y1 - 5 for _, y in markers)


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
