"""Two threads at most, no display, and a throw-away place for data, results and runs."""

from __future__ import annotations

import os
import signal

# `make test &` in a script has Ctrl-C ignored, by all that is started from here, too: some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before numpy and torch start their thread pools; notebooks' kernels and other subprocesses inherit it. The same number
# for all: two threads of MKL in each of two processes that OpenMP has told to use one slow both down tenfold.
_threads = str(min(2, int(os.environ.get("OMP_NUM_THREADS") or 2)))
os.environ.update(OMP_NUM_THREADS=_threads, MKL_NUM_THREADS=_threads, OPENBLAS_NUM_THREADS=_threads)

import matplotlib.pyplot
import pytest
import torch

import bagssl  # noqa: F401 - who has no home gets one, the notebooks' kernels as well

torch.set_num_threads(min(2, torch.get_num_threads()))
matplotlib.use("Agg")  # here alone: in MPLBACKEND it would take the figures from notebooks' kernels


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def same_draws():
    """What a test draws does not depend on the tests before it, which differ from process to process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_figures_left():
    """Matplotlib warns of the 21st open figure: of those of all tests that a process has done."""
    yield
    matplotlib.pyplot.close("all")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Point BAGSSL_DATA, _RESULTS and _RUNS into a temporary folder."""
    monkeypatch.setenv("BAGSSL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("BAGSSL_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("BAGSSL_RUNS", str(tmp_path / "results" / "runs"))
    monkeypatch.setenv("BAGSSL_RECORD", "")


@pytest.fixture(scope="module")
def one_thread():
    """For tiny pictures and many small products a second thread is mostly something to wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tree(tmp_path):
    """A tree of class folders to make a dataset of."""
    from test_trees import plant

    return plant(tmp_path / "tree")


@pytest.fixture
def root(tmp_path):
    """Where a test keeps its datasets."""
    return tmp_path / "data"
