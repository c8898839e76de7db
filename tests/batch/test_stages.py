"""Fresh is what would come out the same: all that a result depends on is in its key."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from test_experiments import NOTEBOOKS, write_list, write_notebook

import bagssl
from bagssl.batch import stages
from bagssl.batch.experiments import load_experiments
from bagssl.errors import InputError


def test_what_makes_results_stale(results, notebooks, tmp_path, monkeypatch):
    def state(overrides=None, folder=notebooks):
        good = load_experiments(folder)["good"]
        return stages.state(stages.plan(good, "smoke", overrides, results=results))

    assert state() == "fresh"
    assert state({"count": 2}) == "fresh"  # the default, said aloud
    assert state({"count": 3}) != "fresh"
    for name, cells in NOTEBOOKS.items():
        write_notebook(tmp_path / f"{name}.ipynb", cells)
    write_list(tmp_path)
    assert state(folder=tmp_path) == "fresh"  # the same cells, other ids
    write_notebook(tmp_path / "good.ipynb", [*NOTEBOOKS["good"], "1"])
    assert state(folder=tmp_path) != "fresh"
    with monkeypatch.context() as patch:
        patch.setattr(stages, "package_hash", lambda: "other sources")
        assert state() != "fresh"
    assert state() == "fresh"
    table = results / "smoke/good/tables/sum.md"
    text = table.read_text()
    table.write_text("changed by hand")
    assert state() != "fresh"
    table.unlink()
    assert state() != "fresh"
    table.write_text(text)
    assert state() == "fresh"


def test_every_source_that_a_result_depends_on_is_in_the_key(tmp_path):
    package = tmp_path / "package"
    shutil.copytree(Path(bagssl.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    before, beside = stages.package_hash(package), set()
    assert before == stages.package_hash()
    for path in [path for path in package.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        stages.package_hash.cache_clear()
        if stages.package_hash(package) == before:
            beside.add(path.relative_to(package).as_posix())
        path.write_bytes(content)
    above = {path.relative_to(package).as_posix() for room in ("batch", "bench") for path in package.glob(f"{room}/*")}
    assert {"batch/stages.py", "batch/report.html.j2", "bench/race.py"} < above
    beside_the_batch = {"cli.py", "commands.py", "details.py", "hub.py", "tending.py"}
    assert beside == beside_the_batch | above, "the study, a folder below, is in the key"
    for path, moved in (("data.py", "study/data.py"), ("study/claims.py", "claims.py")):
        (package / path).rename(package / moved)
        stages.package_hash.cache_clear()
        assert stages.package_hash(package) != before, "a module elsewhere is another package"
        (package / moved).rename(package / path)


@pytest.mark.parametrize("content", ["", "[]", "null", '{"state": "done", "key": "', "\0" * 100])
def test_a_damaged_status_means_running_again(results, notebooks, tmp_path, content):
    shutil.copytree(results / "smoke/good", tmp_path / "smoke/good")
    stage = stages.plan(load_experiments(notebooks)["good"], "smoke", results=tmp_path)
    assert stages.state(stage) == "fresh"
    (stage.folder / "status.json").write_text(content)
    assert stages.state(stage) == "missing"


def test_data_is_part_of_the_key(notebooks, tmp_path, monkeypatch):
    write_notebook(tmp_path / "d.ipynb", ["1"], 'dataset: str = "synthetic"\n')
    entry = {"artefact": "x", "notebook": "d.ipynb", "profiles": {"smoke": {"cost": "1 s", "parameters": {}}}}
    (tmp_path / "experiments.yaml").write_text(yaml.safe_dump({"d": entry}))
    experiment = load_experiments(tmp_path)["d"]
    monkeypatch.setattr(stages, "_checked", lambda name: "one")
    one = stages.plan(experiment, "smoke")
    monkeypatch.setattr(stages, "_checked", lambda name: "two")
    assert stages.plan(experiment, "smoke").key != one.key
    assert one.data == {"synthetic": "one"}
    with pytest.raises(InputError, match=r"d \(d.ipynb\): the dataset 'nowhere'"):
        stages.plan(experiment, "smoke", {"dataset": "nowhere"})
    with pytest.raises(InputError, match=r"'synthetik' is not in .*: did you mean 'synthetic'\? Or add it"):
        stages.plan(experiment, "smoke", {"dataset": "synthetik"})
