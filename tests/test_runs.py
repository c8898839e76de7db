"""The store keeps what it was given, says in one line what is wrong with it, and trains again what was lost."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_paths import IMAGES, TINY, fork
from test_trees import plant

import bagssl
from bagssl import catalogue, cli, data, runs, trees
from bagssl.config import PretrainConfig
from bagssl.errors import InputError, Stopped
from bagssl.evaluation import evaluate
from bagssl.pretraining import load_encoder, load_projector, pretrain

ROOT = Path(bagssl.__file__).parent.parent


def train(root, **how):
    return pretrain(PretrainConfig(**{**TINY, "epochs": 2}), IMAGES, root, progress=False, **how)


def begun(root) -> Path:
    """The checkpoint of a run that was stopped after its first step."""
    with pytest.raises(Stopped):
        train(root, time_limit=0)
    (path,) = root.glob("*/checkpoint.pt")
    return path


def written(run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.weights().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(do, match: str = "") -> str:
    with pytest.raises(InputError, match=match) as error:
        do()
    assert "\n" not in str(error.value)
    return str(error.value)


# What is lost


@pytest.mark.parametrize("name", ["config.json", "history.csv", "provenance.json", "metrics.json"])
def test_a_run_that_has_lost_a_file_is_trained_again_and_says_so(name, tmp_path, capsys):
    run = train(tmp_path)
    weights = written(run)
    (run.path / name).unlink()
    uses = {"config.json": lambda: load_encoder(run), "history.csv": lambda: run.history,
            "provenance.json": lambda: run.provenance,
            "metrics.json": lambda: evaluate(run, IMAGES, 0.5, [0], scale=1, progress=False)}  # fmt: skip
    refused(uses[name], f"cannot read .*{name}")
    assert runs.list_runs(tmp_path) == ([] if name == "config.json" else [run])
    mark = (run.path / "provenance.json").read_bytes() if name == "config.json" else None
    capsys.readouterr()
    again = train(tmp_path)
    assert again.path == run.path and again.finished and same(again.weights(), weights) and again.history
    said = capsys.readouterr().err
    assert (f"has lost {name}: it is trained again" in said) == (name not in {"config.json", "metrics.json"})
    if mark is not None:  # nothing but the training can say what the others do; this one follows from the call
        assert (run.path / "provenance.json").read_bytes() == mark and runs.list_runs(tmp_path) == [run]


def test_a_run_whose_weights_were_left_elsewhere_still_says_what_was_measured(tmp_path):
    run = train(tmp_path)
    how = {"probes": ["knn"], "scale": 1, "progress": False}
    rows = evaluate(run, IMAGES, 0.5, [0], **how)
    (run.path / "weights.safetensors").unlink()
    assert train(tmp_path) == run and run.finished and evaluate(run, IMAGES, 0.5, [0], **how) == rows
    refused(lambda: load_projector(run), "has no weights: copy weights.safetensors")
    refused(lambda: evaluate(run, IMAGES, 0.5, [4], **how), "has no weights")


def test_weights_as_fp16_travel_and_what_they_give_is_not_taken_for_what_fp32_gives(tmp_path):
    run = train(tmp_path)
    how = {"probes": ["knn"], "scale": 1, "progress": False}
    exact, rows = run.weights(), evaluate(run, IMAGES, 0.5, [0], **how)
    runs.write_half(run, half := run.path / "weights-fp16.safetensors")
    assert not run.halved and same(run.weights(), exact)
    whole = (run.path / "weights.safetensors").stat().st_size
    (run.path / "weights.safetensors").unlink()
    assert run.halved and "weights as fp16" in repr(run) and half.stat().st_size < 0.6 * whole
    rounded = run.weights()
    assert all(tensor.dtype == exact[name].dtype for name, tensor in rounded.items())
    assert all(torch.allclose(tensor, exact[name], rtol=1e-3, atol=1e-6) for name, tensor in rounded.items())
    assert not same(rounded, exact) and train(tmp_path) == run and load_encoder(run)
    assert evaluate(run, IMAGES, 0.5, [0], **how) == rows and len(list((run.path / "evaluations").iterdir())) == 1
    evaluate(run, IMAGES, 0.5, [4], **how)
    protocols = [runs.read_json(path)["protocol"] for path in (run.path / "evaluations").iterdir()]
    assert sorted(protocol.get("rounded", "") for protocol in protocols) == ["", "fp16"]


def test_weights_as_fp16_that_are_damaged_or_of_another_run_are_refused(tmp_path):
    run = train(tmp_path)
    other = pretrain(PretrainConfig(**{**TINY, "seed": 1}), IMAGES, tmp_path, progress=False)
    runs.write_half(run, half := run.path / "weights-fp16.safetensors")
    (run.path / "weights.safetensors").unlink()
    content = half.read_bytes()
    half.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for use in (run.weights, run.check, lambda: load_encoder(run)):
        refused(use, "is damaged .its SHA-256 differs")
    half.write_bytes(content[: len(content) // 2])
    refused(run.weights, "is no safetensors file")
    runs.write_half(other, half)
    refused(run.weights, f"is of another run: copy the one that belongs to {run.path.name}")


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError(),
                                   OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_what_the_box_lacks_is_no_fault_of_a_file(tmp_path, monkeypatch, error):
    run, whole = train(tmp_path), Path.read_bytes
    trees.add("pets", plant(tmp_path / "tree"), root=tmp_path)

    def short(path):
        if path.parent == run.path:
            raise error
        return whole(path)

    def opened(*_, **__):
        raise error

    monkeypatch.setattr(Path, "read_bytes", short)
    monkeypatch.setattr(catalogue, "safe_open", opened)
    for use in (run.weights, lambda: run.history, lambda: data.load("pets", "train", tmp_path)):
        with pytest.raises(type(error)):
            use()
    if isinstance(error, OSError):  # negative control: what a disk answers is the file's
        error = OSError(errno.EIO, "Input/output error")
        for use in (run.weights, lambda: run.history, lambda: data.load("pets", "train", tmp_path)):
            refused(use, "Input.output error")


def test_while_a_lost_file_is_trained_again_the_old_mark_is_gone(tmp_path):
    run = train(tmp_path)
    (run.path / "history.csv").unlink()
    begun(tmp_path)
    assert not (run.path / "metrics.json").exists() and not run.finished


def test_the_list_of_experiments_looks_into_no_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "label-0").mkdir()
    (tmp_path / "label-0/config.json").write_text("damaged")
    monkeypatch.setenv("BAGSSL_RUNS", str(tmp_path))
    assert cli.main(["list"]) == 0 and "missing" in capsys.readouterr().out


def test_an_evaluation_belongs_to_the_weights_it_was_measured_on(tmp_path):
    """A run that was trained again elsewhere may have others; a damaged evaluation is measured again."""
    def measured() -> set[Path]:
        evaluate(run, IMAGES, 0.5, [0], probes=["knn"], scale=1, progress=False)
        return set((run.path / "evaluations").iterdir())

    run = train(tmp_path)
    (first,) = measured()
    sound, weights = first.read_bytes(), written(run)
    for damaged in (sound[:-20], sound.replace(b'"accuracy": ', b'"accuracy": 1'), b'{"rows": 3, "sha256": "0"}'):
        first.write_bytes(damaged)
        assert measured() == {first} and json.loads(first.read_text())["rows"] == json.loads(sound)["rows"]
    runs.finish(run, {name: 2 * tensor for name, tensor in weights.items()}, run.history, run.metrics, {})
    assert len(measured()) == 2


def test_a_store_that_cannot_be_written_is_still_read(tmp_path):
    run = train(tmp_path)
    (run.path / "checkpoint.pt").touch()  # its writer was killed when only this was left to remove

    def found():
        assert train(tmp_path) == run and load_encoder(run) and run.history
        with pytest.raises(PermissionError):  # and it cannot be written
            (run.path / "checkpoint.pt").unlink()

    with only_to_be_read(tmp_path):
        assert fork(found) == 0
    assert train(tmp_path) == run and not (run.path / "checkpoint.pt").exists()


# What is damaged


def test_a_history_that_ends_too_early_is_refused_wherever_it_ends(tmp_path):
    run = train(tmp_path)
    path, rows = run.path / "history.csv", run.history
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(lambda: run.history, "history.csv is damaged")
    path.write_bytes(whole)
    assert run.history == rows and len(rows) == 2


def test_one_changed_bit_anywhere_is_refused(tmp_path):
    run = train(tmp_path)
    for name in ("history.csv", "metrics.json", "provenance.json"):
        path = run.path / name
        whole = path.read_bytes()
        for place in range(0, len(whole), 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            try:
                found = run.history, run.metrics, run.provenance
            except InputError as error:
                assert "damaged" in str(error)
            else:  # it fell on the name of the hash, and on nothing that is read
                assert b'"sha256"' in whole[max(0, place - 9) : place + 9] and found[0]
        path.write_bytes(whole)
    assert run.history and run.metrics and run.provenance


@pytest.mark.parametrize("name", ["weights.safetensors", "history.csv", "metrics.json", "provenance.json"])
def test_a_damaged_run_is_not_taken_for_finished(name, tmp_path):
    run = train(tmp_path)
    path = run.path / name
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        path.write_bytes(damaged)
        refused(lambda: train(tmp_path), name)
    path.write_bytes(whole)
    assert train(tmp_path) == run


def test_a_folder_in_the_place_of_a_checkpoint_does_no_harm(tmp_path, capsys):
    run = train(tmp_path)
    (run.path / "metrics.json").unlink()
    (run.path / "checkpoint.pt").mkdir()
    assert train(tmp_path) == run and run.weights() and "training starts again" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors", "metrics.json"])
def test_a_folder_in_the_place_of_a_file_is_one_line(name, tmp_path):
    run = train(tmp_path)
    for path in (run.path / name, run.path / "metrics.json"):  # without the mark it is trained again
        path.unlink(missing_ok=True)
    (run.path / name).mkdir()
    refused(lambda: (train(tmp_path), load_encoder(run), run.metrics), name)
    (run.path / name).rmdir()
    assert train(tmp_path) == run and run.weights()


CONFIGS = [
    (lambda content: {**content, "recipe": runs.RECIPE + 1}, "use the newer one"),
    (lambda content: {**content, "config": {**content["config"], "rotation": 0.1}}, "newer bagssl.*'rotation'"),
    (lambda content: {**content, "config": {**content["config"], "objective": "dino2"}}, "newer bagssl.*'dino2'"),
    (lambda content: {"recipe": runs.RECIPE}, "damaged"),
    (lambda content: {**content, "recipe": "one"}, "damaged"),
    (lambda content: [content], "damaged"),
]


@pytest.mark.parametrize("change, message", CONFIGS)
def test_a_configuration_of_a_newer_version_is_one_line(change, message, tmp_path):
    run = train(tmp_path)
    path = run.path / "config.json"
    sound = path.read_bytes()
    content = json.loads(sound)
    del content["sha256"]
    path.write_text(json.dumps(change(content)))
    for use in (load_encoder, load_projector):
        refused(lambda use=use: use(run), f"config.json.*{message}")
    assert train(tmp_path) == run and path.read_bytes() == sound  # the key says what must stand there


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null"])
@pytest.mark.parametrize("name", ["config.json", "metrics.json", "provenance.json"])
def test_a_file_that_is_no_json_is_one_line(name, content, tmp_path):
    run = runs.Run(tmp_path)
    (tmp_path / name).write_bytes(content)
    refused(lambda: getattr(run, name.partition(".")[0]), f"{name} is damaged")


class Bomb:
    """What creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_weights_are_never_unpickled(tmp_path):
    run = train(tmp_path)
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    (run.path / "weights.safetensors").write_bytes(bomb)
    refused(lambda: load_encoder(run), "SHA-256 differs")
    runs.write_json(run.path / "metrics.json", {**run.metrics, "weights_sha256": hashlib.sha256(bomb).hexdigest()})
    refused(lambda: load_encoder(run), "no safetensors file")
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb).close()
    assert (tmp_path / "exploded").exists()  # it would have


