"""Who has no name and no home, as a number in a container has none, can train, execute and be shown results."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_experiments import write_notebook
from test_house import ROOT

# What every Python process of such a user would find, those that others start as well.
NAMELESS = """
import os, pwd
def nobody(number): raise KeyError(f"getpwuid(): uid not found: {number}")
pwd.getpwuid = nobody
"""
ASKING = """
import getpass, os, pathlib, tempfile
os.rmdir(tempfile.mkdtemp(dir=pathlib.Path.home()))
print(getpass.getuser(), pathlib.Path.home())"""
TRAINING = "import torch; torch.optim.SGD([torch.zeros(1, requires_grad=True)])"
HOMES = [None, "", "/nonexistent", "{folder}/file", "{folder}/sealed"]


def environment(folder: Path, home: str | None) -> dict[str, str]:
    """Of a process of a user without a name, whose $HOME is `home`."""
    (folder / "sitecustomize.py").write_text(NAMELESS)
    (folder / "file").touch()
    (folder / "sealed").mkdir(exist_ok=True)
    (folder / "sealed").chmod(0o555)
    unset = {"HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "LC_ALL", "LANG", "TORCHINDUCTOR_CACHE_DIR"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    named = {} if home is None else {"HOME": home.format(folder=folder)}
    return {**kept, **named, "LC_ALL": "C", "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("home", HOMES)
def test_without_a_name_and_a_home_there_are_both(home, tmp_path):
    if home == "{folder}/sealed" and os.getuid() == 0:
        pytest.skip("root writes everywhere")
    done = python("import bagssl" + ASKING, environment(tmp_path, home))
    assert done.returncode == 0, done.stderr
    name, folder = done.stdout.split()
    assert name == f"user-{os.getuid()}"
    assert not Path(folder).exists() or folder == "/"  # gone, as the process is; root may write to what $HOME="" means


def test_the_libraries_would_stop_without_either(tmp_path):
    """Negative controls."""
    assert "getpwuid" in python(TRAINING, environment(tmp_path, "/nonexistent")).stderr
    assert "home directory" in python(ASKING, environment(tmp_path, None)).stderr
    assert "/nonexistent" in python(ASKING, environment(tmp_path, "/nonexistent")).stderr


def test_who_has_a_name_and_a_home_keeps_both(tmp_path):
    (tmp_path / "home").mkdir()
    given = {**environment(tmp_path, "{folder}/home"), "LOGNAME": "zoe"}
    assert python("import bagssl" + ASKING, given).stdout.split() == ["zoe", str(tmp_path / "home")]
    import bagssl.user

    before = dict(os.environ), getpass.getuser()
    bagssl.user.settle()
    assert (dict(os.environ), getpass.getuser()) == before


def test_without_a_folder_for_temporary_files_the_import_is_silent(tmp_path):
    code = "import tempfile; tempfile._candidate_tempdir_list = list; import bagssl, os; print(os.environ['HOME'])"
    done = python(code, environment(tmp_path, "/nonexistent"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "/nonexistent\n", "")


def test_a_notebook_is_executed_for_a_user_without_name_and_home(tmp_path):
    asking = "import getpass, pathlib\ngetpass.getuser(), pathlib.Path.home()"
    write_notebook(tmp_path / "n.ipynb", [asking, TRAINING])
    code = f"""from pathlib import Path
from bagssl.batch.kernels import Kernels
folder = Path({str(tmp_path)!r})
print(Kernels().run(folder / "n.ipynb", folder / "out.ipynb", {{}}, {{}}))"""
    done = python(code, environment(tmp_path, None))
    assert (done.returncode, done.stdout, done.stderr) == (0, "{}\n", "")
    assert '"name": "stderr"' not in (tmp_path / "out.ipynb").read_text()
