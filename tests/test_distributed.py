"""Several processes train what one trains: the same crops, gradients and curves, one end for all, one who writes.

Executed as a script by torchrun this file is what the processes of the tests do.
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from bagssl import cli, distributed, patches, pretraining, runs
from bagssl.config import PretrainConfig
from bagssl.data import load
from bagssl.devices import pick_compiled
from bagssl.errors import Diverged, DoesNotFit, InputError, Lost, Stopped
from bagssl.objectives import OBJECTIVES
from bagssl.pretraining import Learner, pretrain

CPU = torch.device("cpu")
TINY = {"width": 8, "size": 8, "batch_size": 16, "views": 3, "projector_hidden": 16, "projector_dim": 8, "epochs": 4,
        "optimiser": "sgd", "learning_rate": 0.03}  # fmt: skip
COLOURED = {"training": "multi-scale", "blur": 0.5, "solarise": 0.2}
CASES = {name: {"objective": name, **COLOURED} for name in OBJECTIVES} | {
    "patches": {"objective": "simclr", "grid": 4}, "groups": {"objective": "byol", "norm_groups": 2},
    "groups of simclr": {"objective": "simclr", "norm_groups": 2}}  # fmt: skip
SPARED = {f"{name}, {' and '.join(how)}": (name, dict.fromkeys(how, True))
          for name, how in (("simclr", ["recompute"]), ("groups", ["accumulate"]),
                            ("groups of simclr", ["accumulate", "recompute"]), ("moco", ["recompute"]))}  # fmt: skip
BACKBONE = {"objective": "simclr", "encoder": "resnet50", "stem": "imagenet", "width": 16, "size": 64, "batch_size": 8,
            "views": 2, "norm_groups": 2}  # fmt: skip
ALL = {"recompute": True, "accumulate": True}
CURVES = ("simclr", "byol")
RESUMED = {"objective": "vicreg", "seed": 5}


def few():
    return load("synthetic", "train").take(torch.arange(0, 4000, 50))  # 80 images: 5 steps an epoch


@contextlib.contextmanager
def float64():
    """Networks in float64, so that what differs is no rounding; patches are as they always are."""
    def augment(*how):
        torch.set_default_dtype(torch.float32)
        try:
            return patches.augment(*how).double()
        finally:
            torch.set_default_dtype(torch.float64)

    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(pretraining, "augment", augment):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def one_step(images, settings, **spared) -> dict[str, Tensor]:
    """What a step of this process does: its crops; gradients, running statistics and terms, which all have."""
    seen = []
    learner = Learner(PretrainConfig(**{**TINY, **settings}), CPU, torch.float32, "none", **spared)
    learner.generator.manual_seed(3)
    batch = distributed.share(torch.arange(16), learner.config.norm_groups)
    augment = pretraining.augment
    with mock.patch.object(pretraining, "augment", lambda *how: seen.append(augment(*how)) or seen[0]):
        terms = learner.step(images.pixels[batch], 0.0, 1.0)
    buffers = [each.flatten().double() for each in learner.model.buffers()]
    return {"crops": seen[0], "gradients": gradients(learner), "buffers": torch.cat(buffers),
            "terms": torch.stack(list(terms.values()))}  # fmt: skip


def gradients(learner: Learner) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in learner.model.parameters()])


def twenty_steps(images) -> dict[str, Tensor]:
    """Twenty steps of a ResNet-50 with ImageNet's stem on patches of 64 px, and of one that saves memory, from the same
    weights at each step: with batches so small a difference in rounding grows a hundredfold from step to step.

    The gradients of the first step, and [20] how far those of the other are from them, and how far they have moved.
    """
    config = PretrainConfig(**{**TINY, **BACKBONE})
    plain, spared = (Learner(config, CPU, torch.float32, "none", **how) for how in ({}, ALL))
    each: list[Tensor] = []
    between, moved = [], []
    for step in range(20):
        batch = images.pixels[distributed.share(torch.arange(8), config.norm_groups)]
        spared.model.load_state_dict(plain.model.state_dict())
        for learner in (plain, spared):
            learner.generator.manual_seed(step)
            learner.step(batch, 0.03, 1.0)
        one, other = map(gradients, (plain, spared))
        each.append(one)
        between.append(apart(other, one))
        moved.append(apart(one, each[0]))
        buffers = zip(plain.model.buffers(), spared.model.buffers(), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-9) for a, b in buffers)
    return {"gradients": each[0], "between": torch.tensor(between), "moved": torch.tensor(moved)}


def steps(images, faults) -> dict[str, dict[str, Tensor]]:
    """One step of each case, and with each fault that a step might have."""
    found = {name: one_step(images, settings) for name, settings in CASES.items()}
    found |= {name: one_step(images, CASES[of], **how) for name, (of, how) in SPARED.items()}
    for name, (where, what, fault) in faults.items():
        with mock.patch.object(where, what, fault):
            found[name] = one_step(images, CASES["simclr"])
    return found


def detached(z: Tensor, groups: int = 1) -> Tensor:
    return distributed.gather(z.detach(), groups) + 0 * z.sum()


FAULTS = {
    "no factor": (distributed._Weighted, "backward", staticmethod(lambda ctx, gradient: gradient)),
    "local batch-norm": (distributed, "synchronised", lambda model, device: model),
    "local objective": (pretraining, "gather", lambda z, groups=1: z),
    "detached": (pretraining, "gather", detached),
}


def train(images, root, **how):
    settings = {name: how.pop(name) for name in list(how) if name in PretrainConfig.__dataclass_fields__}
    return pretrain(PretrainConfig(**{**TINY, **settings}), images, root, progress=False, precision="fp32", **how)


def some_steps(images, root, count=3):
    """So many steps of a run that is stopped after each."""
    for _ in range(count):
        with contextlib.suppress(Stopped):
            train(images, root, time_limit=0, **RESUMED)


def as_one_of_several(folder: Path) -> None:
    """What each process of a world does."""
    images, world = few(), distributed.launched()
    with float64():
        with distributed.led(contextlib.nullcontext()), distributed.group(CPU):
            torch.save(steps(images, FAULTS), folder / f"steps-{world}-{distributed.rank()}.pt")
            if world == 2:
                torch.save(twenty_steps(images), folder / f"backbone-{distributed.rank()}.pt")
        for objective in CURVES:
            run = train(images, folder / f"curves-{world}", objective=objective)
        assert train(images, folder / f"curves-{world}", objective=CURVES[-1]) == run and run.finished
        with pytest.raises(Diverged) as error:
            train(images, folder / "diverged", objective="vicreg", learning_rate=1e3)
        (folder / f"diverged-{world}-{distributed.rank()}").write_text(str(error.value))
        if world == 2:
            some_steps(images, folder / "resumed")
        else:
            train(images, folder / "resumed", **RESUMED)


def as_a_command(fault: str, words: list[str]) -> int:
    """`bagssl pretrain` that saves a checkpoint after each step; of two processes the second may have a fault."""
    pretraining.pretrain.__kwdefaults__["checkpoint_every"] = 0
    augment, count = pretraining.augment, []

    def faulty(*how):
        count.append(0)
        if fault != "none" and distributed.rank() == 1 and len(count) == 4:
            raise {"long": DoesNotFit("it takes too long"), "bug": ValueError("a bug")}[fault]
        return augment(*how)

    pretraining.augment = faulty
    return cli.main(["pretrain", *words])


def torchrun(count: int, *words: object, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *words]
    return started(command, **environment)


def started(command, **environment: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env=environment, cwd=Path(__file__).parents[1])  # fmt: skip


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The folder in which 2 processes, one, and 4 have left what they did, in this order."""
    folder = tmp_path_factory.mktemp("worlds")
    images = few()
    for count in (2, 4):
        process = torchrun(count, __file__, "world", folder)
        _, said = process.communicate()
        assert process.returncode == 0, said
        if count == 2:
            with float64():
                some_steps(images, folder / "resumed")
    with float64():
        torch.save(steps(images, {}), folder / "steps-1-0.pt")
        for objective in CURVES:
            train(images, folder / "curves-1", objective=objective)
        train(images, folder / "straight", **RESUMED)
    return folder