@pytest.mark.parametrize("write", [lambda bomb, path: path.write_bytes(pickle.dumps(bomb)), torch.save])
def test_a_malicious_checkpoint_is_not_unpickled(write, tmp_path, capsys):
    straight = train(tmp_path / "straight")
    path = begun(tmp_path / "runs")
    write(Bomb(tmp_path / "exploded"), path)
    assert same(train(tmp_path / "runs").weights(), straight.weights())
    assert "training starts again" in capsys.readouterr().err and not (tmp_path / "exploded").exists()
    bomb = tmp_path / "bomb.pt"
    write(Bomb(tmp_path / "exploded"), bomb)
    if write is torch.save:
        torch.load(bomb, weights_only=False).close()
        assert (tmp_path / "exploded").exists()  # it would have


def test_one_changed_bit_in_a_checkpoint_means_training_again(tmp_path, capsys):
    """torch reads over it: a weight would be another one, and nobody would know."""
    path = begun(tmp_path)
    (run,) = runs.list_runs(tmp_path)
    whole, cpu = path.read_bytes(), torch.device("cpu")
    weight = runs.load_checkpoint(run, cpu)["model"]["projector.layers.0.weight"].numpy().tobytes()
    place = whole.index(weight) + len(weight) // 2
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert torch.load(path, weights_only=True)  # the reason for looking ourselves
    assert runs.load_checkpoint(run, cpu) is None
    assert "training starts again" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: Error code "
                                   "12 (Cannot allocate memory)"), OSError(errno.EMFILE, "Too many open files")])
