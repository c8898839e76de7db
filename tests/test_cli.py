"""Wrong input is one clear line and exit code 2; every way to end has its own code."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_experiments import write_notebook

import bagssl
from bagssl import cli, data, pretraining, trees
from bagssl.batch import experiments, kernels, reproduce, stages
from bagssl.errors import Diverged, InputError, Stopped


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A checkout with one experiment; nothing in it may run."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    parameters = 'dataset: str = "synthetic"\nepochs: float = 1.0\nks: list[int] = [1]'
    write_notebook(notebooks / "02.ipynb", ["1"], parameters)
    profiles = {"smoke": {"cost": "1 min", "parameters": {}}, "laptop": {"cost": "1 h", "parameters": {"ks": [4]}}}
    entry = {"artefact": "claim C2", "notebook": "02.ipynb", "profiles": profiles}
    (notebooks / "experiments.yaml").write_text(yaml.safe_dump({"patch-vs-multiscale": entry}, sort_keys=False))
    for module in (experiments, reproduce):
        monkeypatch.setattr(module, "home", lambda: tmp_path)
    monkeypatch.setattr(stages, "_checked", lambda name: "data")

    def run(*_, **__):
        raise AssertionError("ran, and should have been refused")

    monkeypatch.setattr(kernels.Kernels, "run", run)
    monkeypatch.setattr(pretraining, "pretrain", run)
    monkeypatch.setattr(trees, "_download", run)
    return tmp_path


WRONG = [
    ("", "COMMAND"),
    ("reproduse", "invalid choice"),
    ("--verbose", "COMMAND"),
    ("reproduce patch-vs-multscale", "did you mean 'patch-vs-multiscale'"),
    ("reproduce --profile desktop", "unknown profile 'desktop'"),
    ("reproduce patch-vs-multiscale --profile paper", "it has: smoke, laptop"),
    ("reproduce --set epoch=3", "did you mean 'epochs'"),
    ("reproduce --set epochs", "not name=value"),
    ("reproduce --set =3", "not name=value"),
    ("reproduce --set epochs=many", "parameter epochs must be float"),
    ("reproduce --set epochs=1 --set epochs=2", "given twice"),
    ("reproduce --set ks=[1,two]", "parameter ks must be list[int]"),
    ("reproduce --set dataset=nowhere", "nowhere"),
    ("reproduce --jobs 0", "--jobs"),
    ("reproduce --jobs two", "--jobs"),
    ("reproduce --time-limit soon", "--time-limit"),
    ("reproduce --time-limit 0", "--time-limit"),
    ("reproduce --fast", "unrecognized arguments: --fast"),
    ("list all", "unrecognized arguments: all"),
    ("data", "COMMAND"),
    ("data fetch cifar10", "invalid choice"),
    ("data get", "name"),
    ("data get imagenet", "imagenet"),
    ("data add mine", "path"),
    ("data add mine /no/such/folder", "/no/such/folder"),
    ("data add mine . --size big", "--size"),
    ("data add ../mine .", "../mine"),
    ("data check nowhere", "nowhere"),
    ("pretrain --dataset nowhere", "nowhere"),
    ("pretrain --objective tcrr", "tcrr"),
    ("pretrain --training both", "both"),
    ("pretrain --seed one", "parameter seed must be int"),
    ("pretrain --set views=1", "views"),
    ("pretrain --set epocs=1", "did you mean 'epochs'"),
    ("pretrain --seed 1 --set seed=2", "given twice"),
    ("pretrain --set norm_groups=3", "batch_size = 256 is no multiple of norm_groups = 3"),
    ("pretrain --processes 0", "--processes"),
    ("pretrain --log-to nothing", "unknown logger 'nothing'; known: csv, tensorboard"),
    ("pretrain --log-to csv,tensorbord", "did you mean 'tensorboard'"),
    ("pretrain --online linear", "unknown online probe 'linear'; known: knn"),
    ("pretrain --online knn:often", "knn:EVERY"),
    ("notebooks 99_none.ipynb", "99_none.ipynb"),
    ("evaluate --dataset synthetic", "encoder"),
    ("evaluate torchvision:resnet18", "--dataset"),
    ("evaluate resnet18 --dataset synthetic", "'resnet18' is no encoder"),
    ("evaluate torchvision:resnet19 --dataset synthetic", "unknown network of torchvision 'resnet19'"),
    ("evaluate m.pth --dataset synthetic", "arch is needed"),
    ("evaluate m.pth,arch=nets:net --arch nets:net --dataset synthetic", "arch is given twice"),
    ("evaluate m.pth --arch nets:net --dataset synthetic", "m.pth is not there"),
    ("evaluate m.pth --train-images few --dataset synthetic", "--train-images"),
]


@pytest.mark.parametrize("words, answer", WRONG, ids=[words for words, _ in WRONG])
def test_wrong_input_is_one_line_and_code_2(words, answer, project, capsys):
    before = sorted(project.rglob("*"))
    assert cli.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and err.startswith("bagssl: ") and answer in err, err
    assert "Traceback" not in out + err
    assert [path for path in sorted(project.rglob("*")) if path.suffix == ".ipynb" or path in before] == before


@pytest.mark.parametrize("error, code", [
    (InputError("wrong"), 2), (Stopped("at crop 5"), 3), (Stopped("at crop 5", interrupted=True), 130),
    (Diverged("loss is NaN"), 1), (KeyboardInterrupt(), 130),
])  # fmt: skip
def test_each_end_has_its_code(error, code, project, monkeypatch, capsys):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(reproduce, "reproduce", run)
    assert cli.main(["reproduce"]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


BUGS = [KeyError("bug"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("memory order 'X'"),
        OSError(errno.EBADF, "Bad file descriptor"), FileNotFoundError(errno.ENOENT, "No such file", "bug"),
        ImportError("cannot import name 'bug'"), RuntimeError("CUDA error: device-side assert triggered"),
        OSError("no errno"), AssertionError()]  # fmt: skip


@pytest.mark.parametrize("error", BUGS, ids=str)
def test_a_bug_is_not_hidden(error, project, monkeypatch):
    monkeypatch.setattr(reproduce, "reproduce", raising(error))
    with pytest.raises(type(error)) as raised:
        cli.main(["reproduce"])
    assert raised.value is error


def raising(error):
    def run(*_, **__):
        raise error

    return run


class OutOfMemoryError(RuntimeError):
    """As torch's."""


