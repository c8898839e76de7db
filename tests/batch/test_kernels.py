"""Kernels that die, leave, stop or are stopped: each way to end is told from the others."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_experiments import write_list

import bagssl


def ended(results: Path, name: str) -> dict:
    return json.loads((results / "smoke" / f".{name}.failed" / "status.json").read_text())


@pytest.mark.parametrize("name, ename", [("killed", "DeadKernelError"), ("left", "SystemExit")])
def test_a_kernel_that_dies_or_leaves_early_has_failed(results, name, ename):
    assert json.loads((results / "codes.json").read_text())["bad"] == 1
    assert ended(results, name)["error"]["ename"] == ename
    assert (results / f"smoke/.{name}.failed/{name}.ipynb").exists()
    assert (results / f"smoke/.{name}.failed/log.txt").exists()
    assert not (results / "smoke" / name).exists()


def test_stopped_by_the_time_limit_is_code_3(results):
    assert json.loads((results / "codes.json").read_text())["stopped"] == 3
    assert ended(results, "stopped")["state"] == "stopped"


def test_parameters_that_the_notebook_refuses_are_code_2(results, capsys):
    assert ended(results, "refused")["code"] == 2


def test_ctrl_c_stops_all_kernels_within_seconds(tmp_path, notebooks):
    # a shell's background job ignores Ctrl-C and so do its children: as in the foreground, then
    shutil.copytree(notebooks, tmp_path / "notebooks")
    profiles = {"smoke": {"cost": "", "parameters": {}}}
    write_list(tmp_path / "notebooks", too={"artefact": "none", "notebook": "long.ipynb", "profiles": profiles})
    script = ("import sys, pathlib, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
              "from bagssl.batch.reproduce import reproduce; sys.exit(reproduce(['long', 'too'], jobs=2, "
              "notebooks=pathlib.Path(sys.argv[1]), results=pathlib.Path(sys.argv[2])))")
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "notebooks"), str(tmp_path)], text=True,
                               stdout=subprocess.PIPE, cwd=Path(bagssl.__file__).parents[1])
    pids, until = [tmp_path / f"smoke/.{name}.partial/pid" for name in ("long", "too")], time.monotonic() + 90
    while not all(pid.exists() and pid.read_text() for pid in pids):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.1)
    kernels = [psutil.Process(int(pid.read_text())) for pid in pids]
    assert all(kernel.is_running() for kernel in kernels)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stdout.read().count("interrupted") == 2
    assert not any(kernel.is_running() and kernel.status() != psutil.STATUS_ZOMBIE for kernel in kernels)
    assert ended(tmp_path, "long")["state"] == ended(tmp_path, "too")["state"] == "stopped"