@functools.cache
def found(worlds, count):
    return [torch.load(worlds / f"steps-{count}-{rank}.pt") for rank in range(count)]


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


MANY = pytest.mark.parametrize("count", [2, 4])


@MANY
@pytest.mark.parametrize("case", CASES)
def test_many_processes_have_the_gradients_of_one(worlds, count, case):
    (one,) = found(worlds, 1)
    for rank in found(worlds, count):
        assert apart(rank[case]["gradients"], one[case]["gradients"]) < 1e-10
        assert apart(rank[case]["buffers"], one[case]["buffers"]) < 1e-12  # running statistics, and how many batches
        torch.testing.assert_close(rank[case]["terms"], one[case]["terms"], rtol=1e-10, atol=1e-12)
        assert torch.equal(rank[case]["gradients"], found(worlds, count)[0][case]["gradients"])


@MANY
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_show_in_the_gradients(worlds, count, fault):
    (one,) = found(worlds, 1)
    for rank in found(worlds, count):
        assert apart(rank[fault]["gradients"], one["simclr"]["gradients"]) > 0.05


@MANY
@pytest.mark.parametrize("case", CASES)
def test_crops_do_not_depend_on_the_number_of_processes(worlds, count, case):
    (one,) = found(worlds, 1)
    groups = CASES[case].get("norm_groups", 1)
    each = [rank[case]["crops"].unflatten(1, (groups, -1)) for rank in found(worlds, count)]
    assert all(part.shape[1] * part.shape[2] == 16 // count for part in each)
    assert torch.equal(torch.stack(each, 2).flatten(1, 3), one[case]["crops"])


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("spared", SPARED)
def test_what_is_computed_again_changes_neither_gradients_nor_statistics(worlds, count, spared):
    (one,), plain = found(worlds, 1), SPARED[spared][0]
    for rank in found(worlds, count):
        for what in ("gradients", "buffers"):
            assert apart(rank[spared][what], one[plain][what]) < 1e-10


def test_a_resnet_50_on_64_px_has_by_two_processes_that_save_memory_the_gradients_of_one_that_does_not(worlds):
    with float64():
        one = twenty_steps(few())
    for rank in range(2):
        two = torch.load(worlds / f"backbone-{rank}.pt")
        assert apart(two["gradients"], one["gradients"]) < 1e-9  # of the first step; later ones are of other weights
        assert two["between"].max() < 1e-9 and two["moved"][1:].min() > 0.1  # each step changes the network
    # the control: statistics of the whole batch at once give other gradients
    with float64():
        learner = Learner(PretrainConfig(**{**TINY, **BACKBONE, "norm_groups": 1}), CPU, torch.float32, "none")
        learner.generator.manual_seed(0)
        learner.step(few().pixels[:8], 0.03, 1.0)
    assert apart(gradients(learner), one["gradients"]) > 0.05


def test_groups_of_a_batch_have_statistics_of_their_own(worlds):
    """Another number of groups is another run; what is computed again without them being counted would show."""
    (one,) = found(worlds, 1)
    assert apart(one["groups of simclr"]["gradients"], one["patches"]["gradients"]) > 0.05
    keys = {runs.run_key(PretrainConfig(**TINY, norm_groups=groups).to_dict(), "data") for groups in (1, 2, 4)}
    assert len(keys) == 3


def test_what_is_computed_again_is_not_kept_and_counted_once(monkeypatch):
    kept, images = {}, few()
    for how in ((), ("recompute",), ("accumulate",), ("accumulate", "recompute")):
        bytes_ = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, n=bytes_: n.append(x.numel()) or x, lambda x: x):
            first = one_step(images, {"objective": "simclr", "norm_groups": 2}, **dict.fromkeys(how, True))
        kept[how] = sum(bytes_)
        assert first["buffers"].max() == 2  # batches of each norm: one for each group
    assert kept["recompute",] < 0.7 * kept[()]
    monkeypatch.setattr("bagssl.recomputing._counted", lambda norms: contextlib.nullcontext())
    again = one_step(images, {"objective": "simclr", "norm_groups": 2}, accumulate=True)
    assert again["buffers"].max() == 4


