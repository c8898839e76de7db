"""A file is written whole or not at all: its writer may die at any moment, and the next one finds no rubbish."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from test_experiments import write_notebook
from test_trees import plant

from bagssl import data, devices, paths, pretraining, recording, runs, trees
from bagssl.batch import kernels, notebook, reproduce, stages
from bagssl.batch.experiments import load_experiments
from bagssl.config import PretrainConfig
from bagssl.errors import InputError
from bagssl.paths import write_atomically
from bagssl.pretraining import pretrain
from bagssl.study import comparison, figures, tables

KILLED = 137
# what changes the disk: Python reports each of these before it happens
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}


def fork(work) -> int:
    """The exit code of a forked child that does `work`, which says what went wrong and leaves with 1 if it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of threads; the child needs none of them
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        torch.set_num_threads(1)  # the threads of the parent are not here
        if sys.platform == "linux":  # root gives up what lets it write everywhere: capset(2) of version 3, and none
            none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            ctypes.CDLL(None).capset(*none)
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, nothing of pytest may run in the child
        traceback.print_exc()
    finally:
        os._exit(code)


def dying(work, moment: int) -> int:
    """Do `work` in a child that dies before its change of the disk number `moment`; its exit code, 0 if it lived.

    Of the file that it wrote at last and had not yet put in its place, only the first half has reached the disk.
    """
    def doomed():
        count, last = 0, None

        def hook(event, arguments):
            nonlocal count, last
            named = event == "open" and isinstance(arguments[0], str | bytes)
            writes = named and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event not in CHANGES or event == "open" and not writes:
                return
            count += 1
            if count == moment:
                count = -(10**9)  # what follows is no change of the writer's
                with contextlib.suppress(OSError, TypeError):
                    os.truncate(last, os.path.getsize(last) // 2)
                os._exit(KILLED)
            if writes:
                last = arguments[0]

        sys.addaudithook(hook)
        work()

    return fork(doomed)


def files(folder: Path) -> dict[str, bytes]:
    """What a reader of the folder sees: all files but the hidden ones."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)}


def rubbish(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*.tmp")]


def killed_at_every_change(work, before: Path, folder: Path, check=lambda: None) -> int:
    """Kill `work(folder)` at each change that it makes to a copy of `before`, and then let it run; how often it died.

    Asserts that after each death every file is as before or as it should become, and after the next call all are, with
    no rubbish left that is older than some seconds. `check` looks at the folder after each death.
    """
    def start() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)

    start()
    work(folder)
    old, new = files(before), files(folder)
    for moment in itertools.count(1):
        start()
        code = dying(lambda: work(folder), moment)
        assert code in (0, KILLED)
        for name, content in files(folder).items():
            if Path(name).name != "checkpoint.pt":  # which is neither before nor after
                assert content in (old.get(name), new.get(name)), f"{name} after death {moment}"
        check()
        for path in rubbish(folder):
            os.utime(path, (time.time() - (2 * 86_400 if path.is_dir() else 10),) * 2)
        work(folder)
        assert files(folder) == new and not rubbish(folder), f"after death {moment}"
        if code == 0:
            return moment - 1


def a_table(folder: Path) -> None:
    tables.write_table(pd.DataFrame({"k": range(100), "accuracy": [0.5] * 100}), folder, "accuracy")


def a_figure(folder: Path) -> None:
    figure = Figure(figsize=(0.5, 0.5), layout="none")
    figure.add_axes((0, 0, 1, 1)).set_axis_off()
    figures.save_figure(figure, folder, "curve")


def a_notebook(folder: Path) -> None:
    notebook.normalise_notebook(folder / "n.ipynb")


def a_dataset(folder: Path) -> None:
    trees.add("pets", folder / "tree", root=folder, force=True)


def a_run(folder: Path) -> None:
    pretrain(PretrainConfig(**TINY), IMAGES, folder, progress=False, checkpoint_every=-1)


def some_results(folder: Path) -> None:
    good = load_experiments(folder / "notebooks")["good"]
    stage = stages.plan(good, "smoke", results=folder)
    assert reproduce._run_stage(stage, False, math.inf, kernels.Kernels(), print).code == 0


TINY = {"width": 8, "size": 8, "batch_size": 16, "views": 2, "projector_hidden": 16, "projector_dim": 8, "epochs": 1,
        "optimiser": "sgd"}  # fmt: skip
IMAGES = data.Images(torch.arange(16 * 3 * 8 * 8).view(16, 3, 8, 8).mul(37).byte(), torch.arange(16) % 2, ("a", "b"))
WRITERS = [a_table, a_figure, a_notebook, a_dataset, a_run, some_results]
CASES = [(work, True) for work in WRITERS] + [(work, False) for work in (a_run, some_results)]


@pytest.fixture
def stopped_clock(monkeypatch):
    """What a run and a batch write of hours and seconds is the same each time; so is the notebook's result."""
    clock = SimpleNamespace(time=lambda: 0.0, monotonic=lambda: 0.0)
    for module in (pretraining, recording, reproduce):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(reproduce, "iso_time", str)
    monkeypatch.setattr(reproduce, "stage_provenance", lambda stage: {})
    monkeypatch.setattr(runs, "provenance", dict)

    def executed(self, path, target, *_):
        for name in ("log.txt", "good.ipynb", "good.html", "sum.md"):
            target.with_name(name).write_text(name * 100)
        return {}

    monkeypatch.setattr(kernels.Kernels, "run", executed)


@pytest.mark.parametrize("work, earlier", CASES, ids=[f"{work.__name__}-{earlier}" for work, earlier in CASES])
def test_a_writer_killed_at_any_moment_leaves_whole_files_and_the_next_call_finishes(work, earlier, tmp_path,
                                                                                     stopped_clock):
    before, folder = tmp_path / "before", tmp_path / "folder"
    write_notebooks(before / "notebooks")
    write_notebook(before / "n.ipynb", ["1"] * 50)
    plant(before / "tree", train=1, test=1)
    if earlier:
        work(before)
        for name in ("accuracy.csv", "accuracy.md", "curve.png", "n.ipynb", "sum.md", "history.csv"):
            for path in before.rglob(name):
                earlier_than(path)
        plant(before / "tree", ("rat", "yak"), train=1, test=1)

    def check() -> None:
        for run in runs.list_runs(folder):
            if run.finished:
                assert run.weights() and run.history and run.metrics
            assert not (run.path / "checkpoint.pt").exists() or runs.load_checkpoint(run, torch.device("cpu"))
        if work is some_results and earlier:  # at no moment are both the old and the new results gone
            assert list(folder.glob("smoke/good/good.html")) or list(folder.glob("smoke/.good.old/good.html"))

    assert killed_at_every_change(work, before, folder, check) >= 4
    shutil.rmtree(folder)


def earlier_than(path: Path) -> None:
    """Put something else in the place of a result, or take it away where that is what makes a writer begin again."""
    if path.name == "history.csv":
        path.unlink()
    elif path.suffix == ".ipynb":
        write_notebook(path, ["1"] * 40)
    else:
        path.write_bytes(b"of an earlier call")


def write_notebooks(folder: Path) -> None:
    folder.mkdir(parents=True)
    write_notebook(folder / "good.ipynb", ["1"])
    entry = {"artefact": "x", "notebook": "good.ipynb", "profiles": {"smoke": {"cost": "1 s", "parameters": {}}}}
    (folder / "experiments.yaml").write_text(json.dumps({"good": entry}))


def test_a_writer_that_is_not_atomic_is_found(tmp_path):
    """Negative controls: a file that is written in its place, and one whose rubbish nobody clears away."""
    (tmp_path / "before").mkdir()

    def in_place(folder: Path) -> None:
        (folder / "a.txt").write_text("half of it is not enough")
        (folder / "b.txt").write_text("")

    def littering(folder: Path) -> None:
        (folder / f".a.{os.getpid()}.tmp").write_text("")
        os.replace(folder / f".a.{os.getpid()}.tmp", folder / "a.txt")

    for writer in (in_place, littering):
        with pytest.raises(AssertionError, match="after death 2"):
            killed_at_every_change(writer, tmp_path / "before", tmp_path / "folder")


def test_what_a_living_writer_has_begun_is_left_alone(tmp_path):
    with write_atomically(tmp_path / "a.json") as first:
        first.write_text("first")
        (tmp_path / ".a.json.dead.tmp").touch()  # its writer was killed
        for path in tmp_path.iterdir():
            os.utime(path, (0, 0))
        with write_atomically(tmp_path / "a.json") as second:
            second.write_text("second")
        assert (tmp_path / "a.json").read_text() == "second" and first.exists()
        assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / "a.json").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_writer_left_goes_at_once(tmp_path):
    (tmp_path / ".a.json.dead.tmp").touch()
    with write_atomically(tmp_path / "b.json") as path:
        assert set(tmp_path.iterdir()) == {path}


