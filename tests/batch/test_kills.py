"""Killed at any moment, `reproduce` loses nothing that was finished and ends with what it would have ended with."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

from bagssl import runs
from bagssl.batch import stages
from bagssl.batch.experiments import load_experiments
from bagssl.errors import InputError

PARAMETERS = "seed: int = 0\n"
WORK = """import os
import matplotlib.pyplot as plt
import pandas as pd
from pathlib import Path
from bagssl import data, pretraining
from bagssl.config import PretrainConfig
from bagssl.evaluation import evaluate
from bagssl.study import figures, tables
output = Path(os.environ["BAGSSL_OUTPUT"])
train, test = (data.subset(data.load("synthetic", split), 100) for split in ("train", "test"))
config = PretrainConfig(seed=seed, size=8, width=8, projector_hidden=16, projector_dim=8, batch_size=16, epochs=12)
run = pretraining.pretrain(config, train, device="cpu", checkpoint_every=0.2)"""
SHOW = """rows = evaluate(run, train, test, [0, 4], probes=["knn"], scale=0.25)
tables.write_table(pd.DataFrame(rows).drop(columns=["settings", "correct"]), output, "accuracy")
figure, axis = plt.subplots()
axis.plot([row["loss"] for row in run.history])
figures.save_figure(figure, output, "loss")"""
CALL = """import sys
from pathlib import Path
from bagssl.batch.reproduce import reproduce
notebooks, results = map(Path, sys.argv[1:3])
sys.exit(reproduce(sys.argv[4:], jobs=int(sys.argv[3]), notebooks=notebooks, results=results))"""


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory) -> Path:
    """Four experiments that train, measure and draw; the last two share a model."""
    folder = tmp_path_factory.mktemp("notebooks")
    cells = [nbformat.v4.new_markdown_cell("# A title"),
             nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
             *map(nbformat.v4.new_code_cell, (WORK, SHOW))]  # fmt: skip
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "train.ipynb")
    entries = {name: {"artefact": "none", "notebook": "train.ipynb",
                      "profiles": {"smoke": {"cost": "1 s", "parameters": {"seed": seed}}}}
               for name, seed in zip("abcd", (0, 1, 2, 2), strict=True)}  # fmt: skip
    (folder / "experiments.yaml").write_text(yaml.safe_dump(entries))
    return folder


def start(notebooks: Path, results: Path, names: str, jobs: int = 2) -> psutil.Popen:
    environment = {**os.environ, "BAGSSL_RUNS": str(results / "runs"), "BAGSSL_RESULTS": str(results)}
    return psutil.Popen([sys.executable, "-c", CALL, str(notebooks), str(results), str(jobs), *names], env=environment,
                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip


def family(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(process: psutil.Popen, chance: random.Random) -> None:
    """Everything at once, as when the power fails, or one process; without the first the others must end too."""
    living = family(process)
    doomed = living if chance.random() < 0.5 else living and [chance.choice(living)]
    for each in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    if process in doomed:
        process.wait()
        _, alive = psutil.wait_procs(living[1:], timeout=60)
        assert not alive, "a kernel outlives what started it"


def finished(notebooks: Path, results: Path) -> set[str]:
    """What is finished, each piece looked into; nothing may lie there that is half written."""
    found = set()
    for name, experiment in load_experiments(notebooks).items():
        state = stages.state(stages.plan(experiment, "smoke", results=results))
        assert state in ("fresh", "missing", "failed", "stopped"), (name, state)
        found |= {name} if state == "fresh" else set()
    for run in runs.list_runs(results / "runs"):
        if run.finished:
            assert run.weights() and run.history and run.provenance
            found.add(run.key)
        for path in run.path.glob("evaluations/*.json"):
            assert json.loads(path.read_text())["rows"]
            found.add(f"{run.key} {path.stem}")
    return found


def content(results: Path) -> dict[str, bytes]:
    """What was found out: tables, figures, weights, losses, accuracies; neither times nor what depends on them."""
    kinds = ("smoke/*/tables/*", "smoke/*/figures/*", "runs/*/weights*")
    found = {str(path.relative_to(results)): path.read_bytes() for kind in kinds for path in results.glob(kind)}
    for run in runs.list_runs(results / "runs"):
        found[run.key] = repr([{**row, "crops_per_second": 0} for row in run.history]).encode()
        rows = [json.loads(path.read_text())["rows"] for path in run.path.glob("evaluations/*.json")]
        found[f"{run.key} rows"] = repr(rows).encode()
    return found


@pytest.mark.parametrize("names, kills", [("ab", 2), pytest.param("abcd", 100, marks=pytest.mark.nightly)])
def test_killed_at_random_moments_it_ends_as_if_undisturbed(notebooks, tmp_path, names, kills):
    """The undisturbed batch does one experiment after the other, the killed ones two side by side."""
    begun = time.monotonic()
    assert start(notebooks, tmp_path / "calm", names, jobs=1).wait() == 0
    lasts, expected, chance, done, rounds = time.monotonic() - begun, content(tmp_path / "calm"), random.Random(0), 0, 0
    # a table of three files and a figure of two each; weights, history and accuracies of each model
    assert len(expected) == 5 * len(names) + 3 * min(3, len(names))
    while done < kills:
        results, rounds, before = tmp_path / f"round {rounds}", rounds + 1, set()
        while not set(names) <= before:
            process = start(notebooks, results, names)
            try:
                process.wait(timeout=chance.uniform(0, lasts) if done < kills else None)
            except psutil.TimeoutExpired:
                kill(process, chance)
                process.wait()
                done += 1
            after = finished(notebooks, results)
            assert before <= after
            before = after
        assert start(notebooks, results, names).wait() == 0  # the last was killed, perhaps, when it wrote the page
        assert content(results) == expected
        assert not [path for path in results.rglob("*") if path.name.endswith((".tmp", ".partial", ".old"))]
    # negative controls: what looks for damage finds it
    weights = runs.list_runs(results / "runs")[0].path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert content(results) != expected
    with pytest.raises(InputError, match="damaged"):
        finished(notebooks, results)
    (results / "smoke/a/tables/accuracy.csv").unlink()
    with pytest.raises(AssertionError, match="stale"):
        finished(notebooks, results)
