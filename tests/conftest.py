"""Two threads, no display, and a throw-away place for data, results and runs."""

from __future__ import annotations

import os

# Before numpy and torch start their thread pools; notebooks' kernels and other subprocesses inherit it.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = str(min(2, int(os.environ.get(_variable) or 2)))

import matplotlib
import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))
matplotlib.use("Agg")  # here alone: in MPLBACKEND it would take the figures from notebooks' kernels


@pytest.fixture(autouse=True)
def elsewhere(request, tmp_path, monkeypatch):
    """Point BAGSSL_DATA, _RESULTS and _RUNS into a temporary folder, unless the test is marked `checkout`."""
    if "checkout" not in request.keywords:
        monkeypatch.setenv("BAGSSL_DATA", str(tmp_path / "data"))
        monkeypatch.setenv("BAGSSL_RESULTS", str(tmp_path / "results"))
        monkeypatch.setenv("BAGSSL_RUNS", str(tmp_path / "results" / "runs"))


@pytest.fixture(scope="module")
def one_thread():
    """For tiny pictures and many small products a second thread is mostly something to wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