@pytest.mark.parametrize("moment", ["before it is held", "while it is looked at"])
def test_a_writer_whose_file_a_sweep_takes_at_its_birth_begins_another(moment, tmp_path, monkeypatch):
    hold, looked = paths.hold, []

    def late(handle: int) -> bool | None:
        if not looked:
            (born,) = tmp_path.iterdir()
            looked.append(born)
            if moment == "before it is held":
                paths.sweep(tmp_path / "a.json")  # which asks once more, and gets it
            else:
                with open(born) as stream:
                    assert hold(stream) and hold(handle) is False
                    born.unlink()
                    return False
        return hold(handle)

    monkeypatch.setattr(paths, "hold", late)
    with write_atomically(tmp_path / "a.json") as path:
        path.write_text("a")
        assert not looked[0].exists() and path != looked[0]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_the_record_tells_the_cores_at_hand_from_the_threads_in_use():
    code = """
import os, torch
from bagssl import runs
torch.set_num_threads(3)
for _ in range(2):
    print(runs.hardware()["cores"], runs.hardware()["threads"])
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
"""
    words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert words == [str(len(os.sched_getaffinity(0))), "3", "1", "3"]


@pytest.mark.parametrize("named, meant", [
    ("some data", "{here}/some data"), ("~/data", "{home}/data"), ("../up", "{here}/../up"), ("/abs", "/abs"),
    ("$HOME", "{here}/$HOME")])  # fmt: skip
