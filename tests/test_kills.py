"""Killed at any moment, `reproduce` loses nothing that was finished and ends with what it would have ended with."""

from __future__ import annotations

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

from bagssl import experiments, runs
from bagssl.errors import InputError

PARAMETERS = "seed: int = 0\n"
WORK = """import matplotlib.pyplot as plt
import pandas as pd
from bagssl import comparison, data, figures, pretraining
from bagssl.evaluation import evaluate
output = comparison.output_folder("kill")
train, test = (data.subset(data.load("synthetic", split), 100) for split in ("train", "test"))
config = pretraining.PretrainConfig(seed=seed, size=8, width=8, projector_hidden=16, projector_dim=8, batch_size=16, epochs=12)
run = pretraining.pretrain(config, train, device="cpu", checkpoint_every=0.2)"""
SHOW = """table = pd.DataFrame(evaluate(run, train, test, [0, 4], probes=["knn"], scale=0.25)).drop(columns=["settings", "correct"])
figures.write_table(table, output, "accuracy")
figure, axis = plt.subplots()
axis.plot([row["loss"] for row in run.history])
figures.save_figure(figure, output, "loss")"""
CALL = ("import sys; from pathlib import Path; from bagssl import experiments; folder = Path(sys.argv[1]); "
        "sys.exit(experiments.reproduce(jobs=2, notebooks=folder / 'notebooks', results=Path(sys.argv[2])))")  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Four experiments that train, measure and draw; two of them share a model."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "notebooks").mkdir()
    cells = [nbformat.v4.new_markdown_cell("# A title"),
             nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
             *map(nbformat.v4.new_code_cell, (WORK, SHOW))]  # fmt: skip
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebooks" / "train.ipynb")
    entries = {name: {"artefact": "none", "notebook": "train.ipynb", "profiles": {"smoke": {"cost": "1 s", "parameters": {"seed": seed}}}}
               for name, seed in zip("abcd", (0, 1, 2, 1), strict=True)}  # fmt: skip
    (folder / "notebooks" / "experiments.yaml").write_text(yaml.safe_dump(entries))
    return folder


def start(project: Path, results: Path) -> psutil.Popen:
    return psutil.Popen([sys.executable, "-c", CALL, str(project), str(results)], stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL, env=experiments_environment(results), start_new_session=True)  # fmt: skip


def experiments_environment(results: Path) -> dict[str, str]:

    return {**os.environ, "BAGSSL_RUNS": str(results / "runs"), "BAGSSL_RESULTS": str(results)}


def family(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(process: psutil.Popen, chance: random.Random) -> None:
    """Everything at once, as when the power fails, or one process of them, and then all that outlive it for long."""
    living = family(process)
    for each in living if chance.random() < 0.5 else living and [chance.choice(living)]:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            pass
    _, alive = psutil.wait_procs(living[1:], timeout=60 if living and not living[0].is_running() else 0)
    assert living[0].is_running() or not alive, "a kernel outlives what started it"


def finished(project: Path, results: Path) -> set[str]:
    """What is finished, each piece looked into; nothing may lie there that is half written."""
    found = set()
    for name, experiment in experiments.load_experiments(project / "notebooks").items():
        state = experiments.state(experiments.plan(experiment, "smoke", results=results))
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
    found = {str(path.relative_to(results)): path.read_bytes() for kind in ("smoke/*/tables/*", "smoke/*/figures/*", "runs/*/weights*")
             for path in results.glob(kind)}  # fmt: skip
    for run in runs.list_runs(results / "runs"):
        found[run.key] = repr([{**row, "crops_per_second": 0} for row in run.history]).encode()
        found[f"{run.key} rows"] = repr([json.loads(path.read_text())["rows"] for path in run.path.glob("evaluations/*.json")]).encode()
    return found


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.nightly)])
def test_killed_at_random_moments_it_ends_as_if_undisturbed(project, tmp_path, kills):
    begun = time.monotonic()
    assert start(project, tmp_path / "calm").wait() == 0
    lasts, expected, chance, done, rounds = time.monotonic() - begun, content(tmp_path / "calm"), random.Random(0), 0, 0
    assert len(expected) == 4 * 5 + 3 * 3  # a table of three files and a figure of two each; weights, history and accuracies of three models
    while done < kills:
        results, rounds, before = tmp_path / f"round {rounds}", rounds + 1, set()
        while not set("abcd") <= before:
            process = start(project, results)
            try:
                process.wait(timeout=chance.uniform(0, lasts) if done < kills else None)
            except psutil.TimeoutExpired:
                kill(process, chance)
                process.wait()
                done += 1
            after = finished(project, results)
            assert before <= after
            before = after
        assert content(results) == expected
        assert not [path for path in results.rglob("*") if path.suffix == ".tmp" or path.name.endswith((".partial", ".old"))]


def test_a_result_that_was_touched_is_not_finished(project, tmp_path):
    """Negative control of what looks for damage."""
    assert start(project, tmp_path).wait() == 0
    run = runs.list_runs(tmp_path / "runs")[0]
    weights = run.path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(InputError, match="damaged"):
        finished(project, tmp_path)
    (tmp_path / "smoke/a/tables/accuracy.csv").unlink()
    with pytest.raises(AssertionError, match="stale"):
        finished(project, tmp_path)
