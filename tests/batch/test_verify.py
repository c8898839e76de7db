"""What was changed in a record by hand is found and named; the record itself, and one that was just made, pass."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from test_setup import ROOT

from bagssl import cli, runs
from bagssl.batch import agreement, reproduce, stages
from bagssl.batch.verify import verify
from bagssl.paths import HALF, file_hash
from bagssl.study import claims

PARAMETERS = "dataset: str = 'synthetic'\n"
WORK = """import matplotlib.pyplot as plt
from IPython.display import Markdown
from bagssl import data, pretraining
from bagssl.config import PretrainConfig
from bagssl.study import claims, comparison, figures, tables
figures.style()
train, test = (data.subset(data.load(dataset, split), 120) for split in ("train", "test"))
config = {"size": 8, "width": 8, "projector_hidden": 16, "projector_dim": 8, "batch_size": 16, "epochs": 1}
configs = [PretrainConfig(training=each, **config) for each in ("patch-based", "multi-scale", "untrained")]
trained = comparison.train_all(configs, train, device="cpu", progress=False)
measured = comparison.measure_all(trained, train, test, [0, 1, 4], scale=0.25, device="cpu", progress=False)
output = comparison.output_folder("small")
table = comparison.over_seeds(measured)
tables.write_table(table, output, "accuracy", tables.comparison_table(table))
tables.write_table(measured.drop(columns=["correct", "settings"]), output, "per_seed")
figures.save_figure(figures.accuracy_against_k(table), output, "accuracy_against_k")
plt.show()
display(tables.Table(tables.comparison_table(table)))
reading = comparison.gains(measured, [0, 1, 4], len(test))
tables.write_table(reading, output, "gains")
ruling = claims.write_evidence(output, "C2", comparison.evidence(reading, dataset))
print(ruling.verdicts)
tables.Table(comparison.provenance(output, trained, {"training": train}))"""
CITED = '[{:.1f}]({}laptop/small/tables/accuracy.csv "{{accuracy_mean:.1f}} | k == 4 and probe == \'knn\' and '
CITED += "training == 'patch-based'\")\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small checkout: README.md, results/README.md, and results/laptop with one experiment and its three models."""
    root, patch = tmp_path_factory.mktemp("made"), pytest.MonkeyPatch()
    notebooks, results = root / "notebooks", root / "kept/results"
    notebooks.mkdir()
    parameters = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(WORK)]),
                   notebooks / "small.ipynb")  # fmt: skip
    entry = {"artefact": "none", "notebook": "small.ipynb", "profiles": {"laptop": {"cost": "1 s", "parameters": {}}}}
    (notebooks / "experiments.yaml").write_text(yaml.safe_dump({"small": entry}))
    with patch.context() as context:
        for name, value in (("RUNS", root / "runs"), ("RESULTS", root / "elsewhere"), ("RECORD", "")):
            context.setenv(f"BAGSSL_{name}", str(value))
        assert reproduce.reproduce(["small"], "laptop", notebooks=notebooks, results=results) == 0
    folder = results / "laptop/small"
    edit(folder / "provenance.json", lambda record: {**record, "commit": "0123456789" * 4, "dirty": False})
    reseal(folder)  # whoever tests may have changed the code
    claims.write_ledger(results, "laptop")
    rows = csv.DictReader((folder / "tables/accuracy.csv").read_text().splitlines())
    (row,) = (row for row in rows if (row["k"], row["probe"], row["training"]) == ("4", "knn", "patch-based"))
    (results.parent / "README.md").write_text("Ours: " + CITED.format(float(row["accuracy_mean"]), "results/"))
    (results / "README.md").write_text("We learnt: " + CITED.format(float(row["accuracy_mean"]), ""))
    return results


@pytest.fixture
def results(made, tmp_path):
    return Path(shutil.copytree(made.parent, tmp_path / "kept")) / "results"