@MANY
@pytest.mark.parametrize("objective", CURVES)
def test_curves_over_twenty_steps_are_those_of_one_process(worlds, count, objective):
    many, one = ({run.config["objective"]: run for run in runs.list_runs(worlds / f"curves-{n}")}[objective]
                 for n in (count, 1))  # fmt: skip
    assert many.key == one.key and len(one.history) == 20
    for a, b in zip(many.history, one.history, strict=True):
        assert all(a[name] == pytest.approx(b[name], rel=1e-7, abs=1e-9) for name in b if name != "crops_per_second")
    assert many.provenance["processes"] == count and "processes" not in one.provenance
    weights, wanted = many.weights(), one.weights()
    assert weights.keys() == wanted.keys() and all(torch.allclose(weights[n], wanted[n], 1e-6, 1e-8) for n in wanted)


def test_stopped_it_goes_on_with_another_number_of_processes(worlds):
    (run,), (straight,) = (runs.list_runs(worlds / name) for name in ("resumed", "straight"))
    assert run.key == straight.key
    parts = [(part.get("processes", 1), part["until"]) for part in run.provenance["parts"]]
    assert parts == [(2, 3), (1, 6), (4, 20)]
    weights, wanted = run.weights(), straight.weights()
    assert all(torch.allclose(weights[name], wanted[name], 1e-6, 1e-8) for name in wanted)


