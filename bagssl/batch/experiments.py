"""notebooks/experiments.yaml, the only list of experiments: what each regenerates, by which notebook, how large."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bagssl.errors import InputError, check_choice
from bagssl.parameters import read_yaml
from bagssl.paths import RECORDED, home

PROFILES = ("smoke", *RECORDED)
WORTH = "order-of-worth"  # the entry that is no experiment


@dataclass(frozen=True)
class Profile:
    """How large an experiment is executed: for a laptop, for a paper."""

    cost: str  # time and hardware
    parameters: dict[str, Any]  # what differs from the notebook's defaults


@dataclass(frozen=True)
class Experiment:
    """An entry of experiments.yaml: a notebook, and its parameters in each profile."""

    name: str
    artefact: str  # the table, figure or claim of the paper
    notebook: Path
    profiles: dict[str, Profile]


def load_experiments(notebooks: Path | None = None) -> dict[str, Experiment]:
    """Read and check `notebooks`/experiments.yaml (default: notebooks/ of the checkout).

    Raises InputError, in one line, for a file that is absent, not YAML, or not of the expected shape.
    """
    return _checked(*_read(notebooks))


def _checked(path: Path, entries: Mapping[str, Any]) -> dict[str, Experiment]:
    """The experiments among the entries of the file `path`, in whose folder their notebooks lie."""
    def check(value: Any, where: str, required: set[str]) -> None:
        if not isinstance(value, dict) or set(value) != required:
            found = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise InputError(f"{path}: {where} needs exactly {', '.join(sorted(required))}; found {found}")

    experiments = {}
    for name, entry in entries.items():
        if name == WORTH:
            continue
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", str(name)):
            raise InputError(f"{path}: {name!r} is no experiment name; use small letters, digits and '-'")
        check(entry, name, {"artefact", "notebook", "profiles"})
        if not isinstance(entry["profiles"], dict) or not entry["profiles"]:
            raise InputError(f"{path}: {name}: profiles must map a profile to its cost and parameters")
        if not os.path.isfile(path.parent / str(entry["notebook"])):  # False for whatever is no name of a file, too
            raise InputError(f"{path}: {name}: there is no notebook {entry['notebook']} in {path.parent}")
        profiles = {}
        for profile, value in entry["profiles"].items():
            if profile not in PROFILES:
                raise InputError(f"{path}: {name}: unknown profile {profile!r}; known: {', '.join(PROFILES)}")
            check(value, f"{name}: {profile}", {"cost", "parameters"})
            if not isinstance(value["parameters"], dict):
                raise InputError(f"{path}: {name}: {profile}: parameters must be a mapping, {{}} for none")
            profiles[profile] = Profile(str(value["cost"]), value["parameters"])
        experiments[name] = Experiment(name, str(entry["artefact"]), path.parent / entry["notebook"], profiles)
    return experiments


def _read(notebooks: Path | None) -> tuple[Path, dict[str, Any]]:
    """The file that lists experiments, and its entries."""
    path = Path(notebooks or home() / "notebooks") / "experiments.yaml"
    try:
        entries = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: run bagssl from a checkout of the project") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: no UTF-8
        raise InputError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path}: expected a mapping from experiment to its entry")
    return path, entries


def order_of_worth(profile: str, notebooks: Path | None = None) -> list[tuple[Experiment, dict[str, Any]]]:
    """The experiments of a profile, the most wanted first, each with parameters in place of the profile's own.

    An experiment may come several times, a part of it each time. Without such a list for the profile: all that have it,
    in the order of the file. Raises InputError as `load_experiments` does.
    """
    path, entries = _read(notebooks)
    experiments = _checked(path, entries)
    check_choice("profile", profile, PROFILES)
    listed = (entries.get(WORTH) or {}).get(profile)
    if listed is None:
        return [(experiment, {}) for experiment in choose(experiments, (), profile)]
    found = []
    for entry in listed:
        if not isinstance(entry, dict) or len(entry) != 1 or not isinstance(*entry.values(), dict):
            raise InputError(f"{path}: {WORTH}: {profile}: {entry!r} must be an experiment with its parameters, {{}} "
                             "for none")  # fmt: skip
        ((name, parameters),) = entry.items()
        found += [(experiment, parameters) for experiment in choose(experiments, [name], profile)]
    return found


def choose(experiments: Mapping[str, Experiment], names: Sequence[str], profile: str) -> list[Experiment]:
    """The experiments asked for, once each; without names, all that have the profile."""
    check_choice("profile", profile, PROFILES)
    for name in names:
        check_choice("experiment", name, list(experiments))
        if profile not in experiments[name].profiles:
            known = ", ".join(experiments[name].profiles)
            raise InputError(f"experiment {name} has no profile {profile}; it has: {known} (--profile)")
    return [experiments[name] for name in dict.fromkeys(names or experiments) if profile in experiments[name].profiles]