def many_files():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    try:
        with contextlib.ExitStack() as opened:
            for _ in range(100):
                opened.enter_context(open(os.devnull))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


SHORT = [  # what is done or raised; what the line says is lacking
    (lambda: np.zeros(10**14), "the memory does not suffice (MemoryError: Unable to allocate"),
    (lambda: torch.zeros(10**15), "the memory does not suffice (RuntimeError: "),
    (lambda: bytes(2**62), "the memory does not suffice (MemoryError)"),
    (lambda: mmap.mmap(-1, 2**46 - 4096), "the memory does not suffice (OSError: [Errno 12] Cannot allocate memory)"),
    (many_files, "no more files may be open (OSError: [Errno 24] Too many open files"),
    (OSError(errno.ENFILE, os.strerror(errno.ENFILE)), "no more files may be open"),
    (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "the memory of the GPU does not suffice"),
    (RuntimeError("CUDA error: out of memory\nCompile with ..."), "the memory of the GPU does not suffice"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"), "the memory of the GPU does not suffice"),
    (RuntimeError("can't start new thread"), "no more threads or processes may run"),
    (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "no more threads or processes may run"),
    (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "the memory does not suffice"),
    (RuntimeError("std::bad_alloc"), "the memory does not suffice"),
    (RuntimeError("unable to write to file </torch_12_0>: No space left on device (28)"), "the shared memory does not"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                  "are out of shared memory."), "the shared memory does not suffice"),
    (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), "TMPDIR"),
    (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "the memory does not suffice"),
    (ImportError("\n\nIMPORTANT: READ THIS\n\nOriginal error was: x.so: failed to map segment from shared object\n"),
     "the memory does not suffice (ImportError: Original error was"),
    (OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), "/x"), "/x: No locks available; make room or let it be written"),
    (OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/x"), "/x: Stale file handle"),
    (OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), "/x"), "/x: Transport endpoint is not connected"),
    (OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), "/x"), "/x: Directory not empty"),
]  # fmt: skip


@pytest.mark.parametrize("cause, answer", SHORT, ids=[answer[:60] for _, answer in SHORT])
def test_what_the_box_lacks_is_one_line_that_says_what_helps(cause, answer, project, monkeypatch, capsys):
    work = raising(cause) if isinstance(cause, Exception) else lambda *_, **__: cause()
    monkeypatch.setattr(reproduce, "reproduce", work)
    assert cli.main(["reproduce"]) == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and err.startswith("bagssl: ") and answer in err and not out
    assert "what helps: " in err or "set BAGSSL_DATA" in err


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the process has from /proc")
def test_too_little_memory_for_a_training_is_one_line(writable, capsys):
    from test_paths import fork

    def short():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
        words = "pretrain --set epochs=1 --set views=20 --set width=64 --set size=32 --set batch_size=2000"
        assert cli.main(words.split()) == 1
        line, = capsys.readouterr().err.splitlines()
        assert "the memory does not suffice" in line and "a smaller batch_size" in line

    assert fork(short) == 0
    assert not list(writable.rglob("*.tmp"))


