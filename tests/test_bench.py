"""The bench measures what it says; no test of it is timed."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.models.resnet import conv3x3

from bagssl import bench, cli
from bagssl.bench import feeding, ranks
from bagssl.bench.embedding import _peak, probing
from bagssl.bench.race import ROUNDS, Machine, compared, exponent, race, time
from bagssl.bench.training import native_size, online, training
from bagssl.encoders import build_encoder
from bagssl.errors import InputError, Stopped
from bagssl.online import Online
from bagssl.study import tables


@pytest.fixture
def clock(monkeypatch):
    """A clock that only work moves."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_works_take_turns_and_are_counted_in_units_per_second(clock):
    calls = []

    def work(name, seconds, units):
        def do():
            calls.append(name)
            clock[0] += seconds
            return units
        return do

    rates = race({"a": work("a", 0.5, 10), "b": work("b", 2.0, 10)}, 1.0, rounds=3)
    assert rates == {"a": [20.0] * 3, "b": [5.0] * 3}
    assert calls == ["a", "b", *["a", "a", "b"] * 3]  # one of each to warm up
    row = compared("this", rates, "crops/s", aim=2)
    assert (row["ratio"], row["low"], row["high"], row["rounds"]) == (4, 4, 4, 3) and row["ours"] == "a"


def test_a_work_may_bring_its_own_clock(clock):
    def work():
        clock[0] += 100.0  # of which a tenth counts
        return 5, 10.0

    assert race({"a": work}, 15.0, rounds=2) == {"a": [0.5] * 2}


def test_memory_is_what_the_work_adds():
    # in a process of its own, as the bench does: one that has worked before may have that much to hand out again
    code = """if True:
        import torch
        from bagssl.bench.race import Machine, memory_of
        machine = Machine("synthetic", quick=True)
        for work in (lambda: torch.ones(2**25), lambda: None):
            before = memory_of(machine)
            work()  # its result is gone at once: a peak, not what is left
            print(before, memory_of(machine, peak=True) - before)
    """
    words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    before, work, _, nothing = map(float, words)
    if not before:
        pytest.skip("this system does not tell a peak from a moment on")
    assert 120 < work < 160 and nothing < 20


@pytest.mark.parametrize("name", ["training, steps", "embedding, K"])
def test_a_process_of_its_own_says_what_its_work_adds(name):
    assert _peak(Machine("synthetic", quick=True), name, 4) > 0


def test_a_ratio_is_the_median_over_rounds_with_its_spread():
    row = compared("this", {"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, "crops/s")
    assert (row["ratio"], row["low"], row["high"], row["rate"], row["their rate"]) == (2, 1, 3, 4, 2)
    assert "2 (1 to 3)" in bench.line(row)


def test_the_exponent_of_growth():
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


def test_the_stock_network_is_the_same_function_of_torchs_own_layers():
    encoder = build_encoder("resnet10", 8).double().eval()
    stock = build_encoder("resnet10", 8, seed=1, conv=conv3x3).double().eval()
    stock.load_state_dict(encoder.state_dict())
    x = torch.rand(2, 3, 16, 16, dtype=torch.double)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x), stock(x))
    assert {type(module) for module in stock.modules() if isinstance(module, nn.Conv2d)} == {nn.Conv2d}


def test_rows_are_measured_shown_and_kept(tmp_path, capsys):
    path = bench.bench(["coding-rate"], "synthetic", quick=True, output=tmp_path / "here.json")
    (row,) = json.loads(path.read_text())["rows"]["coding-rate"]
    assert row["rounds"] == ROUNDS and row["ratio"] > 0 and row["dataset"] == "synthetic" and "commit" in row
    assert "TCR" in capsys.readouterr().out
    table = bench.table(json.loads(path.read_text()))
    assert path.with_suffix(".md").read_text() == tables.markdown(table)
    assert list(table["asked"]) == ["20"] and table["value"][0].startswith(f"{row['ratio']:.3g} × (")


def test_both_sides_of_a_training_row_train(monkeypatch):
    machine = Machine("synthetic", quick=True)
    monkeypatch.setitem(training.__globals__, "ROUNDS", 2)
    for (row,) in (training(machine), native_size(machine)):
        assert row["rate"] > 0 and row["their rate"] > 0 and row["rounds"] == 2
        assert 0 < row["kNN"] <= 100 and 0 < row["their kNN"] <= 100
        assert row["kNN difference"] == pytest.approx(row["kNN"] - row["their kNN"])


