"""Whatever it is given, it works or says in one line why not; 240 cases by `make test`, 2,400 by `make test-all`."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bagssl import cli, data, evaluation, pretraining, runs, trees
from bagssl.batch import stages
from bagssl.batch.experiments import choose, load_experiments
from bagssl.config import PretrainConfig
from bagssl.errors import InputError
from bagssl.parameters import conform

# By `make test` the same cases each time, so that it fails for a change and not by chance.
NIGHTLY = os.environ.get("BAGSSL_FUZZ") == "nightly"
cases = settings(max_examples=400 if NIGHTLY else 40, deadline=None, derandomize=not NIGHTLY, database=None,
                 suppress_health_check=list(HealthCheck))  # fmt: skip

WORDS = st.sampled_from([
    "", "cifar10", "synthetic", "tcr", "byol", "patch-based", "multi-scale", "untrained", "lars", "adamw", "resnet18",
    "true", "1e-3", "0", "-1", "nan", "1,4", "[1, 4]", "{a: 1}", "null", "~", "é", "a b", "a\nb", "../x"])  # fmt: skip
NUMBERS = st.integers(-(2**70), 2**70) | st.just(10**400) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)


def one_line(error: Exception) -> None:
    assert 10 < len(str(error)) < 2000 and len(str(error).splitlines()) == 1, str(error)


# ---- settings and parameters

FIELDS = list(PretrainConfig.__dataclass_fields__)


@cases
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), VALUES, max_size=3))
def test_a_configuration_is_refused_or_keeps_its_key(values):
    try:
        config = PretrainConfig.from_dict(values)
    except InputError as error:
        return one_line(error)
    kept = json.loads(json.dumps(config.to_dict()))
    again = PretrainConfig.from_dict(kept)
    assert again == config and runs.run_key(again.to_dict(), "x") == runs.run_key(config.to_dict(), "x")


@cases
@given(st.sampled_from(["bool", "int", "float", "str", "dict", "list", "list[int]", "list[str]", "list[float]",
                        "float | None", "object"]), VALUES)  # fmt: skip
def test_a_parameter_is_refused_or_has_its_type(annotation, value):
    try:
        found = conform("p", value, annotation)
    except InputError as error:
        return one_line(error)
    assert repr(conform("p", found, annotation)) == repr(found)  # by repr: NaN is not itself
    kinds = {"bool": bool, "int": int, "float": float, "str": str, "dict": dict, "list": list}
    assert isinstance(found, kinds.get(annotation.split("[")[0], object))


# ---- the list of experiments

LIST = {"good": {"artefact": "Table 1", "notebook": "good.ipynb", "profiles": {
    "smoke": {"cost": "1 s", "parameters": {"count": 3, "rates": [0.5]}},
    "paper": {"cost": "1 h", "parameters": {}}}}}  # fmt: skip


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("notebooks")
    source = 'dataset: str = "synthetic"\ncount: int = 2\nrates: list[float] = [1.0]\n'
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source}
    (folder / "good.ipynb").write_text(json.dumps({"cells": [cell]}))
    return folder


@st.composite
def lists(draw) -> str:
    """Text, or the list of experiments with something else in one of its places."""
    if draw(st.booleans()):
        return draw(st.text(max_size=30) | VALUES.map(lambda value: yaml.safe_dump(value, allow_unicode=True)))
    changed = copy.deepcopy(LIST)
    entry = changed
    while True:
        name = draw(st.sampled_from(sorted(entry)))
        if not isinstance(entry[name], dict) or not entry[name] or draw(st.integers(0, 2)) == 0:
            break
        entry = entry[name]
    if draw(st.booleans()):
        entry[name] = draw(VALUES)
    else:
        entry[draw(st.text(max_size=5))] = entry.pop(name)
    return yaml.safe_dump(changed, allow_unicode=True)


@cases
@given(lists())
def test_a_list_of_experiments_is_refused_or_planned(notebooks, text):
    (notebooks / "experiments.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        known = load_experiments(notebooks)
        for experiment in choose(known, [], "smoke"):
            stage = stages.plan(experiment, "smoke", results=notebooks / "results", fetch=False)
            assert len(stage.key) == 64 and stages.state(stage) == "missing"
    except InputError as error:
        one_line(error)


# ---- trees of images

NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=12)
NAMES = NAMES.filter(lambda name: name not in (".", ".."))


@st.composite
def files(draw) -> bytes:
    """A picture of some format and mode, whole or cut short, or bytes that are none."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=60))
    kind, mode = draw(st.sampled_from([
        ("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"), ("PNG", "1"),
        ("JPEG", "RGB"), ("JPEG", "CMYK"), ("GIF", "P"), ("TIFF", "F"), ("BMP", "RGB")]))  # fmt: skip
    side, stream = draw(st.sampled_from([1, 2, 8, 8, 8, 9])), io.BytesIO()
    Image.new(mode, (side, draw(st.sampled_from([side, 8])))).save(stream, kind)
    whole = stream.getvalue()
    return whole[: draw(st.integers(0, len(whole)))] if draw(st.integers(0, 4)) == 0 else whole


@cases
@given(st.lists(st.tuples(st.sampled_from(["train", "test", "train", "test", "val"]),
                          st.sampled_from(["a", "b"]) | NAMES,
                          st.sampled_from(["1.png", "2.png", "3.jpg"]) | NAMES, files()), max_size=8),
       st.sampled_from([None, 8, 8, 0]))  # fmt: skip