def test_a_folder_means_what_it_does_where_the_command_is_given(tmp_path, monkeypatch, named, meant):
    """The kernel works in the folder of the notebooks: it is told the same folders, from the root on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    meant = Path(meant.format(here=tmp_path, home=tmp_path / "home"))
    for variable, root in (("BAGSSL_DATA", paths.data_root), ("BAGSSL_RESULTS", paths.results_root),
                           ("BAGSSL_RUNS", paths.runs_root)):  # fmt: skip
        monkeypatch.setenv(variable, named)
        assert root() == meant
    cells = ["import os; from bagssl import paths; os.chdir('/')",
             f"assert {{str(root()) for root in (paths.data_root, paths.runs_root)}} == {{{str(meant)!r}}}"]
    write_notebook(tmp_path / "n.ipynb", cells)
    assert kernels.Kernels().run(tmp_path / "n.ipynb", tmp_path / "out.ipynb", {}, {}) == {}


# Disks that lack something


def refusing(number: int, spared=lambda *_: False):
    """What a system call becomes on a disk that answers it with this error, but for the arguments that are spared."""
    def refused(real):
        def call(*words, **options):
            if spared(*words):
                return real(*words, **options)
            raise OSError(number, os.strerror(number))

        return call

    return refused


def refuse(monkeypatch, number: int, *names: str, spared=lambda *_: False) -> None:
    for name in names:
        monkeypatch.setattr(os, name, refusing(number, spared)(getattr(os, name)))


NO_MODES = ("chmod", "fchmod", "lchmod", "chown", "fchown", "utime", "setxattr")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EACCES, errno.ENOSYS],
                         ids=lambda number: errno.errorcode[number])
def test_a_disk_that_keeps_modes_and_times_to_itself_is_written_to(number, tmp_path, monkeypatch):
    """CIFS, exFAT, some FUSE: files, models, their copies beside a notebook's results, and those results."""
    refuse(monkeypatch, number, *(name for name in NO_MODES if hasattr(os, name)))
    with pytest.raises(OSError):  # negative control
        shutil.copytree(tmp_path, tmp_path.with_name("copied"))
    a_run(tmp_path)
    a_table(tmp_path)
    (run,) = runs.list_runs(tmp_path)
    (run.path / "evaluations").mkdir()
    (run.path / "evaluations" / "one.json").touch()
    for _ in range(2):
        comparison.provenance(tmp_path / "output", [run], {})
        copied = {path.relative_to(tmp_path / "output/runs").as_posix() for path in tmp_path.glob("output/runs/**/*.*")}
        assert copied - {run.path.name} == {f"{run.path.name}/{name}" for name in (
            "README.md", "config.json", "history.csv", "metrics.json", "provenance.json", "evaluations/one.json",
            "weights-fp16.safetensors")}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_has_the_mode_that_the_umask_says(umask, tmp_path):
    before = os.umask(umask)
    try:
        with write_atomically(tmp_path / "a.json") as path:
            path.write_text("a")
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_disk_that_knows_no_fsync_is_written_to_and_one_that_fails_says_so(tmp_path, monkeypatch):
    for number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        refuse(monkeypatch, number, "fsync")
        a_table(tmp_path)
        assert len(list(tmp_path.rglob("accuracy.*"))) >= 2
    for number in (errno.EIO, errno.ENOSPC, errno.EDQUOT):  # negative control
        refuse(monkeypatch, number, "fsync")
        with pytest.raises(OSError) as error, write_atomically(tmp_path / "b.json") as path:
            path.write_text("b")
        assert error.value.errno == number and error.value.filename == str(tmp_path / "b.json")
        assert not list(tmp_path.glob("*b.json*"))


def test_where_no_lock_tells_what_killed_writers_left_goes_after_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK)(None))
    for name, age in (("old", 86_500), ("young", 3600)):
        (tmp_path / f".{name}.tmp").touch()
        os.utime(tmp_path / f".{name}.tmp", (time.time() - age,) * 2)
    with write_atomically(tmp_path / "a.json") as path:
        path.write_text("a")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", ".young.tmp"}