def test_a_checkpoint_that_memory_does_not_suffice_for_is_no_damaged_one(error, tmp_path, monkeypatch):
    """To train again from the start would lose hours. Damage is told from it by the tests around this one."""
    path = begun(tmp_path)
    before = path.read_bytes()

    def load(*_, **__):
        raise error

    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(torch, "load", load)
        train(tmp_path)
    assert path.read_bytes() == before and train(tmp_path).finished


@pytest.mark.parametrize("state", [{"x": 1}, [1, 2], {}])
def test_a_checkpoint_of_another_kind_means_training_again(state, tmp_path, capsys):
    straight = train(tmp_path / "straight")
    torch.save(state, begun(tmp_path / "runs"))
    assert same(train(tmp_path / "runs").weights(), straight.weights())
    assert "training starts again" in capsys.readouterr().err


def test_weights_of_another_network_are_one_line(tmp_path):
    run = train(tmp_path)
    from safetensors.torch import save

    content = save({name: tensor for name, tensor in run.weights().items() if "layer3" not in name})
    (run.path / "weights.safetensors").write_bytes(content)
    runs.write_json(run.path / "metrics.json", {**run.metrics, "weights_sha256": hashlib.sha256(content).hexdigest()})
    refused(lambda: load_encoder(run), "not those of its config.json")
    assert load_projector(run)