def test_a_tree_is_refused_or_read_as_it_is(tmp_path_factory, tree, size):
    folder = tmp_path_factory.mktemp("tree")
    try:
        for split, label, name, content in tree:
            with contextlib.suppress(OSError):  # a name that this file system does not take
                (folder / "images" / split / label).mkdir(parents=True, exist_ok=True)
                (folder / "images" / split / label / name).write_bytes(content)
        try:
            trees.add("mine", folder / "images", size=size, root=folder / "data")
        except InputError as error:
            one_line(error)
            assert not list(folder.glob("data/*"))
        else:
            train, test = (data.load("mine", split, root=folder / "data") for split in ("train", "test"))
            assert len(train) and len(test) and train.classes == test.classes
            assert int(train.labels.max()) < len(train.classes)
            assert train.pixels.dtype == torch.uint8 and train.pixels.shape[1:] == test.pixels.shape[1:]
    finally:
        shutil.rmtree(folder)


# ---- folders of runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    images = data.subset(data.load("synthetic", "train"), 40)
    config = PretrainConfig(width=8, size=8, batch_size=16, views=2, projector_hidden=16, projector_dim=8, epochs=1)
    root = tmp_path_factory.mktemp("runs")
    run = pretraining.pretrain(config, images, root, progress=False)
    rows = evaluation.evaluate(run, images, images, [0, 2], probes=["knn"], scale=0.25, progress=False)
    return config, images, root, run, rows


DAMAGE = st.sampled_from(["remove", "empty", "cut", "flip", "json", "folder"])


@cases
@given(st.lists(st.tuples(st.integers(0, 5), DAMAGE, st.integers(0, 10**9), VALUES), min_size=1, max_size=3))
def test_a_damaged_run_is_refused_or_gives_what_it_gave(finished, tmp_path_factory, damages):
    config, images, root, run, rows = finished
    folder = tmp_path_factory.mktemp("store")
    shutil.copytree(root, folder, dirs_exist_ok=True)
    try:
        mine = runs.Run(folder / run.path.name)
        paths = sorted(path for path in mine.path.rglob("*") if path.is_file() and not path.name.startswith("."))
        for index, kind, place, value in damages:
            damage(paths[index % len(paths)], kind, place, value)
        for ask in (lambda: pretraining.load_encoder(mine), lambda: mine.history, lambda: mine.metrics,
                    lambda: runs.list_runs(folder)):  # fmt: skip
            with contextlib.suppress(InputError):
                ask()
        try:
            again = pretraining.pretrain(config, images, folder, progress=False, device="cpu")
            weights = again.weights()
            found = evaluation.evaluate(again, images, images, [0, 2], probes=["knn"], scale=0.25, progress=False)
        except InputError as error:
            one_line(error)
        else:
            assert all(torch.equal(weights[name], tensor) for name, tensor in run.weights().items())
            assert [row["accuracy"] for row in found] == [row["accuracy"] for row in rows]
            with contextlib.suppress(InputError):
                assert [row["loss"] for row in again.history] == [row["loss"] for row in run.history]
    finally:
        shutil.rmtree(folder)


def damage(path: Path, kind: str, place: int, value) -> None:
    if not path.is_file():
        return
    content = path.read_bytes()
    if kind == "remove":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(content[: place % (len(content) + 1)])
    elif kind == "flip" and content:
        at = place % len(content)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << place % 8]) + content[at + 1 :])
    elif kind == "json":
        path.write_text(json.dumps(value))
    elif kind == "folder":
        path.unlink()
        path.mkdir()


# ---- the command line

ARGUMENTS = st.lists(st.sampled_from([
    "reproduce", "list", "report", "data", "get", "add", "check", "pretrain", "bench", "notebooks", "tour", "cifar10",
    "synthetic", "--set", "--profile", "smoke", "paper", "--jobs", "2", "--time-limit", "9m", "--fresh", "--bare",
    "--dataset", "--objective", "tcr", "--seed", "epochs=1", "seeds=[0, 1]", "--quick", "--help", "--version", "-h",
    "evaluate", "m.pth", "m.pth,arch=nets:net", "torchvision:resnet18", "--arch", "--size", "--ks", "--csv",
    "--", "-1", "="]) | WORDS | st.text(max_size=5), max_size=6)  # fmt: skip


@cases
@given(ARGUMENTS)
def test_a_command_ends_with_a_code_of_its_own_and_one_line(words):
    said, shown = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:  # whatever takes long, or the network, is taken as done
        begins = InputError("this is where the work would begin")
        for work in ("batch.reproduce.reproduce", "batch.reproduce.reproduce_bare", "batch.report.write_report",
                     "batch.reproduce.refresh_notebooks", "bench.bench", "pretraining.pretrain", "trees._download",
                     "foreign.load"):
            stack.enter_context(mock.patch(f"bagssl.{work}", side_effect=begins))
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(contextlib.redirect_stdout(shown))
        try:
            code = cli.main(words)
        except SystemExit as end:  # argparse: --help and --version
            code = end.code
    assert code in (0, 2), (code, said.getvalue())
    assert len(said.getvalue().splitlines()) == (code == 2), said.getvalue()