def test_a_training_is_timed_with_what_is_measured_on_its_way_and_without(monkeypatch):
    machine, measured = Machine("synthetic", quick=True), []
    embed = Online._embed
    monkeypatch.setattr(Online, "_embed", lambda self: measured.append(len(self.crops)) or embed(self))
    (row,) = online(machine)
    assert row["rate"] > 0 and row["their rate"] > 0 and row["aim"] == 0.97
    assert measured == [512 // 24] * (ROUNDS + 1)  # one of the two works, once in each run


def test_both_probes_are_timed():
    rows = list(probing(Machine("synthetic", quick=True)))
    assert [row["measure"].split()[0] for row in rows] == ["kNN", "linear"] and all(row["ratio"] > 0 for row in rows)


def test_pictures_are_imported_and_gathered_beside_what_pillow_and_torch_do(monkeypatch):
    monkeypatch.setattr(feeding, "SIDES", ((60, 80), (90, 70)))
    machine = Machine("synthetic", quick=True)
    rows = [*feeding.importing(machine), *feeding.gathering(machine)]
    assert len(rows) == 4 and all(row["rate"] > 0 and row["their rate"] > 0 for row in rows)
    assert [row["aim"] for row in rows] == [None, 0.8, 15, None]


def test_gathering_is_measured_by_one_thread_and_by_all(monkeypatch):
    machine, threads, before = Machine("synthetic", quick=True), [], torch.get_num_threads()
    monkeypatch.setattr(Machine, "race", lambda self, works: threads.append(torch.get_num_threads()) or
                        {name: [1.0] for name in works})  # fmt: skip
    rows = list(feeding.gathering(machine))
    assert threads == [1, machine.cores] and torch.get_num_threads() == before
    assert [row["measure"].rpartition(", ")[2] for row in rows] == ["1 thread", f"{machine.cores} threads"]


def test_two_processes_train_beside_one(monkeypatch):
    machine, counts = Machine("synthetic", quick=True), []
    pretrained = ranks._pretrained
    monkeypatch.setattr(ranks, "_pretrained", lambda *how: counts.append(how[2:]) or pretrained(*how))
    monkeypatch.setattr(Machine, "race", lambda self, works: {n: [units / seconds for units, seconds in [works[n]()]]
                                                              for n in works})  # fmt: skip
    machine.size["crops"] = {16: 4 * 128 * 4}  # four steps
    (row,) = ranks.processes(machine)
    assert row["rate"] > 0 and row["their rate"] > 0 and (row["ours"], row["theirs"]) == ("2 processes", "1 process")
    threads = max(1, machine.cores // 2)
    assert counts == [(2, threads), (1, 2 * threads)]  # the same sum of them


def test_out_of_time_it_stops_between_rows_and_goes_on_with_those_that_are_left(tmp_path, monkeypatch, capsys):
    def rows(name):
        def measure(machine):
            capsys.readouterr()
            yield {"measure": name, "unit": "s", "ratio": 1.0, "rounds": 1, "most": 90}
            now[0] += 60
        return measure

    now = [0.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(bench, "ROWS", {name: rows(name) for name in "cab"})
    made = {"commit": "1", "dirty": False, "time": "", "versions": {}, "hardware": {"gpu": "None at all"}}
    monkeypatch.setattr(bench.runs, "provenance", lambda: made)
    here = {"dataset": "synthetic", "quick": True, "output": tmp_path / "here.json", "time_limit": 100}
    with pytest.raises(Stopped, match="b left; the next call"):
        bench.bench(**here)
    assert list(json.loads(here["output"].read_text())["rows"]) == ["a", "c"]
    bench.bench(**here)
    assert "b: 1, asked ≤ 90" in capsys.readouterr().out
    assert list(bench.table(json.loads(here["output"].read_text()))["measure"]) == ["c", "a", "b"]
    monkeypatch.setattr(bench, "package_hash", lambda **how: "other code")  # all of it again
    with pytest.raises(Stopped, match="time is up, b left"):
        bench.bench(**here)


def test_processors_of_one_name_have_a_file_each_by_their_precision():
    here = {"gpu": None, "processor": "AMD (R) EPYC", "cores": 2}
    assert bench._slug(here, "float32") == "amd-r-epyc-2-cores"
    assert bench._slug(here, "bfloat16") == "amd-r-epyc-2-cores-bfloat16"
    assert bench._slug({**here, "gpu": "One H200"}, "bfloat16") == "one-h200"


def test_a_row_that_does_not_exist_is_refused(capsys):
    with pytest.raises(InputError, match="no row 'speed'"):
        bench.bench(["speed"])
    assert cli.main(["bench", "speed"]) == 2 and "choose among" in capsys.readouterr().err