# A disk that takes no more, or nothing


@contextlib.contextmanager
def only_to_be_read(folder: Path):
    """Nobody may write in `folder`; root is stopped in what `fork` starts, where it gives up its privileges."""
    paths = [folder, *folder.rglob("*")]
    before = [path.stat().st_mode for path in paths]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path, mode in zip(paths, before, strict=True):
            path.chmod(mode)


def on_a_small_disk(size: int, work) -> int:
    """The exit code of `work` in a process whose files may have `size` bytes: more is refused as on a full disk."""
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()

    return fork(limited)


@pytest.mark.parametrize("size", [0, 1000, 100_000])
def test_a_full_disk_stops_training_with_its_own_error_and_the_next_call_goes_on(size, tmp_path):
    straight = train(tmp_path / "straight")
    path = begun(tmp_path / "runs")
    before = path.read_bytes()
    assert len(before) > size

    def full():
        try:
            train(tmp_path / "runs", checkpoint_every=-1)
        except OSError as error:
            os._exit(error.errno)  # what pytest writes is limited as well

    assert on_a_small_disk(size, full) == errno.EFBIG
    assert path.read_bytes() == before and not list(tmp_path.rglob("*.tmp"))
    assert same(train(tmp_path / "runs").weights(), straight.weights())


# Keys


CONFIG = {"objective": "simclr", "options": {"temperature": 0.2}, "epochs": 3, "learning_rate": 4e-3}
KEY = "518b49f99781bdb6"


def test_the_key_of_a_run_is_the_same_on_every_machine():
    """Whatever the order of the settings, the spelling of a number and the seed of Python's hashes."""
    spellings = [CONFIG, dict(reversed(CONFIG.items())), {**CONFIG, "learning_rate": 0.004, "epochs": 3.0},
                 {**CONFIG, "options": {"temperature": 0.20}}, {**CONFIG, "min_scale": 1, "weight_decay": 1e-4}]
    assert {runs.run_key(PretrainConfig(**each).to_dict(), "0" * 64) for each in spellings} == {KEY}
    code = ("import json, sys; from bagssl import runs; from bagssl.config import PretrainConfig as C; "
            "print(runs.run_key(C.from_dict(json.loads(sys.argv[1])).to_dict(), '0' * 64), hash('a'))")
    done = subprocess.run([sys.executable, "-c", code, json.dumps(CONFIG)], capture_output=True, text=True, cwd=ROOT,
                          check=True, env={**os.environ, "PYTHONHASHSEED": "1"})  # fmt: skip
    key, other = done.stdout.split()
    assert key == KEY and int(other) != hash("a")


