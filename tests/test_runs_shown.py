"""How a run shows itself: what is known of it, in text and HTML, whatever state its folder is in."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser

import pytest
import torch

from bagssl import data, runs
from bagssl.config import PretrainConfig
from bagssl.errors import Stopped
from bagssl.pretraining import pretrain

SMALL = PretrainConfig(epochs=0.5, batch_size=32, size=8, width=8, views=2, projector_hidden=16, projector_dim=8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    images = data.subset(data.load("synthetic", "test"), 256)
    return pretrain(SMALL, images, tmp_path_factory.mktemp("runs"), progress=False)


@pytest.fixture
def run(finished, tmp_path):
    """A copy that a test may damage."""
    return runs.Run(shutil.copytree(finished.path, tmp_path / finished.path.name))


def words(html: str) -> str:
    """The text of the HTML; its tags must nest."""
    text, opened = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            opened.extend([tag] * (tag != "br"))

        def handle_endtag(self, tag):
            assert opened.pop() == tag

        def handle_data(self, found):
            text.append(found)

    Reader().feed(html)
    assert not opened
    return "\n".join(text)


def test_a_finished_run_says_what_was_trained_and_how_it_ended(finished, monkeypatch):
    shown, metrics = words(finished._repr_html_()), finished.metrics
    assert "synthetic, tcr, patch-based, seed 0" in shown and finished.path.name in shown
    assert f"finished: {metrics['crops']:,} crops in {metrics['seconds']:,.0f} s, " in shown
    assert all(f"{name} {value:.4g}" in shown for name, value in metrics["final"].items())
    assert repr(finished).startswith(f"<Run {finished.path.name}: finished: ") and "\n" not in repr(finished)
    assert f"loss {metrics['final']['loss']:.4g}, " in repr(finished)
    monkeypatch.setenv("BAGSSL_COMMITTED", "1")  # by `bagssl notebooks`: trained anew, it shows the same
    assert f"finished: {metrics['crops']:,} crops, " in words(finished._repr_html_())


def test_the_curve_has_a_point_per_row_of_the_history_and_needs_no_script(finished):
    html = finished._repr_html_()
    (points,) = re.findall(r'points="([^"]+)"', html)
    places = [tuple(map(float, place.split(","))) for place in points.split()]
    losses = [row["loss"] for row in finished.history]
    assert len(places) == len(losses) > 2
    heights = [y for _, y in places]
    assert heights.index(min(heights)) == losses.index(max(losses)), "up is more"
    assert "<script" not in html and "http" not in html and html == finished._repr_html_()


def test_an_unfinished_run_says_how_far_it_is(tmp_path):
    images = data.subset(data.load("synthetic", "test"), 256)
    with pytest.raises(Stopped):
        pretrain(SMALL, images, tmp_path, time_limit=0, progress=False)
    (run,) = runs.list_runs(tmp_path)
    step = torch.load(run.path / "checkpoint.pt", weights_only=True)["step"]
    assert f"saved at step {step} of 4" in repr(run) and "finished" not in repr(run)
    for rows in ([{"step": "one", "loss": 1.0}] * 2, [{"step": [], "loss": None}] * 2, 3):
        torch.save({"step": 1, "history": rows}, run.path / "checkpoint.pt")
        assert "saved at step 1" in repr(run) and "polyline" not in run._repr_html_()
    (run.path / "checkpoint.pt").write_bytes(b"half")
    assert "its checkpoint cannot be read" in repr(run)
    (run.path / "checkpoint.pt").unlink()
    assert "not started" in repr(run) and "not started" in words(run._repr_html_())


RECORD = ["config.json", "metrics.json", "provenance.json", "history.csv", "weights.safetensors"]
DAMAGE = [None, b"", b"[]", b'{"config": 1, "final": {"loss": [1]}, "hardware": 3}', b"\xff\n\xff", b"loss\nx"]


@pytest.mark.parametrize("name", RECORD)
@pytest.mark.parametrize("content", DAMAGE)
def test_a_damaged_record_takes_nothing_else_away(run, name, content):
    (run.path / name).unlink() if content is None else (run.path / name).write_bytes(content)
    shown = words(run._repr_html_())
    assert run.path.name in shown and run.path.name in repr(run)
    assert ("synthetic, tcr" in shown) == (name != "config.json")
    if name != "metrics.json":
        assert " crops" in repr(run)


def test_a_folder_that_is_gone_is_said_to_be(run):
    shutil.rmtree(run.path)
    assert repr(run) == f"<Run {run.path.name}: its folder is gone>" and "gone" in words(run._repr_html_())


def test_losses_that_are_not_finite_leave_the_curve(run):
    header, *rows = (run.path / "history.csv").read_text().splitlines()
    place = header.split(",").index("loss")
    for row, value in enumerate(("nan", "inf")):
        cells = rows[row].split(",")
        rows[row] = ",".join([*cells[:place], value, *cells[place + 1 :]])
    (run.path / "history.csv").write_text("\n".join([header, *rows, ""]))
    runs.write_json(run.path / "metrics.json", {**run.metrics, "history_sha256": None})  # as it might have been trained
    assert "nan" not in run._repr_html_() and "polyline" in run._repr_html_()


def test_nothing_in_a_record_is_markup(run):
    content = runs.read_json(run.path / "config.json")
    content["config"]["dataset"] = "<script>alert(1)</script>\n&"
    runs.write_json(run.path / "config.json", content)
    assert "<script" not in run._repr_html_() and "<script>alert(1)</script> &" in words(run._repr_html_())
