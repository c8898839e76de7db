"""The three files that say what is installed agree, and the training core needs no notebook software."""

from __future__ import annotations

import ast
import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from bagssl import data

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "bagssl").rglob("*.py"))
FILES = ("pyproject.toml", "requirements.lock", "environment.yml")
MACHINES = [
    {"sys_platform": system, "python_version": python, "python_full_version": f"{python}.0"}
    for system, python in itertools.product(("linux", "darwin"), ("3.11", "3.12", "3.13"))
]
UNLOCKED = ("trackio", "wandb")  # extras: they would hold back what the lock has, or weigh much for few
CONDA_NAMES = {"playwright": "playwright-python", "torch": "pytorch"}
IMPORT_NAMES = {"PIL": "pillow", "yaml": "pyyaml", "IPython": "ipython", "sklearn": "scikit-learn"}
CORE = ("data", "trees", "patches", "encoders", "objectives", "pretraining", "bags", "probes", "runs", "evaluation")
NOTEBOOK_SOFTWARE = {
    *("IPython", "ipykernel", "ipywidgets", "jupyter", "jupyter_client", "jupyter_core", "jupyterlab"),
    *("matplotlib", "nbclient", "nbconvert", "nbformat", "pandas", "papermill", "seaborn"),
}


def texts() -> dict[str, str]:
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}


def declared(pyproject: str) -> dict[str, list[Requirement]]:
    """The requirements of pyproject.toml: `core` and each extra."""
    project = tomllib.loads(pyproject)["project"]
    groups = {"core": project["dependencies"], **project["optional-dependencies"]}
    return {group: [Requirement(line) for line in lines] for group, lines in groups.items()}


def locked(lock: str) -> list[tuple[Requirement, list[str]]]:
    """The pins of requirements.lock, each with its hashes."""
    lines = [line for line in lock.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    entries = "\n".join(line for line in lines if not line.startswith("-")).replace("\\\n", " ").splitlines()
    parts = [re.split(r"\s--hash=", entry) for entry in entries]
    return [(Requirement(head), [digest.strip() for digest in hashes]) for head, *hashes in parts]


def lock_faults(lock: str, requirements: list[Requirement]) -> list[str]:
    faults, pins = [], {}
    for pin, hashes in locked(lock):
        pins.setdefault(canonicalize_name(pin.name), []).append(pin)
        if not re.fullmatch(r"==[^,*]+", str(pin.specifier)):
            faults.append(f"{pin.name} has no exact version")
        if not hashes or not all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes):
            faults.append(f"{pin.name} lacks a SHA-256")
    # A place has a slash, an option starts its line with a dash: neither has business in a lock.
    faults += [f"names a place: {line}" for line in lock.splitlines() if re.search(r"/|^-| @ ", line)]

    def version(name: str, machine: dict[str, str]) -> Version | None:
        candidates = pins.get(canonicalize_name(name), [])
        fitting = [pin for pin in candidates if not pin.marker or pin.marker.evaluate(machine)]
        return Version(str(fitting[0].specifier)[2:]) if len(fitting) == 1 else None

    for machine in MACHINES:
        place = f"{machine['sys_platform']} {machine['python_version']}"
        for requirement in requirements:
            found = version(requirement.name, machine)
            if found is None or not requirement.specifier.contains(found):
                faults.append(f"{requirement} meets {found} on {place}")
        # torchvision 0.(n + 15) is built against torch 2.n, and both are of one flavour (+cpu, +cu130, none).
        torch, vision = version("torch", machine), version("torchvision", machine)
        if torch and vision:
            partner = (torch.major - 2, torch.minor + 15, torch.micro, torch.local)
            if partner != (vision.major, vision.minor, vision.micro, vision.local):
                faults.append(f"torch {torch} and torchvision {vision} are not builds for each other")
    return faults


def conda_faults(environment: str, python: str, requirements: list[Requirement]) -> list[str]:
    lines = yaml.safe_load(environment)["dependencies"]
    ours = {r.name: r.specifier for r in map(Requirement, filter(lambda line: isinstance(line, str), lines))}
    wanted = {CONDA_NAMES.get(r.name, r.name): r.specifier for r in requirements}
    wanted |= {r.name: r.specifier for r in (Requirement(f"python{python}"), Requirement("pip"))}
    names = sorted(ours.keys() | wanted.keys())
    faults = [f"{n}: {ours.get(n)}, not {wanted.get(n)}" for n in names if ours.get(n) != wanted.get(n)]
    return faults if {"pip": ["-e ."]} in lines else [*faults, "the package is not installed"]


def disagreements(files: dict[str, str]) -> list[str]:
    """What is wrong among the three files, one line each; empty when they agree."""
    groups = declared(files["pyproject.toml"])
    python = tomllib.loads(files["pyproject.toml"])["project"]["requires-python"]
    everything = [requirement for name in groups.keys() - {*UNLOCKED} for requirement in groups[name]]
    lock = lock_faults(files["requirements.lock"], everything)
    conda = conda_faults(files["environment.yml"], python, groups["core"] + groups["test"])
    return [f"lock: {fault}" for fault in lock] + [f"conda: {fault}" for fault in conda]


def test_pyproject_lock_and_environment_agree():
    assert disagreements(texts()) == []