def edit(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def reseal(folder):
    """Give status.json the hashes of the files as they are now, as a careful forger would."""
    edit(folder / "status.json", lambda status: {**status, "files": stages.hashes(folder)})


def sealed(path, change):
    """Change the content of a model's file, and its hash with it."""
    content = runs.read_json(path)
    change(content)
    runs.write_json(path, content)


def digit(path, pattern=r"\d\.\d"):
    """Change the last digit of the last match."""
    text = path.read_text(encoding="utf-8")
    at = [match.end() for match in re.finditer(pattern, text)][-1] - 1
    path.write_text(text[:at] + str((int(text[at]) + 5) % 10) + text[at + 1 :], encoding="utf-8")


def byte(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def verdict(path):
    text = path.read_text(encoding="utf-8")
    word = claims.HOLDS if f"| {claims.FAILS}" in text or f",{claims.FAILS}" in text else claims.FAILS
    known = f"{claims.FAILS}|{claims.HOLDS}|{claims.UNDECIDED}"
    changed = re.sub(rf"(?<=,)({known})(?=,)|(?<=\| )({known})(?= )", word, text, count=1)
    assert changed != text
    path.write_text(changed, encoding="utf-8")


def other_figure(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 600, 3), np.uint8)).save(path)


def shown(notebook, change):
    """Change the texts that a notebook shows, by kind."""
    content = nbformat.read(notebook, 4)
    for output in content.cells[-1].outputs:
        change(output)
    nbformat.write(content, notebook)


def shown_number(output):
    for kind, text in output.get("data", {}).items():
        if kind.startswith("text/") and "centre crop" in text:
            output["data"][kind] = re.sub(r"\d+\.\d", "99.9", text)


def shown_html(output):
    if "Linear probe" in output.get("data", {}).get("text/html", ""):
        output["data"]["text/html"] = re.sub(r"\d+\.\d", "99.9", output["data"]["text/html"], count=1)


def shown_verdict(output):
    if output.output_type == "stream":
        output["text"] = re.sub(r"(?<=: C2 ).*", "cannot be", output["text"]).replace("cannot be", claims.HOLDS)
        output["text"] += f"another: C2 {claims.FAILS}\n"


def shown_picture(output):
    if picture := output.get("data", {}).get("image/png"):
        assert picture
        stream = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 600, 3), np.uint8)).save(stream, "png")
        output["data"]["image/png"] = base64.b64encode(stream.getvalue()).decode()


