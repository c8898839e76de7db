"""The one loop: it resumes to the bit, trains once, stops with a reason, and refuses senseless settings."""

import contextlib
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bagssl import graphs, objectives, pretraining, recording, runs
from bagssl.config import PretrainConfig
from bagssl.data import load
from bagssl.errors import Diverged, InputError, Stopped
from bagssl.objectives import OBJECTIVES
from bagssl.pretraining import Learner, learning_rate_at, load_encoder, load_projector, pretrain

TINY = {"width": 8, "size": 8, "batch_size": 16, "views": 2, "projector_hidden": 16, "projector_dim": 8, "epochs": 3}


@pytest.fixture(scope="module")
def images():
    return load("synthetic", "train").take(torch.arange(0, 4000, 50))  # 80 images: 5 steps an epoch


def train(images, root, **how):
    settings = {name: how.pop(name) for name in list(how) if name in PretrainConfig.__dataclass_fields__}
    return pretrain(PretrainConfig(**{**TINY, **settings}), images, root, progress=False, **how)


def same_weights(a, b):
    a, b = a.weights(), b.weights()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("training", ["patch-based", "multi-scale"])
def test_every_objective_trains_on_three_views(images, tmp_path, objective, training):
    run = train(images, tmp_path, objective=objective, training=training, views=3, epochs=1)
    history = run.history
    assert run.finished and run.metrics["crops"] == 5 * 16 * 3 == history[-1]["crops"]
    assert all(math.isfinite(value) for row in history for value in row.values())
    assert load_encoder(run)(torch.rand(2, 3, 8, 8)).shape == (2, 64)
    assert load_projector(run)(torch.rand(2, 64)).shape == (2, 8)


@pytest.mark.parametrize("optimiser", ["sgd", "lars", "adamw"])
def test_the_loss_falls(images, tmp_path, optimiser):
    rate = {"sgd": 0.03, "lars": 0.3, "adamw": 4e-3}[optimiser]
    run = train(images, tmp_path, optimiser=optimiser, learning_rate=rate, epochs=40, objective="simclr")
    losses = [row["loss"] for row in run.history]
    quarter = len(losses) // 4  # of the run: single steps differ more than the loss falls
    assert sum(losses[-quarter:]) < sum(losses[:quarter])