def test_results_that_came_with_a_containers_image_are_replaced(tmp_path, monkeypatch, stopped_clock):
    """Its file system renames files of the image, and folders that were made since, but no folder of the image."""
    write_notebooks(tmp_path / "notebooks")
    some_results(tmp_path)
    inside = tmp_path / "smoke" / "good"
    before = files(inside)
    earlier_than(inside / "sum.md")
    refuse(monkeypatch, errno.EXDEV, "replace", "rename", spared=lambda source, *_: Path(source) != inside)
    with pytest.raises(OSError):  # negative control
        os.replace(inside, inside.with_name("elsewhere"))
    some_results(tmp_path)
    assert files(inside) == before and [path.name for path in inside.parent.iterdir() if path.is_dir()] == ["good"]
    refuse(monkeypatch, errno.EACCES, "replace")
    with pytest.raises(PermissionError):
        paths.move_folder(inside, inside.with_name("elsewhere"))
    assert files(inside) == before


@pytest.mark.parametrize("named", ["~/data", "~", "~nobody-of-this-name/data"])
def test_a_folder_in_a_home_that_there_is_not_is_one_line(named, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setenv("BAGSSL_DATA", named)
    with pytest.raises(InputError, match=f"BAGSSL_DATA={named} begins with a home folder"):
        paths.data_root()
    monkeypatch.setenv("BAGSSL_DATA", "./~data")  # negative control
    assert paths.data_root().name == "~data"


# Boxes that give less than they have


V1 = "{folder}/cpu.cfs_quota_us: {quota}\n{folder}/cpu.cfs_period_us: {period}"
GROUPS = [
    ("0::/", "cpu.max: 150000 100000", 1.5),
    ("0::/a/b", "a/b/cpu.max: 50000 100000", 0.5),
    ("0::/a/b", "a/b/cpu.max: max 100000\na/cpu.max: 300000 100000", 3),  # of the pod around it
    ("0::/a/b", "a/b/cpu.max: 400000 100000\na/cpu.max: 200000 50000\ncpu.max: 700000 100000", 4),
    ("0::/docker/1f", "cpu.max: 200000 100000", 2),  # its own group is mounted as the root
    ("0::/../../a", "cpu.max: 200000 100000", 2),
    ("12:cpu,cpuacct:/a\n0::/", V1.format(folder="cpu,cpuacct/a", quota=250000, period=100000), 2.5),
    ("3:cpuset:/\n4:cpu:/docker/1f\n", V1.format(folder="cpu", quota=100000, period=50000), 2),
    ("4:cpu:/\n0::/a", "unified/a/cpu.max: 100000 100000", 1),
    ("4:cpu:/", V1.format(folder="cpu", quota=-1, period=100000), math.inf),
    ("4:cpu:/", V1.format(folder="cpu", quota=100000, period=0), math.inf),
    ("5:cpuset:/", V1.format(folder="cpuset", quota=100000, period=100000), math.inf),
    ("0::/", "cpu.max: max 100000", math.inf), ("0::/", "cpu.max: max", math.inf), ("0::/", "cpu.max: ", math.inf),
    ("0::/", "", math.inf), ("", "cpu.max: 1 1", math.inf), ("nonsense", "", math.inf),
]  # fmt: skip


@pytest.mark.parametrize("group, written, cores", GROUPS)
def test_the_quota_of_a_container_is_that_of_its_group_and_all_around_it(group, written, cores, tmp_path):
    (tmp_path / "cgroup").write_text(group)
    for line in written.splitlines():
        name, _, content = line.partition(": ")
        (tmp_path / "mounts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounts" / name).write_text(content + "\n")
    assert paths.quota(tmp_path / "cgroup", tmp_path / "mounts") == cores
    assert paths.quota(tmp_path / "none", tmp_path / "mounts") == math.inf


@pytest.mark.parametrize("quota, cores", [(0.1, 1), (1.0, 1), (1.01, 2), (3.5, 4), (8, 4), (1e6, 4), (math.inf, 4)])
def test_cores_are_those_of_the_quota_rounded_up_and_no_more_than_the_process_is_bound_to(quota, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 7}, raising=False)
    monkeypatch.setattr(paths, "quota", lambda: quota)
    assert paths.cores() == cores and isinstance(paths.cores(), int)


@pytest.mark.parametrize("quota, told, threads", [
    (1.5, "", 2), (0.2, "", 1), (3, "", 3), (8, "", 3), (math.inf, "", 3), (1.5, "3", 3)])  # fmt: skip
def test_torch_has_as_many_threads_as_the_quota_leaves_unless_it_is_told_otherwise(quota, told, threads, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    for module in (paths, devices):
        monkeypatch.setattr(module, "quota", lambda: quota)
    torch.set_num_threads(3)
    try:
        devices.heed_quota()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