@MANY
def test_a_training_that_diverges_ends_all_in_the_same_words(worlds, count):
    (said,) = {(worlds / f"diverged-{count}-{rank}").read_text() for rank in range(count)}
    assert "'loss' is" in said


# ---- how it ends


SMALL = ["--dataset", "synthetic", "--objective", "simclr", "--set", "epochs=50",
         *(word for name, value in TINY.items() if name != "epochs" for word in ("--set", f"{name}={value}"))]


def checkpoint(root: Path) -> int:
    """The step of the one checkpoint that is there, or 0."""
    with contextlib.suppress(ValueError, OSError, RuntimeError, EOFError):
        (path,) = root.glob("*/checkpoint.pt")
        return torch.load(path, weights_only=True)["step"]
    return 0


def until(true, process, seconds=120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


def workers(process) -> list[int]:
    """The processes that a launcher has started, by their rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            words = dict(word.split("=", 1) for word in path.read_text().split("\0") if "=" in word)
            parent = int(re.search(r"\nPPid:\s+(\d+)", (path.parent / "status").read_text())[1])
            if parent == process.pid and "RANK" in words:
                found[int(words["RANK"])] = int(path.parent.name)
    return [found[rank] for rank in sorted(found)]


def trains(worker: int) -> bool:
    """Whether a process has come to the steps, where SIGTERM only asks for a stop."""
    with contextlib.suppress(OSError):
        caught = re.search(r"\nSigCgt:\s+(\w+)", Path(f"/proc/{worker}/status").read_text())[1]
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
    return False


def ours(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("bagssl: ")]


@pytest.fixture
def root():
    return Path(os.environ["BAGSSL_RUNS"])


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_killed_or_hanging_it_ends_the_others_with_one_line_and_the_next_start_goes_on(root):
    process = torchrun(2, __file__, "command", "none", *SMALL)
    until(lambda: checkpoint(root) > 3, process)
    os.kill(workers(process)[0], signal.SIGKILL)
    killed = time.monotonic()
    _, said = process.communicate()
    assert process.returncode and time.monotonic() - killed < 30
    assert len(ours(said)) == 1, said
    (line,) = ours(said)
    assert "another process of this training has ended; the next call goes on from the last checkpoint" in line

    before = checkpoint(root)
    process = torchrun(2, __file__, "command", "none", *SMALL, BAGSSL_TIMEOUT="4")
    until(lambda: checkpoint(root) > before, process)  # it went on from there
    hanging = workers(process)[1]
    os.kill(hanging, signal.SIGSTOP)
    stopped = time.monotonic()
    for line in process.stderr:
        if line.startswith("bagssl: "):
            break
    took = time.monotonic() - stopped
    os.kill(hanging, signal.SIGCONT)  # torchrun would kill it after half a minute
    _, said = process.communicate()
    assert 3 < took < 30 and process.returncode and not ours(said)
    assert "another process of this training has not answered for 4 s (BAGSSL_TIMEOUT)" in line


@pytest.mark.parametrize("fault", ["long", "bug"])
def test_one_that_raises_ends_the_others_with_one_line(root, fault):
    process = torchrun(2, __file__, "command", fault, *SMALL)
    _, said = process.communicate(timeout=120)
    assert process.returncode and checkpoint(root) == 3
    wanted = {"long": "it takes too long", "bug": "another process of this training has failed"}[fault]
    assert [wanted in line for line in ours(said)] == [True]
    assert ("ValueError: a bug" in said) == (fault == "bug")
    assert fault == "bug" or said.count("exitcode  : 3") >= 1


def test_an_evaluation_by_two_processes_is_that_of_one(root, tmp_path):
    config = PretrainConfig(**{**TINY, "objective": "simclr", "training": "untrained"})
    run = pretrain(config, load("synthetic", "train"), progress=False)
    command = ["-m", "bagssl.cli", "evaluate", run.path.name, "--dataset", "synthetic", "--ks", "0,1,5", "--scales",
               "0.3", "--train-images", "301", "--test-images", "100"]  # fmt: skip
    found = {}
    for processes in (2, 1):
        process = started([sys.executable, *command, "--processes", processes])
        table, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        rows = [runs.read_json(path)["rows"] for path in sorted((run.path / "evaluations").glob("*.json"))]
        found[processes] = table, rows
        shutil.rmtree(run.path / "evaluations")  # so that the next measures anew
    assert found[1] == found[2] and len(found[1][1]) == 2 and found[1][0].count("\n") == 7
    # what is no work for several is refused once
    process = torchrun(2, "-m", "bagssl.cli", "list")
    _, said = process.communicate(timeout=120)
    assert process.returncode and len(ours(said)) == 1 and "list is work for one process" in ours(said)[0]


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("end", ["killed", "hanging", "interrupted"])
def test_an_evaluation_that_is_ended_ends_all_and_keeps_what_was_measured(root, end):
    config = PretrainConfig(**{**TINY, "objective": "simclr", "training": "untrained"})
    run = pretrain(config, load("synthetic", "train"), progress=False)
    process = started([sys.executable, "-m", "bagssl.cli", "evaluate", run.path.name, "--dataset", "synthetic", "--ks",
                       "0,4000", "--scales", "0.3", "--processes", "2"], BAGSSL_TIMEOUT="4")  # fmt: skip
    measured = run.path / "evaluations"
    until(lambda: list(measured.glob("*.json")), process)  # the centre crop; the bags will take minutes
    time.sleep(1)
    begun, peers = time.monotonic(), workers(process)
    if end == "interrupted":
        process.send_signal(signal.SIGINT)
    else:
        os.kill(peers[1], signal.SIGKILL if end == "killed" else signal.SIGSTOP)
    if end == "hanging":
        line = next(line for line in process.stderr if line.startswith("bagssl: "))
        assert 3 < time.monotonic() - begun < 30
        os.kill(peers[1], signal.SIGCONT)  # the launcher would kill it after half a minute
        _, said = process.communicate(timeout=60)
        said = line + said
    else:
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - begun < 30
    (line,) = ours(said)
    # whichever reaches the other process first: the transport's end, or the launcher's SIGTERM
    wanted = {"killed": "another process of (it|this evaluation) has ended; the next call goes on after what",
              "interrupted": "interrupted, or", "hanging": "of this evaluation has not answered for 4 s"}  # fmt: skip
    assert re.search(wanted[end], line) and len(list(measured.glob("*.json"))) == 1
    assert process.returncode == 130 if end == "interrupted" else process.returncode


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("how", ["distributed.leave(3)", "sys.exit(3)"])
def test_one_of_several_leaves_before_the_interpreter_is_taken_apart(how):
    code = f"""
import atexit, os, sys
from bagssl import distributed
class Late:
    def __del__(self, write=os.write): write(2, b"late")
late = Late()
atexit.register(print, "registered")
print("said")
{how}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "said\nregistered\n")
    assert done.stderr == ("late" if "exit" in how else "")