def test_other_data_is_another_run(tmp_path):
    changed = IMAGES.pixels.clone()
    changed[3, 1, 2, 0] ^= 1
    first, other = train(tmp_path), bagssl.data.Images(changed, IMAGES.labels, IMAGES.classes)
    config = PretrainConfig(**{**TINY, "epochs": 2})
    assert pretrain(config, other, tmp_path, progress=False).path != first.path and len(runs.list_runs(tmp_path)) == 2


# Many runs, several processes, any name


@pytest.mark.parametrize("name", ["Zoë's \"runs\" of [to]day*", "new\nline", os.fsdecode(b"no text \xff")])
def test_a_store_may_have_any_name(name, tmp_path):
    begun(tmp_path / name)
    run = train(tmp_path / name)
    assert runs.list_runs(tmp_path / name) == [run] and run.finished and load_encoder(run) and run.history


def test_a_thousand_runs_are_listed_without_reading_one(tmp_path):
    for i in range(1000):
        (tmp_path / f"label-{i:016x}").mkdir()
        (tmp_path / f"label-{i:016x}/config.json").touch()
    (tmp_path / "no-run").mkdir()
    opened = []
    sys.addaudithook(lambda event, arguments: opened.append(arguments) if event == "open" and listening else None)
    listening = True
    found = runs.list_runs(tmp_path)
    listening = False
    assert len(found) == 1000 and found[711].key == f"{711:016x}" and not opened


HOLD = """
import sys, time
from pathlib import Path
from bagssl import runs
with runs.locked(runs.Run(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_held_elsewhere_is_waited_for_and_its_holders_death_frees_it(tmp_path, monkeypatch):
    """As on a folder that two machines share; the lock is the system's, so no stale one can be left."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    said = []

    def notice(message):
        said.append(message)
        holder.kill()
        return contextlib.nullcontext()

    monkeypatch.setattr(runs, "notice", notice)
    with runs.locked(runs.Run(tmp_path)):
        assert holder.wait(60) < 0
    assert len(said) == 1 and "waiting" in said[0]
    with runs.locked(runs.Run(tmp_path)):  # the file of the lock is still there, and nobody holds it
        assert (tmp_path / ".lock").exists() and len(said) == 1
    holder.stdin.close()
    holder.stdout.close()


def test_another_repositorys_commit_is_not_ours(tmp_path, monkeypatch):
    """Unpacked inside another repository: no commit, rather than a false one. Negative control: a checkout."""
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b", *words], check=True)

    unpacked = tmp_path / "unpacked"
    (unpacked / "bagssl").mkdir(parents=True)
    (unpacked / "bagssl" / "runs.py").touch()
    git("init", "-q"), git("add", "."), git("commit", "-qm", "theirs")
    monkeypatch.setattr(runs, "home", lambda: unpacked)
    assert runs.provenance()["commit"] is None and runs.provenance()["dirty"] is None
    (unpacked / "bagssl").rename(tmp_path / "bagssl")
    monkeypatch.setattr(runs, "home", lambda: tmp_path)
    assert len(runs.provenance()["commit"]) == 40 and runs.provenance()["dirty"] is True


def test_asking_for_the_commit_leaves_no_lock_in_the_checkout(tmp_path, monkeypatch):
    """Where the disk is full git is killed as it writes its index, and its lock stops every commit from then on."""
    def git(*words):
        return subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b", *words],
                              check=False, capture_output=True)  # fmt: skip

    (tmp_path / "bagssl").mkdir()
    (tmp_path / "bagssl" / "runs.py").touch()
    git("init", "-q"), git("add", "."), git("commit", "-qm", "ours")
    monkeypatch.setattr(runs, "home", lambda: tmp_path)
    os.utime(tmp_path / "bagssl" / "runs.py", (1e9, 1e9))  # which git would write down when it is asked for the state
    assert on_a_small_disk(50, lambda: runs.provenance()) == 0
    assert not (tmp_path / ".git" / "index.lock").exists() and len(runs.provenance()["commit"]) == 40
    assert on_a_small_disk(50, lambda: git("status")) == 0 and (tmp_path / ".git" / "index.lock").exists()  # control