class _OnMeta(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    device = torch.device("meta")


class _Copies(TorchDispatchMode):
    """The copies from one device to another for which the program waits."""

    def __init__(self):
        super().__init__()
        self.waited = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        moved = isinstance(result, torch.Tensor) and any(
            isinstance(a, torch.Tensor) and a.device != result.device for a in args)  # fmt: skip
        if moved and not (kwargs or {}).get("non_blocking"):
            self.waited.append(str(func))
        return result


@pytest.fixture
def on_meta(images, monkeypatch):
    """Trains two steps on the meta device, whose tensors have no values: to ask for one is an error.

    Only what would be logged is made up. Returns the copies between devices that were waited for since the first step.
    """
    copies, augment = _Copies(), pretraining.augment
    monkeypatch.setattr(torch, "Generator", _OnMeta)
    monkeypatch.setattr(torch, "autocast", lambda *args, **how: contextlib.nullcontext())
    monkeypatch.setattr(runs, "load_checkpoint", lambda *args: None)
    monkeypatch.setattr(runs, "finish", lambda *args: None)
    monkeypatch.setattr(recording, "_means", lambda sums, steps: dict.fromkeys(sums, 1.0))

    def train(augment=augment, **settings):
        def first(*how):
            monkeypatch.setattr(pretraining, "augment", augment)
            copies.waited.clear()
            return augment(*how)

        monkeypatch.setattr(pretraining, "augment", first)
        recipe = {"size": 8, "width": 8, "batch_size": 16, "epochs": 2, "optimiser": "sgd", "weight_decay": 1e-4}
        config, few = PretrainConfig.from_dict({**recipe, **settings}), images.take(torch.arange(16))
        with copies:
            learner = Learner(config, torch.device("meta"), torch.float32, "none")
            pretraining.train(learner, few, None, math.inf, 1e9, False)
        return copies.waited

    return train


@pytest.mark.parametrize("settings", [
    *({"objective": each, "training": "multi-scale", "blur": 0.5, "solarise": 0.2} for each in OBJECTIVES),
    {"optimiser": "lars"}, {"grid": 4}])  # fmt: skip
def test_no_step_waits_for_the_device(on_meta, settings):
    assert not on_meta(**settings)


def test_a_step_that_waits_is_found(on_meta, monkeypatch):
    """Negative controls: images that come from elsewhere in each step, and a value that is looked at."""
    def elsewhere(batch, *how, augment=pretraining.augment):
        return augment(torch.zeros(batch.shape, dtype=torch.uint8).to("meta"), *how)

    assert on_meta(elsewhere)
    spread = pretraining.spread
    monkeypatch.setattr(pretraining, "spread", lambda z: spread(z) if z.sum() else None)
    with pytest.raises(RuntimeError, match="meta"):
        on_meta()


@pytest.mark.gpu
@pytest.mark.parametrize("optimiser", ["sgd", "lars", "adamw"])
def test_no_step_waits_for_a_gpu(images, tmp_path, monkeypatch, optimiser):
    means = recording._means

    def read(*how):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return means(*how)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    def augmented(*how):
        torch.cuda.set_sync_debug_mode("error")  # from the first step on
        return augment(*how)

    augment = pretraining.augment
    monkeypatch.setattr(recording, "_means", read)
    monkeypatch.setattr(pretraining, "augment", augmented)
    monkeypatch.setattr(runs, "finish", lambda *how: torch.cuda.set_sync_debug_mode("default"))
    try:
        train(images, tmp_path, device="cuda", training="multi-scale", optimiser=optimiser, blur=0.5, epochs=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _learner(device="cpu", compiled="none", **settings):
    config = PretrainConfig(**{**TINY, "optimiser": "lars", "learning_rate": 0.3, **settings})
    return Learner(config, torch.device(device), torch.float32, compiled)


@pytest.mark.parametrize("settings", [
    {"optimiser": "lars", "lars_clip": True}, {"optimiser": "lars", "objective": "byol"}, {"optimiser": "adamw"}])
def test_rates_may_be_tensors_as_a_graph_needs_them(images, settings):
    numbers, tensors = (_learner(**settings) for _ in range(2))
    for step, (rate, decay) in enumerate([(0.1, 0.9), (0.3, 0.95), (0.01, 1.0)]):
        for learner, kind in ((numbers, float), (tensors, torch.tensor)):
            learner.generator.manual_seed(step)
            learner.step(images.pixels[:16], kind(rate), kind(decay))
    for network in ("model", "teacher") if "objective" in settings else ("model",):
        pairs = zip(*(getattr(learner, network).parameters() for learner in (numbers, tensors)), strict=True)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    # negative control: another rate in one step shows
    tensors.generator.manual_seed(3), numbers.generator.manual_seed(3)
    tensors.step(images.pixels[:16], torch.tensor(0.1), torch.tensor(0.9))
    numbers.step(images.pixels[:16], 0.11, 0.9)
    assert not torch.allclose(numbers.model.encoder.conv1.weight, tensors.model.encoder.conv1.weight, atol=1e-6)


def _step_by_step(pixels, plain, other, take_step, steps=8):
    """The largest relative difference of a step's loss, and of its change of the weights, each from the same state.

    Over several steps nothing could be compared: a GPU adds in an order that differs, and training magnifies that
    tenfold at every step.
    """
    def flat(learner):
        nets = [learner.model] if learner.teacher is None else [learner.model, learner.teacher]
        return torch.cat([p.detach().flatten() for net in nets for p in net.parameters()]).double().cpu()

    def match():  # in place, so that a graph sees it
        other.model.load_state_dict(plain.model.state_dict())
        if plain.teacher is not None:
            other.teacher.load_state_dict(plain.teacher.state_dict())
        states = (learner.optimiser.state.values() for learner in (plain, other))
        for of_plain, of_other in zip(*states, strict=True):
            for name, value in of_plain.items():
                of_other[name].copy_(value)

    apart = []
    for step in range(steps):
        match()
        before, after, losses = flat(plain), [], []
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(step))
        batch = pixels[order[:16]].to(plain.device)
        for learner, take in ((plain, plain.step), (other, take_step)):
            learner.generator.manual_seed(step)
            losses.append(take(batch, plain.config.learning_rate / (step + 1), 0.5 + step / 100)["loss"].item())
            after.append(flat(learner) - before)
        apart.append((abs(losses[1] / losses[0] - 1), ((after[1] - after[0]).norm() / after[0].norm()).item()))
    return tuple(map(max, zip(*apart, strict=True)))


_TCR = {"options": {"invariance": 20}}  # with more these networks, tiny as they are, collapse
GRAPHED = [*({"objective": each, "training": "multi-scale", "blur": 0.5, "solarise": 0.2, "learning_rate": 0.1,
              **(_TCR if each == "tcr" else {})} for each in OBJECTIVES),
           *({"learning_rate": rate, **how, **_TCR} for how, rate in (
               ({"optimiser": "sgd"}, 0.03), ({"optimiser": "adamw"}, 4e-3), ({"grid": 8}, 0.1)))]


@pytest.mark.gpu
@pytest.mark.parametrize("settings", GRAPHED)
def test_a_graph_takes_the_steps_that_it_captured(images, monkeypatch, settings):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain, graphed = (_learner("cuda", compiled, **settings) for compiled in ("none", "graphs"))
    loss, change = _step_by_step(images.pixels, plain, graphed, graphs.Replayed(graphed))
    assert loss < 1e-4 and change < 2e-2


@pytest.mark.parametrize("settings", GRAPHED)
def test_what_a_graph_might_get_wrong_would_show(images, settings):
    """The comparison of graphs tried on a CPU: nothing apart from equal steps, and each fault far above its bounds."""
    plain, other = (_learner(**settings) for _ in range(2))
    assert _step_by_step(images.pixels, plain, other, other.step) == (0, 0)
    first = []

    def stale(which):  # what a graph does that has kept the value of an early step
        def take(*given):
            if len(first) < 4:
                first[:] = [*first, given]
            return other.step(*(first[3][i] if i == which and len(first) > 3 else x for i, x in enumerate(given)))
        return take

    for which in range(3 if plain.teacher is not None else 2):
        first.clear()
        assert max(_step_by_step(images.pixels, plain, other, stale(which))) > 5e-2, which

    def redrawn(*given):
        other.generator.manual_seed(0)
        return other.step(*given)

    assert min(_step_by_step(images.pixels, plain, other, redrawn)) > 5e-3


@pytest.mark.gpu
def test_a_run_of_graphs_resumes(images, tmp_path):
    for _ in range(3):
        with pytest.raises(Stopped):
            train(images, tmp_path, compiled="graphs", device="cuda", time_limit=0, epochs=2)
    run = train(images, tmp_path, compiled="graphs", device="cuda", epochs=2)
    assert run.provenance["compiled"] == "graphs" and [row["step"] for row in run.history] == [*range(1, 11)]


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_is_refused_in_one_line(images, tmp_path, monkeypatch):
    def waits(z):
        return {"loss": z.square().mean() * (1 if z.sum().item() else 2)}

    monkeypatch.setitem(objectives.OBJECTIVES, "tcr", objectives.Objective(waits))
    with pytest.raises(InputError, match="set BAGSSL_COMPILE=none") as error:
        train(images, tmp_path, device="cuda", compiled="graphs")
    assert "\n" not in str(error.value)
    assert train(images, tmp_path, device="cuda", compiled="none").finished


def test_what_is_compiled_trains_the_same_network(images, tmp_path, monkeypatch):
    """What torch.compile is asked to make; what it makes of it, `bagssl bench compiled` runs."""
    compiled, called = [], set()

    def by(function):
        name = getattr(function, "__name__", type(function).__name__)
        compiled.append(name)
        return lambda *what: called.add(name) or function(*what)

    monkeypatch.setattr(torch, "compile", by)
    settings = {"objective": "byol", "blur": 0.5, "solarise": 0.2, "optimiser": "sgd", "epochs": 0.2}  # one step
    plain = train(images, tmp_path / "plain", **settings)
    assert not compiled and "compiled" not in plain.provenance
    whole = train(images, tmp_path / "whole", **settings, compiled="all")
    assert compiled == ["apply_colour", "Model", "Model"]
    assert whole.provenance["compiled"] == "all" and whole.key == plain.key
    assert called == set(compiled) and same_weights(whole, plain)
    monkeypatch.setenv("BAGSSL_COMPILE", "colours")
    train(images, tmp_path / "colours", **settings)
    assert compiled[3:] == ["apply_colour"]


@pytest.mark.parametrize("name, answer", [("everything", "known: none, colours"), ("graphs", "CUDA graphs need a GPU")])
def test_what_cannot_be_compiled_is_refused_before_anything_is_made(images, tmp_path, monkeypatch, name, answer):
    monkeypatch.setenv("BAGSSL_COMPILE", name)
    with pytest.raises(InputError, match=answer):
        train(images, tmp_path, device="cpu")
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_reused_and_its_key_has_no_hardware_in_it(images, tmp_path):
    first = train(images, tmp_path)
    written = (first.path / "metrics.json").stat().st_mtime_ns
    again = train(images, tmp_path, precision="bf16", time_limit=1e9)
    assert again.key == first.key and (again.path / "metrics.json").stat().st_mtime_ns == written
    assert train(images, tmp_path, seed=1).key != first.key
    assert train(images.take(torch.arange(64)), tmp_path).key != first.key
    recorded = {"commit", "dirty", "versions", "hardware", "seed", "data", "precision", "wall_seconds"}
    assert recorded <= set(first.provenance)


def test_the_recipe_version_is_part_of_the_key(images, tmp_path, monkeypatch):
    first = train(images, tmp_path)
    monkeypatch.setattr(runs, "RECIPE", runs.RECIPE + 1)
    assert train(images, tmp_path).key != first.key


def test_same_seed_same_weights(images, tmp_path):
    assert same_weights(train(images, tmp_path / "a"), train(images, tmp_path / "b"))
    assert not same_weights(train(images, tmp_path / "a"), train(images, tmp_path / "a", seed=1))


@pytest.mark.parametrize("objective", ["tcr", "byol", "moco"])
def test_stopped_at_every_step_it_ends_with_the_same_weights(images, tmp_path, objective):
    straight = train(images, tmp_path / "straight", objective=objective)
    for stops in itertools.count(1):
        try:
            stopped = train(images, tmp_path / "stopped", objective=objective, time_limit=0)
            break
        except Stopped as stop:
            assert f"step {stops} of 15" in str(stop) and not stop.interrupted
    assert stops == 15  # the call that takes the last step ends it
    assert same_weights(straight, stopped)
    columns = [name for name in straight.history[0] if name != "crops_per_second"]
    for a, b in zip(straight.history, stopped.history, strict=True):
        assert [a[name] for name in columns] == [b[name] for name in columns]
    assert not (stopped.path / "checkpoint.pt").exists()


CHILD = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from bagssl import pretraining
from bagssl.config import PretrainConfig
from bagssl.data import load
from bagssl.errors import Stopped
trained = pretraining.train
def told(*arguments, **options):
    print("training", flush=True)
    return trained(*arguments, **options)
pretraining.train = told
images = load("synthetic", "train").take(torch.arange(0, 4000, 50))
config = PretrainConfig(width=8, size=8, batch_size=16, views=2, projector_hidden=16, projector_dim=8, epochs=40)
try:
    pretraining.pretrain(config, images, Path(sys.argv[1]), progress=False, checkpoint_every=0)
except Stopped as stop:
    sys.exit(130 if stop.interrupted else 3)
"""


def child(root):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def finished_run(root):
    (run,) = [run for run in runs.list_runs(Path(root)) if run.finished]
    return run


def kill_while_training(root, number, delay):
    """Start training, wait until it has written a checkpoint of its own, and some time more, then kill it."""
    process = child(root)
    process.stdout.readline()
    started = time.time_ns()

    def wrote():
        return any(path.stat().st_mtime_ns > started for path in Path(root).glob("*/checkpoint.pt"))

    while process.poll() is None and not wrote():
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(number)
    return process.wait()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("straight")
    assert child(root).wait() == 0
    return finished_run(root)


def test_killed_at_five_random_moments_it_ends_with_the_same_weights(tmp_path, undisturbed):
    delays = random.Random(7)
    codes = [kill_while_training(tmp_path, signal.SIGKILL, delays.uniform(0, 0.1)) for _ in range(5)]
    assert codes == [-signal.SIGKILL] * 5  # it was still training each time
    assert child(tmp_path).wait() == 0
    assert same_weights(finished_run(tmp_path), undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_it_ends_with_the_same_weights(tmp_path, undisturbed, number):
    assert kill_while_training(tmp_path, number, 0) == 130
    assert not [run for run in runs.list_runs(tmp_path) if run.finished]
    assert child(tmp_path).wait() == 0
    assert same_weights(finished_run(tmp_path), undisturbed)


def test_a_signal_that_comes_when_nothing_is_left_to_train_loses_nothing(images, tmp_path, monkeypatch):
    made = runs.provenance

    def interrupted():
        os.kill(os.getpid(), signal.SIGINT)
        return made()

    monkeypatch.setattr(runs, "provenance", interrupted)
    with pytest.raises(Stopped, match="is finished") as stop:
        train(images, tmp_path)
    assert stop.value.interrupted and finished_run(tmp_path) == train(images, tmp_path)


def test_seconds_count_all_work_up_to_the_last_checkpoint(images, tmp_path, clock, monkeypatch):
    """Each look at the clock is a second; what was trained since the last row of the history counts as well."""
    saved, clock.more = [], itertools.count()
    monkeypatch.setattr(recording, "LOGS", 1)
    monkeypatch.setattr(runs, "save_checkpoint", lambda run, state: saved.append(state["seconds"]))
    run = train(images, tmp_path, checkpoint_every=0)
    assert len(saved) == 14 and all(later > sooner + 1 for sooner, later in itertools.pairwise(saved))
    assert run.metrics["seconds"] > saved[-2]


@pytest.mark.parametrize("stops", [False, True])
def test_along_its_way_a_run_leaves_those_that_end_sooner(images, tmp_path, monkeypatch, stops):
    """To the bit what each of them is when it is trained itself; not what a schedule of as many gives."""
    monkeypatch.setattr(recording, "LOGS", 4)  # rows every 3 steps of 15: the first run ends between two
    whole = None
    while whole is None:
        with contextlib.suppress(Stopped):
            whole = train(images, tmp_path / "along", along=[0.4, 2], time_limit=0 if stops else None)
    assert whole.config["epochs"] == 3 and "until" not in whole.config
    for epochs, steps in ((0.4, 2), (2, 10)):
        left = next(run for run in runs.list_runs(tmp_path / "along") if run.config.get("until") == epochs)
        alone = train(images, tmp_path / "alone", until=epochs)
        assert (left.key, left.metrics["steps"], left.metrics["crops"]) == (alone.key, steps, steps * 32)
        assert same_weights(left, alone) and not same_weights(left, whole)
        assert not same_weights(left, train(images, tmp_path / "own", epochs=epochs))
        timed = ("crops_per_second",)
        assert [[(name, value) for name, value in row.items() if name not in timed] for row in left.history] == [
            [(name, value) for name, value in row.items() if name not in timed] for row in alone.history]
    assert same_weights(whole, train(images, tmp_path / "alone"))
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "train", None)
        train(images, tmp_path / "along", until=0.4)  # is there


@pytest.mark.parametrize("settings, line", [
    ({"until": 4}, "until = 4 is after its end, epochs = 3"),
    ({"until": 0.01}, "until = 0.01 of 5 steps is not one step: raise until"),
])  # fmt: skip
def test_a_run_that_cannot_end_sooner_is_refused(images, tmp_path, settings, line):
    with pytest.raises(InputError, match=re.escape(line)):
        train(images, tmp_path, **settings)
    assert not any(tmp_path.iterdir())


def test_a_run_until_its_end_is_the_whole_run():
    assert PretrainConfig(**TINY, until=3) == PretrainConfig(**TINY)
    assert "until" not in PretrainConfig(**TINY, training="untrained", until=1).to_dict()


def test_a_time_limit_in_the_last_step_comes_too_late_to_stop_it(images, tmp_path):
    with pytest.raises(Stopped, match="stopped at step 1 of 2"):
        train(images, tmp_path, epochs=0.4, time_limit=0)
    assert train(images, tmp_path, epochs=0.4, time_limit=0).finished


def test_a_run_that_went_from_one_machine_to_another_says_so(images, tmp_path, monkeypatch):
    def stops(limit=0):
        with pytest.raises(Stopped):
            train(images, tmp_path, time_limit=limit)

    here = runs.hardware()
    stops(), stops()
    monkeypatch.setattr(runs, "hardware", lambda: {**here, "gpu": "Abacus"})
    stops(), stops(), stops()
    found = train(images, tmp_path).provenance
    assert [(part["hardware"]["gpu"], part["until"]) for part in found["parts"]] == [(None, 2), ("Abacus", 15)]
    assert found["hardware"]["gpu"] == "Abacus" and "parts" not in train(images, tmp_path / "another").provenance


def test_a_checkpoint_of_another_network_is_refused_in_one_line(images, tmp_path):
    with pytest.raises(Stopped):
        train(images, tmp_path, time_limit=0)
    (path,) = tmp_path.glob("*/checkpoint.pt")
    state = torch.load(path, weights_only=True)
    state["model"].popitem()
    torch.save(state, path)
    with pytest.raises(InputError, match="another network") as error:
        train(images, tmp_path)
    assert "\n" not in str(error.value)
    path.unlink()
    assert train(images, tmp_path).finished


@pytest.mark.parametrize("deadline", ["nan", "soon"])
def test_a_deadline_that_is_no_time_is_refused(images, tmp_path, monkeypatch, deadline):
    monkeypatch.setenv("BAGSSL_DEADLINE", deadline)
    with pytest.raises(InputError, match="BAGSSL_DEADLINE"):
        train(images, tmp_path)


@pytest.fixture
def clock(monkeypatch):
    """The clocks that training looks at: `hours` is added to what the wall says, `more` to the monotonic one."""
    clock = SimpleNamespace(hours=itertools.repeat(0), more=itertools.repeat(0))
    clock.time = lambda: time.time() + 3600 * next(clock.hours)
    clock.monotonic = lambda: time.monotonic() + next(clock.more)
    for module in (pretraining, recording):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_clock_that_is_set_while_training_neither_stops_it_nor_spoils_its_seconds(
    images, tmp_path, clock, monkeypatch
):
    monkeypatch.setenv("BAGSSL_DEADLINE", str(time.time() + 3600))
    clock.hours = itertools.chain([0], itertools.cycle([10, -10]))  # from the second look on
    run = train(images, tmp_path, time_limit=1800)
    assert run.finished and 0 < run.metrics["seconds"] < 1800
    assert all(row["crops_per_second"] > 0 for row in run.history)


@pytest.mark.parametrize("how", [{"time_limit": 1800}, {}])
def test_time_that_really_passes_ends_at_the_limit_and_at_the_deadline(images, tmp_path, clock, monkeypatch, how):
    monkeypatch.setenv("BAGSSL_DEADLINE", str(time.time() + 3600))
    clock.more = itertools.count(0, 600)
    with pytest.raises(Stopped):
        train(images, tmp_path, **how)


def test_two_processes_at_once_train_one_run(tmp_path):
    pair = [child(tmp_path), child(tmp_path)]
    said = [process.communicate()[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert "".join(said).count("training") == 1
    assert finished_run(tmp_path)


def test_waiting_for_another_process_ends_at_the_time_limit(images, tmp_path, capsys):
    config = PretrainConfig(**TINY)
    run = runs.open_run(config.to_dict(), images.fingerprint, config.label, tmp_path)
    with runs.locked(run), pytest.raises(Stopped, match="still being trained by another process") as stop:
        train(images, tmp_path, time_limit=0)
    assert not stop.value.interrupted
    assert "is being trained by another process: waiting for it\n" in capsys.readouterr().err
    assert train(images, tmp_path).finished


def test_before_the_time_limit_it_waits(images, tmp_path, monkeypatch):
    config, held = PretrainConfig(**TINY), contextlib.ExitStack()
    held.enter_context(runs.locked(runs.open_run(config.to_dict(), images.fingerprint, config.label, tmp_path)))

    def notice(text):
        held.close()  # the other process is done as soon as it is waited for
        return contextlib.nullcontext()

    monkeypatch.setattr(runs, "notice", notice)
    assert train(images, tmp_path, time_limit=600).finished


def test_a_damaged_checkpoint_means_training_again(images, tmp_path, capsys):
    straight = train(images, tmp_path / "straight")
    with pytest.raises(Stopped):
        train(images, tmp_path / "damaged", time_limit=0)
    (path,) = (tmp_path / "damaged").glob("*/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:100])
    assert same_weights(straight, train(images, tmp_path / "damaged"))
    assert "training starts again" in capsys.readouterr().err


def test_damaged_weights_are_refused(images, tmp_path):
    run = train(images, tmp_path)
    path = run.path / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        load_encoder(run)


def test_nan_stops_the_run_and_names_the_term(images, tmp_path):
    with pytest.raises(Diverged, match="'loss' is nan|'loss' is inf"):
        train(images, tmp_path, optimiser="sgd", learning_rate=1000.0, objective="vicreg", epochs=20)
    assert not any(run.finished for run in runs.list_runs(tmp_path))


def test_collapse_stops_the_run_and_names_the_term(images, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "spread", lambda z: torch.zeros(()))
    with pytest.raises(Diverged, match="collapsed.*'spread'"):
        train(images, tmp_path)


def test_untrained_is_the_seeds_initial_weights_whatever_the_recipe(images, tmp_path):
    a = train(images, tmp_path, training="untrained")
    b = train(images, tmp_path, training="untrained", learning_rate=1.0, objective="simclr", views=8)
    assert a.key == b.key and a.metrics["crops"] == 0
    assert not same_weights(a, train(images, tmp_path, training="untrained", seed=1))


def test_learning_rate_warms_up_and_falls_to_zero():
    config = PretrainConfig(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate_at(step, 100, config) for step in range(100)]
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == 1.0 and 0 < rates[-1] < 1e-3


def test_too_few_images_for_a_batch(images, tmp_path):
    with pytest.raises(InputError, match="batch"):
        train(images, tmp_path, batch_size=81)


def test_seeds_draw_other_orders_and_other_patches():
    """All 32 bits that the CPU's generator keeps count, so that runs of two seeds see different data."""
    generator = torch.Generator()
    seeds = [pretraining._seed(seed, purpose, index) for seed in range(20) for purpose in (0, 1) for index in range(20)]
    draws = {tuple(torch.randint(2**31, (4,), generator=generator.manual_seed(seed)).tolist()) for seed in seeds}
    assert len(draws) == 20 * 2 * 20


def test_what_decides_nothing_is_not_in_the_key():
    def same(a, b):
        return PretrainConfig(**a).to_dict() == PretrainConfig(**b).to_dict()

    assert same({"min_scale": 0.1}, {"min_scale": 0.5})
    assert same({"training": "multi-scale", "patch_scale": 0.1}, {"training": "multi-scale", "patch_scale": 0.3})
    assert same({"momentum": 0.5}, {"teacher_momentum": 0.5})
    assert not same({"patch_scale": 0.1}, {"patch_scale": 0.3})
    assert not same({"optimiser": "sgd", "momentum": 0.5}, {"optimiser": "sgd", "momentum": 0.6})


def test_settings_added_later_leave_earlier_keys_as_they_were():
    """The key of a run made before `grid` existed; another value is another run."""
    config = PretrainConfig(objective="simclr", options={"temperature": 0.2})
    assert runs.run_key(config.to_dict(), "data") == "b55fbead26edce7a"
    assert PretrainConfig.from_dict(config.to_dict()) == config
    aligned = PretrainConfig(objective="simclr", options={"temperature": 0.2}, grid=8)
    assert runs.run_key(aligned.to_dict(), "data") != "b55fbead26edce7a"
    assert PretrainConfig.from_dict(aligned.to_dict()) == aligned
    assert PretrainConfig(training="multi-scale", grid=8) == PretrainConfig(training="multi-scale")


def test_patches_on_a_grid_are_different_cells_of_their_image(images):
    """Cells of one grey each, and no two alike: training crops are whole cells, all of them once in 16 views."""
    pixels = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    plain = dict.fromkeys(("jitter", "grey", "flip"), 0.0)

    def seen(**where):
        augmentation = PretrainConfig(patch_scale=1 / 16, size=8, **plain, **where).augmentation()
        generator = torch.Generator().manual_seed(0)
        return pretraining.augment(pixels.expand(5, 3, -1, -1), 16, augmentation, generator) * 255

    cells = seen(grid=8).round().flatten(2)
    assert (cells == cells[..., :1]).all()
    assert (cells[..., 0].sort(0).values == torch.arange(16)[:, None]).all()
    anywhere = seen().round().flatten(2)
    assert not (anywhere == anywhere[..., :1]).all()


def test_less_than_one_step_is_refused(images, tmp_path):
    with pytest.raises(InputError, match="not one step"):
        train(images, tmp_path, epochs=0.05)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"objective": "tcrr"}, {"training": "patches"}, {"encoder": "vit"}, {"optimiser": "adam"}, {"views": 1},
        {"views": 2.5}, {"epochs": -1}, {"epochs": math.nan}, {"learning_rate": 0}, {"learning_rate": "1e-3"},
        {"batch_size": 1}, {"batch_size": True}, {"patch_scale": 0}, {"patch_scale": 1.5}, {"min_scale": -0.1},
        {"hue": 0.6}, {"grey": 2}, {"seed": -1}, {"size": 2}, {"width": 0}, {"warmup": 1.1}, {"weight_decay": -1},
        {"options": {"temperature": 0.1}}, {"options": {"invariance": -1}}, {"options": 3}, {"vieuws": 4},
        {"epochs": 0}, {"optimiser": "lars", "weight_decay": 0}, {"dataset": "a/b"}, {"momentum": 1.1},
        {"objective": "simclr", "options": {"temperature": "hot"}}, {"grid": -1}, {"grid": 8.0},
        {"objective": "simclr", "options": {"temperature": True}}, {"options": {"invariance": 10**400}},
        {"epochs": 10**400},
    ],
)  # fmt: skip
def test_senseless_settings_are_refused_in_one_line(wrong):
    with pytest.raises(InputError) as error:
        PretrainConfig.from_dict(wrong)
    assert "\n" not in str(error.value) and list(wrong)[-1].removesuffix("s") in str(error.value)