def test_ctrl_c_leaves_a_checkpoint_and_code_130_and_a_lock_is_waited_for_longer_than_a_peer(root):
    config = PretrainConfig(**{**TINY, "objective": "simclr", "epochs": 50})
    run = runs.open_run(config.to_dict(), load("synthetic", "train").fingerprint, config.label)
    command = [sys.executable, "-m", "bagssl.cli", "pretrain", "--processes", "2", *SMALL]
    with runs.locked(run):
        process = started(command, BAGSSL_TIMEOUT="3")
        assert "is being trained by another process: waiting for it" in process.stderr.readline()
        time.sleep(5)
    until(lambda: [trains(worker) for worker in workers(process)] == [True] * 2, process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and checkpoint(root) > 0
    (line,) = said.splitlines()
    assert re.match(r"bagssl: synthetic-simclr-patch-based-seed0 stopped at step \d+ of .*; the next call goes", line)


# ---- what is refused


@pytest.fixture
def as_three(monkeypatch):
    for name, value in {"MASTER_ADDR": "localhost", "WORLD_SIZE": "3", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("settings, answer", [
    ({}, "batch_size = 16 cannot be shared by 3 processes: make it a multiple of 3"),
    ({"batch_size": 24, "norm_groups": 2, "views": 2}, None),
    ({"batch_size": 12, "norm_groups": 6}, "12 cannot be shared by 3 processes and norm_groups = 6.*multiple of 18"),
])  # fmt: skip
def test_a_batch_that_cannot_be_shared_is_refused(as_three, tmp_path, settings, answer):
    if answer is None:
        return pretraining._check_shares(PretrainConfig(**{**TINY, **settings}), False)
    with pytest.raises(InputError, match=answer):
        train(few(), tmp_path / "runs", **settings)
    assert not (tmp_path / "runs").exists()


def test_accumulation_without_groups_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="set norm_groups to 2 or more"):
        train(few(), tmp_path / "runs", accumulate=True)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(InputError, match="no multiple of norm_groups"):
        PretrainConfig(**TINY, norm_groups=3)


@pytest.mark.parametrize("value", ["soon", "0", "nan", "-1"])
def test_a_timeout_that_is_none_is_refused(value, monkeypatch):
    monkeypatch.setenv("BAGSSL_TIMEOUT", value)
    with pytest.raises(InputError, match="BAGSSL_TIMEOUT"):
        distributed.timeout()


def test_each_process_takes_a_gpu_of_its_own(as_three, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.own(CPU) == CPU and not taken
    assert distributed.own(torch.device("cuda")) == torch.device("cuda", 1) and taken == [1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="1 GPU for 2 processes or more"):
        distributed.own(torch.device("cuda"))


def test_where_activations_or_batches_are_shared_the_colours_alone_are_compiled():
    cuda = torch.device("cuda")
    wanted = {"auto": "none", "none": "none", "colours": "colours", "all": "colours", "graphs": "none"}
    assert {name: pick_compiled(name, cuda, 1, plain=True) for name in wanted} == wanted
    assert pick_compiled("all", cuda, 1) == "all"


def test_in_one_process_nothing_is_gathered_nor_wrapped(tmp_path):
    z = torch.rand(2, 4, 3)
    assert distributed.gather(z) is z and distributed.share(z) is z and distributed.agreed(2) == 2
    learner = Learner(PretrainConfig(**TINY), CPU, torch.float32, "none")
    assert learner.embed is learner.model and type(learner.model.encoder.bn1) is torch.nn.BatchNorm2d
    run = train(few(), tmp_path, epochs=1, recompute=True, norm_groups=2, accumulate=True)
    assert run.provenance["recompute"] and run.provenance["accumulate"] and "compiled" not in run.provenance


def test_an_error_that_all_share_survives_its_way():
    for error in (Stopped("at 5", interrupted=True), Lost("gone"), InputError("no"), DoesNotFit("long"), Diverged("x")):
        again = distributed._read(distributed._written(error))
        assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)


if __name__ == "__main__":
    if sys.argv[1] == "world":
        distributed.leave(as_one_of_several(Path(sys.argv[2])) or 0)
    else:
        distributed.leave(as_a_command(sys.argv[2], sys.argv[3:]))
