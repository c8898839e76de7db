"""Tables say what the frame says, in every form; nothing of the paper is made up."""

from __future__ import annotations

import re
from html import unescape

import numpy as np
import pandas as pd
import pytest

from bagssl.errors import InputError
from bagssl.study import tables


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


def test_comparison_table_has_each_arm_once_and_one_bold_cell_per_probe_and_objective():
    table = tables.comparison_table(frame())
    assert list(table.columns) == ["centre crop", "K = 1", "K = 16"]
    assert table.loc[("Linear probe", "TCR", "patch-based")].tolist() == ["55.0 ± 0.2", "50.0 ± 0.2", "62.0 ± 0.2"]
    assert table.loc[("kNN", "TCR", "multi-scale"), "centre crop"] == "56.0 ± 0.2"
    bold = table.map(lambda text: isinstance(text, tables.Bold))
    assert bold.loc[("Linear probe", "TCR", "patch-based")].tolist() == [False, False, True]
    assert bold.to_numpy().sum() == 4  # two probes, two objectives
    assert not bold.xs("untrained", level="training").to_numpy().any()  # though it is best, at 70


def test_what_was_not_measured_is_a_dash_and_one_seed_has_no_deviation():
    rows = frame()
    rows = rows[~((rows["k"] == 1) & (rows["objective"] == "simclr"))].assign(accuracy_std=float("nan"))
    table = tables.comparison_table(rows)
    assert table.loc[("kNN", "SimCLR", "patch-based"), "K = 1"] == "–"
    assert table.loc[("kNN", "SimCLR", "patch-based"), "K = 16"] == "52.0"


def test_the_untrained_encoder_is_shown_once_whatever_objective_it_is_listed_under():
    rows = frame()
    untrained = rows[rows["training"] == "untrained"]
    copies = pd.concat([rows[rows["training"] != "untrained"], untrained.assign(objective="tcr"),
                        untrained.assign(objective="simclr")])
    pd.testing.assert_frame_equal(tables.comparison_table(copies), tables.comparison_table(rows))


def test_csv_is_the_truth_and_markdown_and_latex_show_the_table(tmp_path):
    rows = frame()
    tables.write_table(rows, tmp_path, "c2", tables.comparison_table(rows))
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
    assert r"50 \% \& more" in tables.latex(table) and r"a\_b" in tables.latex(table)
    assert r"x\|y" in tables.markdown(table)


def test_floats_of_a_column_have_the_same_decimals():
    table = pd.DataFrame({"a": [36.0, -33.52, np.nan], "b": [1.0, 2.0, 3.0], "c": ["x", 0.5, -0.001], "d": [1, 2, 3]})
    lines = tables.markdown(table).splitlines()
    assert [[word.strip() for word in line.split("|")[1:-1]] for line in lines[2:]] == [
        ["36.00", "1", "x", "1"], ["-33.52", "2", "0.5", "2"], ["–", "3", "0.0", "3"]]
    assert tables.markdown(table.iloc[:0]).count("\n") == 2


def test_a_table_shows_every_cell_as_html_and_stands_alone():
    ours = [tables.Bold("65.0 ± 0.2"), np.nan]
    frame = pd.DataFrame({"<b>name": ["a & b", "</script>"], "ours": ours}, dtype=object)
    shown = tables.Table(frame)
    html = shown._repr_html_()
    cells = [unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", html)]
    assert cells == ["<b>name", "ours", "a & b", "<strong>65.0 ± 0.2</strong>", "</script>", tables.DASH]
    assert html.count("<strong>") == html.count("<script>") == html.count("</script>") == 1
    assert "http" not in html and "import" not in html and html == tables.Table(frame)._repr_html_()
    assert repr(shown) == shown._repr_markdown_() == tables.markdown(frame)


def test_whatever_stands_in_a_cell_stays_in_it():
    frame = pd.DataFrame({"class": ["a\nb", "![i](http://example.org)", "x | y", ""], "n": [1, 2, 3, 4]})
    html = tables.Table(frame)._repr_html_()
    assert html.count("<tr>") == 5 and html.count("<td>") == 8 and "<img" not in html and "<a " not in html
    assert tables.markdown(frame).count("\n") == 6


def test_the_paper_has_one_verified_value_with_its_source():
    values = tables.paper_values()
    assert list(values.columns) == ["artefact", "dataset", "setting", "metric", "value", "source"]
    assert len(values) == 1 and values["value"].item() == 62 and "2206.08954" in values["source"].item()


def test_delta_stands_where_a_value_is_verified_and_only_there(monkeypatch):
    rows = frame()
    empty = tables.with_paper(rows, "Table 1", "cifar10")
    assert empty["paper"].isna().all() and empty["delta"].isna().all()
    assert tables.markdown(empty).count("| –") == 2 * len(rows)
    known = pd.DataFrame([["Table 1", "cifar10", "tcr patch-based k=16 linear h", "top-1 %", 60.5, "page 6"]],
                         columns=tables.paper_values().columns)
    monkeypatch.setattr(tables, "paper_values", lambda: known)
    found = tables.with_paper(rows, "Table 1", "cifar10")
    row = found[found["delta"].notna()]
    assert row[["objective", "training", "k", "probe", "paper", "delta"]].values.tolist() == [
        ["tcr", "patch-based", 16, "linear", 60.5, 1.5]]
    assert tables.with_paper(rows, "Table 1", "cifar100")["paper"].isna().all()


def test_a_feature_that_a_frame_does_not_have_is_refused():
    with pytest.raises(InputError, match="feature 'z'"):
        tables.comparison_table(frame(), feature="z")