def test_reproduce_passes_on_what_was_asked(project, monkeypatch):
    asked = []
    monkeypatch.setattr(reproduce, "reproduce", lambda *words, **named: asked.append((words, named)) or 0)
    line = "reproduce a b --profile laptop --set epochs=2 --set name=a=b --jobs 3 --fresh --time-limit 1h30m"
    assert cli.main(line.split()) == 0
    assert asked == [((["a", "b"], "laptop", {"epochs": "2", "name": "a=b"}),
                      {"jobs": 3, "fresh": True, "time_limit": 5400.0, "replace": False})]


@pytest.mark.parametrize("text, seconds", [("90", 90), ("90s", 90), ("9m", 540), ("1h", 3600), ("1m1.5s", 61.5)])
def test_durations(text, seconds):
    assert cli.duration(text) == seconds


def test_list_shows_each_experiment_and_profile_with_its_state(project, capsys):
    assert cli.main(["list"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["EXPERIMENT", "PROFILE", "STATE", "COST", "NOTEBOOK", "PAPER"]
    assert [row.split()[:3] for row in rows] == [["patch-vs-multiscale", "smoke", "missing"],
                                                 ["patch-vs-multiscale", "laptop", "missing"]]
    assert "1 h" in rows[1] and "02.ipynb" in rows[1] and "claim C2" in rows[1]


def test_data_list_names_the_embedded_data(project, capsys):
    assert cli.main(["data", "list"]) == 0
    out = capsys.readouterr().out
    assert "synthetic" in out and "cifar10" in out and "None" not in out


def test_pretrain_reads_settings_in_their_types(project, monkeypatch, capsys):
    seen = []

    def pretrain(config, images, time_limit, accumulate, recompute, log_to, online):
        assert accumulate and not recompute and (log_to, online) == (["csv", "csv,tensorboard"], "knn:64")
        seen.append((config, time_limit))
        return type("Run", (), {"path": project / "runs" / "one"})

    monkeypatch.setattr(pretraining, "pretrain", pretrain)
    monkeypatch.setattr(data, "load", lambda name, split: type("Images", (), {"fingerprint": "those"}))
    line = "pretrain --objective simclr --seed 3 --set epochs=2 --set learning_rate=1e-3 --time-limit 9m --accumulate"
    line += " --log-to csv --log-to csv,tensorboard --online knn:64"
    assert cli.main(line.split()) == 0
    (config, limit), = seen
    assert (config.objective, config.seed, config.epochs, config.learning_rate, limit) == ("simclr", 3, 2, 1e-3, 540)
    assert capsys.readouterr().out.strip().endswith("one")


WRITES = ["pretrain --set epochs=1 --set views=2 --set width=8 --set size=8 --set batch_size=2000",
          "reproduce", "report", "data add pets tree"]


@pytest.fixture
def writable(tmp_path, monkeypatch):
    """A checkout, data and results for which each command of `WRITES` would write something."""
    from test_paths import write_notebooks
    from test_trees import plant

    write_notebooks(tmp_path / "notebooks")
    plant(tmp_path / "tree")
    shutil.copytree(Path(bagssl.__file__).parent.parent / "results/laptop", tmp_path / "results/laptop")
    monkeypatch.setattr(experiments, "home", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path


def said(words, capsys) -> str:
    """The one line of a command that fails."""
    assert cli.main(words.split()) in (1, 2)
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("bagssl: ") and "BAGSSL_" in line
    return line


@pytest.mark.parametrize("words", WRITES)
def test_a_full_disk_is_one_line(words, writable, capsys):
    from test_runs import on_a_small_disk

    before = {path: path.read_bytes() for path in writable.rglob("*") if path.is_file()}

    def full():
        line = said(words, capsys)
        assert "File too large" in line and (words == "reproduce" or str(writable) in line)

    assert on_a_small_disk(100, full) == 0
    assert {path: path.read_bytes() for path in before} == before and not list(writable.rglob("*.tmp"))


ON_TMPFS = """set -u; mount -t tmpfs -o size=64k none "$1"; export BAGSSL_RUNS="$1"
shift; "$@"; echo "ended with $?"; find "$BAGSSL_RUNS" -name ".*.tmp"
mount -t tmpfs -o remount,size=64m none "$BAGSSL_RUNS"; "$@" >/dev/null; echo "then with $?" """


def test_a_full_file_system_is_one_line_and_with_room_the_next_call_ends_well(tmp_path):
    def apart(script, *words):
        return subprocess.run(["unshare", "-Urm", "sh", "-c", script, "sh", *words],
                              capture_output=True, text=True, check=False, cwd=Path(bagssl.__file__).parent.parent)

    if not shutil.which("unshare") or apart("mount -t tmpfs none /mnt").returncode:
        pytest.skip("may not mount a file system of its own")
    done = apart(ON_TMPFS, str(tmp_path), sys.executable, "-m", "bagssl.cli", *WRITES[0].split())
    line, *more = done.stderr.splitlines()
    assert "No space left on device; make room" in line and not more
    assert done.stdout.split("\n")[:-1] == ["ended with 1", "then with 0"]


@pytest.mark.parametrize("words", WRITES)
def test_a_folder_that_cannot_be_made_is_one_line(words, writable, capsys, monkeypatch):
    """For root as well, whom permissions do not bind: a file stands where a folder should be made."""
    (writable / "file").touch()
    for name in ("BAGSSL_DATA", "BAGSSL_RESULTS", "BAGSSL_RUNS"):
        if words != "report" or name != "BAGSSL_RESULTS":
            monkeypatch.setenv(name, str(writable / "file" / "below"))
    if words == "report":
        refused = OSError(errno.EROFS, "Read-only file system", str(writable))
        monkeypatch.setattr("bagssl.paths.hold", lambda _: (_ for _ in ()).throw(refused))
    assert "Not a directory" in (line := said(words, capsys)) or "Read-only" in line


@pytest.mark.parametrize("words", WRITES)
def test_folders_that_may_only_be_read_are_one_line(words, writable, capsys):
    from test_paths import fork
    from test_runs import only_to_be_read

    def refused():
        assert "Permission denied" in said(words, capsys)

    (writable / "results/smoke").mkdir()
    before = {path: path.read_bytes() for path in writable.rglob("*") if path.is_file()}
    with only_to_be_read(writable):
        assert fork(refused) == 0
    assert {path: path.read_bytes() for path in writable.rglob("*") if path.is_file()} == before


def test_a_path_that_is_no_utf8_is_printed_as_it_is(tmp_path):
    name = b"\xff-" + b"x" * 300
    for length, code in ((8, 0), (300, 1)):  # the second is longer than a name may be
        root = os.path.join(os.fsencode(tmp_path), name[:length])
        words = ("pretrain --training untrained --set width=8 --set size=8"
                 " --set projector_hidden=8 --set projector_dim=8")
        done = subprocess.run([sys.executable, "-m", "bagssl.cli", *words.split()], capture_output=True, check=False,
                              cwd=Path(bagssl.__file__).parent.parent, env={**os.environb, b"BAGSSL_RUNS": root})
        assert done.returncode == code and b"Traceback" not in done.stderr
        assert (name[:length] in done.stdout) == (code == 0) and (b"too long" in done.stderr) == (code == 1)


def test_help_and_version_need_no_torch():
    code = """import sys, bagssl.cli as c
try: c.main(sys.argv[1:])
except SystemExit: pass
assert 'torch' not in sys.modules"""
    for words in (["--version"], ["reproduce", "--help"], ["data", "--help"], ["evaluate", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False,
                              cwd=Path(bagssl.__file__).parent.parent)
        assert done.returncode == 0 and not done.stderr and done.stdout


def test_a_closed_pipe_is_no_traceback():
    root = Path(bagssl.__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-m", "bagssl.cli", "data", "list"], cwd=root, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141
    process.stderr.close()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_a_terminal_cannot_show_is_a_question_mark(encoding):
    code = ("import sys; from bagssl import cli\n"
            "def run(arguments): print('λ = 1 × \\udce9'); print('λ', file=sys.stderr)\n"
            "cli.list_experiments = run; sys.exit(cli.main(['list']))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False,
                          env={**os.environ, "PYTHONIOENCODING": encoding})
    shown = "λ = 1 × ".encode(encoding, "replace") + b"\xe9\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, "λ\n".encode(encoding, "replace"))
