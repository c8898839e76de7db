"""A live line where someone looks, nothing in a log file, and never a word too many at the end."""

from __future__ import annotations

import io
import itertools
import re
import sys
import time
from types import SimpleNamespace

import pytest

from bagssl import progress
from bagssl.progress import in_notebook, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_file_gets_nothing(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar(100, 0, "train") as update:
        update(50, "loss 0.5")
    assert log.getvalue() == ""


def test_a_terminal_sees_the_share_and_the_note_and_is_cleared(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(100, 25, "train") as update:
        assert "train:  25%" in terminal.getvalue()
        time.sleep(0.6)  # tqdm draws at most twice in a second
        update(50, "loss 0.5")
        assert "train:  50%" in terminal.getvalue() and "loss 0.5" in terminal.getvalue()
    assert not terminal.getvalue().rsplit("\r", 2)[1].strip()


@pytest.mark.parametrize("total, enabled", [(0, True), (-1, True), (100, False)])
def test_nothing_to_show_shows_nothing(total, enabled, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(total, 0, "train", enabled) as update:
        update(1)
        update(2, "note")
    assert terminal.getvalue() == ""


@pytest.fixture
def notebook(monkeypatch, tmp_path):
    """A kernel whose displays are recorded; its clock goes on by a second at each look."""
    shown = []

    def display(content, raw, display_id):
        shown.append(content)
        return SimpleNamespace(update=lambda content, raw: shown.append(content))

    ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=True))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    monkeypatch.setenv("BAGSSL_PROGRESS", str(tmp_path / "progress.txt"))
    return shown


def test_a_notebook_has_one_line_that_ends_empty_and_the_batch_is_told(notebook, tmp_path):
    assert in_notebook()
    with progress_bar(200, 50, "train") as update:
        update(100, "loss 0.5")
        assert (tmp_path / "progress.txt").read_text() == "train   50%  loss 0.5"
    first, middle, last = notebook
    assert first["text/plain"].split() == ["train", "25%"] and re.search('value="0.500"', middle["text/html"])
    assert set(last.values()) == {""}


def test_the_time_left_is_that_of_the_work_done_here(notebook):
    """Of 10,000 crops 9,000 were there: 500 took one second, 500 are left; of 10,000 more the minutes are told."""
    with progress_bar(10_000, 9_000, "train") as update:
        update(9_500, "")
    with progress_bar(1_000_000, 0, "train") as update:
        update(1_000, "")
    lines = [content["text/plain"] for content in notebook]
    assert "min left" not in lines[1] and "about 17 min left" in lines[4]


def test_an_error_in_the_work_still_clears_the_line(notebook):
    with pytest.raises(KeyError), progress_bar(10, 0, "train"):
        raise KeyError
    assert set(notebook[-1].values()) == {""}


def test_outside_a_kernel_is_no_notebook(monkeypatch):
    assert not in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))
    assert not in_notebook()  # IPython in a terminal
