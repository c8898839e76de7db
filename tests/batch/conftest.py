"""A folder of notebooks that end in every way, and what a batch made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_experiments import NOTEBOOKS, write_list, write_notebook

from bagssl.batch.reproduce import reproduce


@pytest.fixture(scope="session")
def notebooks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("notebooks") / "Zoë's notebooks"
    folder.mkdir()
    for name, cells in NOTEBOOKS.items():
        write_notebook(folder / f"{name}.ipynb", cells)
    write_list(folder)
    return folder


@pytest.fixture(scope="session")
def results(notebooks, tmp_path_factory) -> Path:
    """Five notebooks, two side by side, of which one ends well; `codes.json` holds the exit codes."""
    folder = tmp_path_factory.mktemp("results") / "Zoë's \"results\"\nof [to]day"
    folder.mkdir()
    settings = {"jobs": 2, "notebooks": notebooks, "results": folder}
    codes = {"bad": reproduce(["good", "killed", "left", "refused"], **settings),
             "stopped": reproduce(["good", "stopped"], time_limit=600, **settings)}
    (folder / "codes.json").write_text(json.dumps(codes))
    return folder
