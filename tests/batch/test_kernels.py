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
from test_experiments import write_list, write_notebook

import bagssl
from bagssl.batch import kernels, reproduce
from bagssl.batch.notebook import error_line


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


LACKING = {"array": "import numpy\nnumpy.zeros(10**14)", "files": "raise OSError(24, 'Too many open files')",
           "bug": "raise RuntimeError('shapes differ')"}  # fmt: skip


def test_what_the_box_lacks_is_one_line_for_each_notebook(tmp_path, capsys):
    (tmp_path / "notebooks").mkdir()
    entries = {}
    for name, cell in LACKING.items():
        write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", [cell])
        entries[name] = {"artefact": "none", "notebook": f"{name}.ipynb",
                         "profiles": {"smoke": {"cost": "", "parameters": {}}}}  # fmt: skip
    (tmp_path / "notebooks" / "experiments.yaml").write_text(json.dumps(entries))
    for call, options in ((reproduce.reproduce, {"results": tmp_path}), (reproduce.reproduce_bare, {})):
        names = ["array"] if options else list(entries)  # a kernel takes seconds
        assert call(names, notebooks=tmp_path / "notebooks", **options) == 1
        lines = dict(zip(names, capsys.readouterr().err.splitlines(), strict=True))
        assert "the memory does not suffice (" in lines["array"] and "Unable to allocate" in lines["array"]
        assert "what helps: a smaller batch_size, fewer --jobs" in lines["array"]
    assert "no more files may be open (OSError: [Errno 24]" in lines["files"] and "ulimit -n" in lines["files"]
    assert "RuntimeError: shapes differ" in lines["bug"] and "what helps" not in lines["bug"]


def test_why_a_process_ended_before_any_cell_is_said(tmp_path, monkeypatch):
    (tmp_path / "papermill.py").write_text("raise MemoryError\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    write_notebook(tmp_path / "n.ipynb", ["1"])
    error = kernels.Kernels().run(tmp_path / "n.ipynb", tmp_path / "out.ipynb", {}, {})
    assert error == {"ename": "DeadProcess", "evalue": "it ended with 1, MemoryError; see log.txt"}
    assert error_line(error).startswith("the memory does not suffice (DeadProcess: it ended with 1, MemoryError")
    (tmp_path / "papermill.py").write_text("print('MemoryError', flush=True)\nimport os\nos.abort()\n")
    assert "-6, MemoryError" in kernels.Kernels().run(tmp_path / "n.ipynb", tmp_path / "out.ipynb", {}, {})["evalue"]
    (tmp_path / "papermill.py").write_text("import os\nos._exit(9)\n")
    assert "9, silently" in kernels.Kernels().run(tmp_path / "n.ipynb", tmp_path / "out.ipynb", {}, {})["evalue"]


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