def lose(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def copy_run(path):
    shutil.copytree(path, path.with_name(path.name[:-16] + "0" * 16))


def row_number(content):
    content["rows"][-1]["accuracy"] += 0.5


SMALL, NOTEBOOK, MODEL = "laptop/small", "laptop/small/small.ipynb", "laptop/runs/synthetic-tcr-patch-based-*"
EVALUATION = f"{MODEL}/evaluations/*.json"
# what is changed, and how; what is named, if it is another; and whether the forger gave status.json the new hash
TAMPERED = {
    "a digit of a .csv": (f"{SMALL}/tables/accuracy.csv", digit, None, False),
    "a digit of a .csv, resealed": (f"{SMALL}/tables/accuracy.csv", digit, None, True),
    "a digit of an accuracy, resealed": (f"{SMALL}/tables/per_seed.csv", digit, None, True),
    "a digit of a gain, resealed": (f"{SMALL}/tables/gains.csv", digit, None, True),
    "a digit of evidence, resealed": (f"{SMALL}/tables/claim_c2.csv", digit, None, True),
    "a digit of a .md": (f"{SMALL}/tables/accuracy.md", digit, None, False),
    "a digit of a .md, resealed": (f"{SMALL}/tables/accuracy.md", digit, None, True),
    "a digit of evidence in .md, resealed": (f"{SMALL}/tables/claim_c2.md", digit, None, True),
    "a digit of a plain table in .md, resealed": (f"{SMALL}/tables/per_seed.md", digit, None, True),
    "a digit of a .tex": (f"{SMALL}/tables/accuracy.tex", digit, None, False),
    "a digit of a .tex, resealed": (f"{SMALL}/tables/accuracy.tex", digit, None, True),
    "a .tex missing, resealed": (f"{SMALL}/tables/gains.tex", lose, None, True),
    "a foreign file in tables/": (f"{SMALL}/tables/accuracy.csv",
                                  lambda path: shutil.copyfile(path, path.with_name("other.csv")),
                                  f"{SMALL}/tables/other.csv", False),
    "a verdict in claims.csv": ("laptop/claims.csv", verdict, None, False),
    "a verdict in claims.md": ("laptop/claims.md", verdict, None, False),
    "claims.csv missing": ("laptop/claims.csv", lose, None, False),
    "a figure replaced": (f"{SMALL}/figures/accuracy_against_k.png", other_figure, None, False),
    "a figure replaced, resealed": (f"{SMALL}/figures/accuracy_against_k.png", other_figure, None, True),
    "a figure's .pdf changed": (f"{SMALL}/figures/accuracy_against_k.pdf", byte, None, False),
    "a figure missing": (f"{SMALL}/figures/accuracy_against_k.png", lose, None, False),
    "a picture in the notebook replaced, resealed": (NOTEBOOK, lambda path: shown(path, shown_picture),
                                                     f"{SMALL}/figures/accuracy_against_k.png", True),
    "the notebook's table changed": (NOTEBOOK, lambda path: shown(path, shown_number), None, False),
    "the notebook's table changed, resealed": (NOTEBOOK, lambda path: shown(path, shown_number), None, True),
    "the notebook's HTML changed, resealed": (NOTEBOOK, lambda path: shown(path, shown_html), None, True),
    "the notebook's verdict changed, resealed": (NOTEBOOK, lambda path: shown(path, shown_verdict), None, True),
    "the notebook missing": (NOTEBOOK, lose, None, False),
    "the notebook cut off, resealed": (NOTEBOOK, lambda path: path.write_text(path.read_text()[:-40]), None, True),
    "provenance dirty, resealed": (f"{SMALL}/provenance.json", lambda path: edit(
        path, lambda record: {**record, "dirty": True}), None, True),
    "provenance without its commit, resealed": (f"{SMALL}/provenance.json", lambda path: edit(
        path, lambda record: {**record, "commit": None}), None, True),
    "provenance without versions, resealed": (f"{SMALL}/provenance.json", lambda path: edit(
        path, lambda record: {**record, "versions": {}}), None, True),
    "provenance of another experiment, resealed": (f"{SMALL}/provenance.json", lambda path: edit(
        path, lambda record: {**record, "experiment": "large"}), None, True),
    "provenance missing": (f"{SMALL}/provenance.json", lose, None, False),
    "status.json of another key": (f"{SMALL}/status.json", lambda path: edit(
        path, lambda status: {**status, "key": "0" * 64}), None, False),
    "status.json damaged": (f"{SMALL}/status.json", lambda path: path.write_text("{"), None, False),
    "a byte of weights": (f"{MODEL}/{HALF}", byte, None, False),
    "weights of another run": (f"{MODEL}/{HALF}", lambda path: shutil.copyfile(
        next(path.parent.parent.glob(f"*multi-scale*/{HALF}")), path), None, False),
    "a model missing": (MODEL, lose, None, False),
    "a model that nothing names": (MODEL, copy_run, "laptop/runs/synthetic-tcr-patch-based-seed0-0000000000000000",
                                   False),
    "a setting of a model": (f"{MODEL}/config.json", lambda path: edit(
        path, lambda content: {**content, "config": {**content["config"], "epochs": 99.0}}), None, False),
    "a setting of a model, resealed": (f"{MODEL}/config.json", lambda path: sealed(
        path, lambda content: content["config"].update(epochs=99.0)), None, False),
    "the data of a model, resealed": (f"{MODEL}/config.json", lambda path: sealed(
        path, lambda content: content.update(data="0" * 64)), None, False),
    "metrics of a model": (f"{MODEL}/metrics.json", digit, None, False),
    "metrics without their hash": (f"{MODEL}/metrics.json", lambda path: edit(
        path, lambda content: {name: each for name, each in content.items() if name != "sha256"}), None, False),
    "a row of the history": (f"{MODEL}/history.csv", digit, None, False),
    "the record of a model": (f"{MODEL}/provenance.json", lambda path: edit(
        path, lambda content: {**content, "device": "cuda"}), None, False),
    "the card's accuracy": (f"{MODEL}/README.md", lambda path: path.write_text(
        re.sub(r"\d+\.\d\d %", "99.99 %", path.read_text())), None, False),
    "a foreign file of a model": (f"{MODEL}/metrics.json", lambda path: shutil.copyfile(path, path.with_name("m.json")),
                                  f"{MODEL[:-1]}*/m.json", False),
    "a number of an evaluation": (EVALUATION, digit, None, False),
    "a number of an evaluation, resealed": (EVALUATION, lambda path: sealed(path, row_number), None, False),
    "an evaluation of another protocol, resealed": (EVALUATION, lambda path: sealed(
        path, lambda content: content["protocol"].update(seed=7)), None, False),
    "an evaluation missing": (EVALUATION, lose, None, False),
    "an evaluation missing, and not recorded": (EVALUATION, lambda path: (lose(path), edit(
        path.parents[3] / "small/status.json", lambda status: {**status, "evaluations": {}})),
        f"{SMALL}/tables/per_seed.csv", False),
    "README's number": ("../README.md", digit, None, False),
    "results/README's number": ("README.md", digit, None, False),
    "a row that README cites is gone": ("README.md", lambda path: path.write_text(
        path.read_text().replace("k == 4", "k == 5")), None, False),
    "a file that no experiment has": ("laptop/claims.csv", lambda path: shutil.copyfile(path, path.with_name("x.csv")),
                                      "laptop/x.csv", False),
}  # fmt: skip


def the_one(results, pattern):
    (path,) = results.parent.glob(f"results/{pattern}") if ".." not in pattern else [results.parent / pattern[3:]]
    return path


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_changed_is_found_and_named(what, results, monkeypatch, capsys):
    monkeypatch.chdir(results.parent)
    pattern, change, named, forged = TAMPERED[what]
    path = the_one(results, pattern)
    before = {each: file_hash(each) for each in results.parent.rglob("*") if each.is_file()}
    change(path)
    if forged:
        reseal(results / SMALL)
    if path.exists() and path.is_file() and named is None:
        assert file_hash(path) != before[path]
    name = (the_one(results, named) if named else path).relative_to(results.parent).as_posix()
    assert cli.main(["verify", "results"]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert any(line.startswith(f"OFF  {name}: ") for line in lines), "\n".join(
        line for line in lines if not line.startswith("ok"))
    first = next(line for line in lines if line.startswith("OFF"))
    assert err.count("\n") == 1 and first.removeprefix("OFF  ") in err and "Traceback" not in err
    assert all(line.startswith(("ok   ", "OFF  ")) for line in lines)


def test_a_record_as_it_was_made_passes_whole_or_in_part(results, monkeypatch, capsys):
    monkeypatch.chdir(results.parent)
    for folder in ("results", "results/laptop", "results/laptop/small", str(results)):
        assert cli.main(["verify", folder]) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        assert last == f"{len(lines)} artefacts, all as they were recorded" and len(lines) > 20
        paths = [line[5:].partition(": ")[0] for line in lines]
        assert len(set(paths)) == len(paths), "a line for each"
        assert not [line for line in lines if not line.startswith("ok   ")]
    files = {path.relative_to(results.parent).as_posix() for path in (results / SMALL).rglob("*")
             if path.is_file() and path.suffix != ".html"}  # fmt: skip
    assert cli.main(["verify", "results"]) == 0
    said = capsys.readouterr().out
    assert all(f" {name}: " in said for name in files | {"README.md", "results/README.md", "results/laptop/claims.csv"})
    for name in ("per_seed", "accuracy", "gains", "claim_c2"):
        assert f"tables/{name}.csv: hash, follows from the evaluations" in said
    assert cli.main(["verify", "results", "--quiet"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


KINDS = [f"{SMALL}/status.json", f"{SMALL}/provenance.json", NOTEBOOK, f"{SMALL}/tables/accuracy.csv",
         f"{SMALL}/tables/claim_c2.csv", f"{SMALL}/tables/gains.md", f"{SMALL}/tables/gains.tex",
         f"{SMALL}/tables/per_seed.csv", f"{SMALL}/figures/accuracy_against_k.png", "laptop/claims.csv",
         f"{MODEL}/config.json", f"{MODEL}/metrics.json", f"{MODEL}/provenance.json", f"{MODEL}/history.csv",
         f"{MODEL}/{HALF}", EVALUATION]  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"\0\xff", b'{"runs": 7, "files": [], "evaluations": {"a": 7}}'])
def test_whatever_stands_in_a_files_place_is_named_and_no_bug(content, results):
    for pattern in KINDS:
        path = the_one(results, pattern)
        whole = path.read_bytes()
        path.write_bytes(content)
        if path.parent.name != "small" or path.suffix == ".ipynb":
            reseal(results / SMALL)
        assert str(path) in "\n".join(verify(results / SMALL).faults + verify(results / "laptop").faults), pattern
        path.write_bytes(whole)
        reseal(results / SMALL)
    assert verify(results).faults == []


def test_what_is_no_record_is_one_line_and_code_2(results, tmp_path, capsys):
    for folder in (tmp_path / "nothing", results / "laptop/runs", results / "laptop/small/tables",
                   results / "README.md", the_one(results, MODEL)):  # fmt: skip
        assert cli.main(["verify", str(folder)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["verify"]) == 2


def test_results_of_before_there_were_hashes_say_so(results, capsys):
    edit(results / SMALL / "status.json", lambda status: {name: each for name, each in status.items()
                                                          if name not in ("files", "evaluations")})
    assert cli.main(["verify", str(results / SMALL)]) == 0
    assert "figures/accuracy_against_k.pdf: no hash recorded" in capsys.readouterr().out


def test_several_faults_are_all_listed(results, capsys):
    for name in ("per_seed.tex", "gains.tex"):
        digit(results / SMALL / "tables" / name)
    assert cli.main(["verify", str(results), "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "2 of " in err and "gains.tex" in err and "per_seed.tex" not in err


def test_the_committed_record_is_what_it_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = verify("results")
    assert found.faults == []
    assert len(found.lines) > 500 and any("follows from the evaluations" in line for line in found.lines)


@pytest.mark.parametrize("text, value, same", [
    ("4.2", 4.25, True), ("4.3", 4.25, True), ("4.2", 4.2501, False), ("4.2", 4.149, False), ("13", 13.0625, True),
    ("-0.5", -0.5049, True), ("1e-05", 1e-05, True), ("755200", 755200.0, True), ("755201", 755200.0, False),
    ("0.00", 0.0049, True), ("0.00", 0.006, False), ("5.33e-15", 5.33e-15, True)])  # fmt: skip
def test_a_number_agrees_with_what_it_may_have_been_rounded_from(text, value, same):
    assert agreement.rounded(text, value) == same


def test_the_images_that_were_right_say_among_how_many():
    right = np.arange(77) % 3 == 0
    row = {"correct": np.packbits(right).tobytes().hex(), "accuracy": 100 * right.mean()}
    assert agreement.test_images(row) == 77
    with pytest.raises(ValueError, match="is not that of the images"):
        agreement.test_images({**row, "accuracy": row["accuracy"] + 0.1})


def test_random_weights_may_stand_where_a_training_begins_and_nothing_else_may():
    """As in notebook 11: accuracy along a training, whose first point is of no training."""
    common = {"k": 16, "probe": "knn", "feature": "h", "seed": 0, "low": 20.0, "high": 30.0}
    measured = pd.DataFrame([{**common, "objective": "none", "training": "untrained", "accuracy": 25.0},
                             {**common, "objective": "tcr", "training": "multi-scale", "accuracy": 27.0}])
    measured = measured.assign(of="a", by="b")
    table = measured.drop(columns=["of", "by"]).assign(training="multi-scale")
    assert agreement.follows(table, measured) == ""
    assert agreement.follows(table.assign(accuracy=[25.0, 27.5]), measured).startswith("1 of 2 rows follow from no")
    assert agreement.follows(table.assign(accuracy=[25.5, 27.0]), measured).startswith("1 of 2 rows follow from no")
    assert agreement.follows(table.assign(objective="tcr"), measured).startswith("1 of 2 rows follow from no")
    assert agreement.follows(table.assign(training="patch-based"), measured).startswith("1 of 2 rows follow from no")
