"""Figures for print: one column wide, in type that can be read, nothing cut off; afterwards the figure is as it was."""

from __future__ import annotations

import io
import re
import zlib

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

from bagssl import cli, data, patches
from bagssl.study import figures, prints


def accuracies() -> pd.DataFrame:
    arms = [("tcr", "patch-based"), ("tcr", "multi-scale"), ("simclr", "patch-based"), ("none", "untrained")]
    return pd.DataFrame([
        {"objective": objective, "training": training, "k": k, "probe": probe, "feature": "h", "seeds": 1,
         "accuracy_mean": 40 + at + 4 * np.log2(k + 1), "accuracy_std": np.nan}
        for at, (objective, training) in enumerate(arms) for k in (0, 1, 4, 16, 64) for probe in ("linear", "knn")
    ])  # fmt: skip


def side_by_side():
    return figures.accuracy_against_k(accuracies())


def pictures():
    images = data.load("synthetic", "test").pixels[:3]
    generator = torch.Generator().manual_seed(0)
    boxes = patches.evaluation_boxes(6, 3, *images.shape[2:], 0.2, generator).transpose(0, 1)
    return figures.patch_figure(images, boxes)


def one_plot():
    figure, axis = plt.subplots(figsize=(7, 3.2))
    axis.plot([1, 2, 3], label="a model")
    axis.set(xlabel="crops seen", ylabel="accuracy (%)", title="TCR, bag of many patches, linear probe")
    axis.legend()
    return figure


def two_rows():
    figure, axes = plt.subplots(2, 2, figsize=(7, 5), sharex=True, sharey="row")
    for axis in axes.flat:
        axis.plot([1, 2], label="embedding h")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def drawn(figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=60, metadata={"Software": None})
    return stream.getvalue()


@pytest.mark.parametrize("make", [side_by_side, pictures, one_plot, two_rows])
def test_for_one_column_a_figure_is_set_anew_and_is_then_as_it_was(make):
    figures.style()
    figure = make()
    before = drawn(figure)
    with prints.narrowed(figure):
        inside = drawn(figure)
        renderer, (width, height) = figure.canvas.get_renderer(), figure.get_size_inches() * figure.dpi
        assert figure.get_size_inches()[0] == prints.WIDTHS["single"] and inside != before
        shown = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
        assert min((text.get_fontsize() for text in shown), default=prints.SMALL) >= prints.SMALL
        box = figure.get_tightbbox(renderer)
        assert box.x0 * figure.dpi > -2 and box.x1 * figure.dpi < width + 2, "cut off at a side"
        assert box.y0 * figure.dpi > -2 and box.y1 * figure.dpi < height + 2, "cut off above or below"
        if make is side_by_side:
            left, right = figure.axes
            assert left.get_position().y0 > right.get_position().y1  # below each other, each with its labels
            assert right.get_ylabel() == left.get_ylabel() == "accuracy (%)"
            assert any(label.get_visible() and label.get_text() for label in right.get_yticklabels())
    assert drawn(figure) == before
    plt.close(figure)


def record(tmp_path, monkeypatch, asked: str = "1"):
    monkeypatch.setenv("BAGSSL_PRINT", asked)
    monkeypatch.setenv("BAGSSL_RESULTS", str(tmp_path / "results"))
    monkeypatch.chdir(tmp_path)
    figures.style()
    figures.save_figure(side_by_side(), tmp_path / "results" / "laptop" / "patch-scale-cifar10", "curve")


def width_and_fonts(path) -> tuple[float, int, int]:
    """Of a PDF: points across, and of how many fonts it holds the outlines."""
    content = path.read_bytes()
    parts = content + b"".join(map(_inflated, re.findall(rb"stream\r?\n(.*?)endstream", content, flags=re.DOTALL)))
    (box,) = set(re.findall(rb"/MediaBox \[\s*0 0 ([\d.]+)", parts))
    return float(box), parts.count(b"/FontFile2"), parts.count(b"/Type /FontDescriptor")


def _inflated(stream: bytes) -> bytes:
    try:
        return zlib.decompress(stream)
    except zlib.error:
        return b""


def test_the_command_copies_what_the_record_has(tmp_path, monkeypatch, capsys):
    record(tmp_path, monkeypatch)
    for words, points in (([], 504), (["--width", "single"], 252)):
        assert cli.main(["figures", "patch-scale-cifar10", *words, "--to", "print"]) == 0
        (path,) = capsys.readouterr().out.split()
        width, embedded, fonts = width_and_fonts(tmp_path / path)
        assert width == points and embedded == fonts > 0
    assert cli.main(["figures", "patch-scale-cifar10", "--format", "png"]) == 0
    assert capsys.readouterr().out.split() == ["figures/patch-scale-cifar10-curve.png"]


@pytest.mark.parametrize(("words", "says"), [
    (["nothing"], "unknown experiment"), (["patch-scale-cifar10", "--width", "triple"], "unknown width"),
    (["patch-scale-cifar10", "--format", "gif"], "unknown format"),
    (["patch-scale-cifar10", "--format", "png", "--width", "single"], "as pdf alone"),
    (["patch-scale"], "has no profile laptop"), (["convergence-cifar10"], "bagssl reproduce convergence-cifar10"),
])  # fmt: skip
def test_what_is_not_there_is_one_line(tmp_path, monkeypatch, capsys, words, says):
    record(tmp_path, monkeypatch)
    assert cli.main(["figures", *words]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not (tmp_path / "figures").exists()


def test_only_records_have_figures_of_single_width(tmp_path, monkeypatch):
    record(tmp_path, monkeypatch, asked="")
    assert [path.name for path in (tmp_path / "results").rglob("*.pdf")] == ["curve.pdf"]