@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "complaint"),
    [
        ("environment.yml", r"pytorch>=2\.11", "pytorch>=2.9", "conda: pytorch: >=2.9, not >=2.11"),
        ("environment.yml", r"  - seaborn.*\n", "", "conda: seaborn: None"),
        ("environment.yml", r"  - pip\n", "  - pip\n  - sympy\n", "conda: sympy: , not None"),
        ("environment.yml", r"python>=3\.11", "python>=3.10", "conda: python: >=3.10, not >=3.11"),
        ("environment.yml", r"- -e \.", "- bagssl", "conda: the package is not installed"),
        ("pyproject.toml", r'"torch>=[^"]*"', '"torch>=99"', "lock: torch>=99 meets 2.11.0 on linux 3.11"),
        ("pyproject.toml", r'"tqdm>=', '"new>=1", "tqdm>=', "lock: new>=1 meets None on darwin 3.13"),
        ("requirements.lock", r"(?m)^torchvision==\S+", "torchvision==0.27.0", "not builds for each other"),
        ("requirements.lock", r"(?m)^torch==\S+", "torch==2.11.0+cpu", "are not builds for each other"),
        ("requirements.lock", r"(?m)^tqdm==\S+", r"\g<0> ; sys_platform == 'linux'", "meets None on darwin"),
        ("requirements.lock", r"(?m)^six==", "six>=", "lock: six has no exact version"),
        ("requirements.lock", r"(?m)^(six==\S+) \\\n(    --hash.*\n)+", "\\1\n", "lock: six lacks a SHA-256"),
        ("requirements.lock", r"(?m)^six==", "-i example\n\\g<0>", "names a place: -i example"),
        ("requirements.lock", r"(?m)^six==", "--find-links example\n\\g<0>", "names a place: --find-links"),
        ("requirements.lock", r"# via", "# via -r /somewhere/", "lock: names a place"),
    ],
)
def test_a_doctored_copy_is_caught(name, pattern, replacement, complaint):
    files = texts()
    doctored, count = re.subn(pattern, replacement, files[name], count=1)
    assert count == 1
    found = disagreements({**files, name: doctored})
    assert any(complaint in fault for fault in found), found


def imported(source: str) -> set[str]:
    """The packages that a module names in its import statements, wherever they stand."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"bagssl"}


def test_what_the_package_imports_is_declared():
    declared_names = {canonicalize_name(r.name) for r in declared(texts()["pyproject.toml"])["core"]}
    for path in MODULES:
        found = imported(path.read_text(encoding="utf-8"))
        undeclared = {canonicalize_name(IMPORT_NAMES.get(name, name)) for name in found} - declared_names
        assert not undeclared, f"{path} imports what pyproject.toml does not declare"


UNSAFE = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False", "numpy.load": "allow_pickle=False",
          "yaml.load": None, "pickle.load": None, "pickle.loads": None, "pickle.Unpickler": None, "joblib.load": None,
          "pd.read_pickle": None, "torch.hub.load": None, "eval": None, "exec": None}  # fmt: skip


def unsafe(source: str) -> list[str]:
    """The calls that would run what a file says: those of `UNSAFE` without the argument that makes them safe."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in calls if (name := ast.unparse(call.func)) in UNSAFE
            and UNSAFE[name] not in [ast.unparse(keyword) for keyword in call.keywords]]  # fmt: skip


def test_no_file_is_read_in_a_way_that_runs_it():
    sources = {path: path.read_text(encoding="utf-8") for path in MODULES}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources[path] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert len(sources) > 30 and any("torch.load(" in source for source in sources.values())
    found = {path.name: calls for path, source in sources.items() if (calls := unsafe(source))}
    assert list(found) == ["notebook.py"]  # where `--bare` runs the notebooks themselves, and nothing else
    (call,) = found["notebook.py"]
    assert call.startswith("exec(compile(''.join(cell['source'])")
    assert unsafe("torch.load(path, weights_only=False)") and unsafe("pickle.load(stream)") and unsafe("np.load(x)")
    assert not unsafe("torch.load(path, weights_only=True)")


def test_every_promise_names_a_test_that_exists():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "tests" / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 60
    tests = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    assert [f"{file}::{test}" for file, test in named if f"def {test}(" not in tests.get(file, "")] == []


def loaded_by(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after the statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_the_training_core_loads_no_notebook_software():
    loaded = loaded_by("\n".join(f"import bagssl.{module}" for module in CORE))
    assert loaded & NOTEBOOK_SOFTWARE == set()
    assert loaded_by("import nbformat") & NOTEBOOK_SOFTWARE  # the check does see what it looks for


def test_a_box_without_jupyter_can_train_measure_and_race():
    """All modules but the pages, of results and of code: pandas, scikit-learn and seaborn will do."""
    absent = sorted(NOTEBOOK_SOFTWARE - {"matplotlib", "pandas", "seaborn"} | {"mistune"})
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES}
    names -= {"bagssl.batch.report", "bagssl.batch.docs"}
    without = f"sys.modules |= dict.fromkeys({absent})\n"
    loaded_by(without + "\n".join(f"import {name}" for name in sorted(names)))
    with pytest.raises(AssertionError, match="import of nbconvert halted|import of mistune halted"):
        loaded_by(f"{without}import bagssl.batch.report")


def test_the_data_readme_states_the_checksums_that_are_true():
    from torchvision.datasets import CIFAR10, CIFAR100

    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    for split, fingerprint in data.check("synthetic").items():
        assert f"| `synthetic` | {split} | `{fingerprint}` |" in readme
    for kind in (CIFAR10, CIFAR100):
        assert f"| `{kind.filename}` | `{kind.tgz_md5}` |" in readme


def test_hooks_before_a_commit_use_the_versions_of_the_lock():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    pinned = {name: version for hook in hooks for each in hook["additional_dependencies"]
              for name, version in [each.split("==")]}  # fmt: skip
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert f"\nruff=={pinned['ruff']} " in lock
    for name, version in pinned.items():
        assert f"\n{name}==" not in lock or f"\n{name}=={version} " in lock
