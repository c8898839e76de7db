"""The comparison of claim C2: arms of one objective that differ only in their crops, over seeds."""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bagssl import foreign, intervals, records, runs
from bagssl.config import PretrainConfig
from bagssl.data import Images
from bagssl.errors import DoesNotFit, InputError, check_choice
from bagssl.evaluation import evaluate, unpack_correct
from bagssl.foreign import Foreign
from bagssl.objectives import OBJECTIVES
from bagssl.paths import results_root
from bagssl.pretraining import pretrain
from bagssl.runs import Run
from bagssl.study import claims
from bagssl.words import join

COLUMNS = ["objective", "training", "k", "probe", "feature", "accuracy_mean", "accuracy_std", "seeds"]


def arms(objectives: Sequence[str], seeds: Sequence[int], recipe: Mapping[str, Any],
         overrides: Mapping[str, Mapping[str, Any]],
         trainings: Sequence[str] = ("patch-based", "multi-scale")) -> list[PretrainConfig]:
    """One configuration per objective, training and seed, and an untrained encoder per seed.

    `overrides` maps an objective to the settings in which its recipe differs, the same for both of its arms; those of
    objectives that are not asked for wait until they are.
    Raises InputError for a setting that does not exist, or an objective or seed that is missing or named twice.
    """
    for name, values in (("objectives", objectives), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise InputError(f"{name} = {list(values)!r}: name at least one, and each once")
    for name, settings in overrides.items():
        check_choice("objective in overrides", name, OBJECTIVES)
        if not isinstance(settings, Mapping):
            raise InputError(f"overrides of {name} = {settings!r} must be a mapping of settings to values")
    changes = [{**overrides.get(objective, {}), "objective": objective, "training": training, "seed": seed}
               for objective in objectives for training in trainings for seed in seeds]  # fmt: skip
    changes += [{"training": "untrained", "seed": seed, "options": {}} for seed in seeds]  # they are an objective's
    return [PretrainConfig.from_dict({**recipe, **change}) for change in changes]


def varied(objective: str, seeds: Sequence[int], recipe: Mapping[str, Any],
           overrides: Mapping[str, Mapping[str, Any]], settings: Any, *, crops_per_step: int,
           epochs: float) -> list[PretrainConfig]:  # fmt: skip
    """As `arms` of one training, by default patch-based, with other settings than the recipe's, on as many crops.

    epochs: with the views of the recipe; where views differ, images of a step and epochs are such that as many crops
    come in as many steps, but for rounding. Raises InputError for settings that are no mapping, or set one of these.
    """
    if not isinstance(settings, Mapping):
        raise InputError(f"{settings!r} must be a mapping of settings to values")
    if wrong := sorted({"dataset", "objective", "seed", "epochs", "batch_size"} & settings.keys()):
        raise InputError(f"{', '.join(wrong)} is set by the notebook itself")
    each = {**recipe, **overrides.get(objective, {}), **settings}  # what is tried comes last
    training = [each.pop("training", "patch-based")]
    views = arms([objective], seeds, each, {}, training)[0].views
    length = {"batch_size": max(2, round(crops_per_step / views)), "epochs": epochs * recipe["views"] / views}
    return arms([objective], seeds, {**each, **length}, {}, training)


def train_all(configs: Sequence[PretrainConfig], images: Images, **options: Any) -> list[Run]:
    """The finished run of each configuration; what the store holds is not trained again. options: of `pretrain`.

    Raises DoesNotFit, after those for which there is time, for all that have none.
    """
    trained, unfit = [], []
    for config in configs:
        try:
            trained.append(pretrain(config, images, **options))
        except DoesNotFit as stop:
            unfit.append(str(stop))
    if unfit:
        raise DoesNotFit("; ".join(unfit))
    return trained


def along(configs: Sequence[PretrainConfig], images: Images, ends: Sequence[float],
          **options: Any) -> dict[str, dict[int, Run]]:  # fmt: skip
    """Training -> crops seen -> the run that ended there, on the way to the end of its schedule; 0: random weights.

    configs: as of `arms`, for one objective and seed. ends: epochs. options: of `pretrain`, whose errors it raises.
    """
    random = [pretrain(config, images, **options) for config in configs if not config.epochs]
    found = {}
    for config in (config for config in configs if config.epochs):
        pretrain(config, images, along=[end for end in ends if end < config.epochs], **options)
        ended = [pretrain(replace(config, until=end), images, **options) for end in sorted(ends)]
        found[config.training] = {run.metrics["crops"]: run for run in [*random, *ended]}
    return found


def others(words: Sequence[str], images: Images, **options: Any) -> list[tuple[Run | Foreign, Run | Foreign]]:
    """Each encoder that a word names, see words.py, and its network with random weights, as a control.

    Of a run of ours the control is the untrained run of its configuration, found or made as by `pretrain`. Raises
    InputError for a word that names no encoder, one named twice, or two that tables would call the same.
    """
    found = foreign.find_all(words)
    pairs = [(model, foreign.load(word, untrained=0) if isinstance(model, Foreign) else
              pretrain(PretrainConfig.from_dict({**model.config, "training": "untrained"}), images, **options))
             for word, model in zip(join(words), found, strict=True)]  # fmt: skip
    called: dict[str, Path] = {}
    for model in itertools.chain(*pairs):
        if called.setdefault(label(model), model.path) != model.path:
            raise InputError(f"encoders: two networks would be called {label(model)!r} in tables: give the files other "
                             "names, or look at one after the other")  # fmt: skip
    return pairs


def label(model: Run | Foreign) -> str:
    """A model's name in tables: its objective, `none` for random weights; of others' encoders their own name."""
    if isinstance(model, Foreign):
        return model.title
    return "none" if model.config["training"] == "untrained" else model.config["objective"]


def seed(model: Run | Foreign) -> int:
    """The seed of a run; 0 for an encoder that others trained."""
    return 0 if isinstance(model, Foreign) else model.config["seed"]


def measure_all(trained: Sequence[Run | Foreign], train: Images, test: Images, ks: Sequence[int],
                **protocol: Any) -> pd.DataFrame:
    """One row per run, K, probe and feature, as from `evaluate` by its `protocol`, with its arm, seed and crops.

    The objective is `label`'s. An encoder that others trained is of training "foreign"; its crops are not known.
    """
    rows = []
    for run in trained:
        arm = {"objective": label(run), "training": "foreign", "seed": seed(run), "crops": None}
        if isinstance(run, Run):
            arm |= {"training": run.config["training"], "crops": run.metrics["crops"]}
        elif run.untrained:
            arm["training"] = "untrained"
        rows += [{**arm, **row} for row in evaluate(run, train, test, ks, **protocol)]
    return pd.DataFrame(rows)


def over_seeds(measured: pd.DataFrame) -> pd.DataFrame:
    """The tidy table: mean and standard deviation (n - 1) over seeds; low and high are kept for a single seed."""
    table = measured.groupby(COLUMNS[:5], sort=False).agg(
        accuracy_mean=("accuracy", "mean"), accuracy_std=("accuracy", "std"), seeds=("seed", "nunique"),
        crops=("crops", "first"), low=("low", "mean"), high=("high", "mean")).reset_index()  # fmt: skip
    table.loc[table["seeds"] > 1, ["low", "high"]] = float("nan")
    table = table.sort_values(["feature", "probe"], ascending=[True, False], kind="stable")  # linear before knn
    return table[[*COLUMNS, "crops", "low", "high"]]


def value(table: pd.DataFrame, **where: Any) -> float:
    """The mean accuracy of the one row that `where` names, in per cent. Raises KeyError when it is not one row."""
    chosen = _rows(table, **where)
    if len(chosen) != 1:
        raise KeyError(f"{len(chosen)} rows have {where}")
    return float(chosen["accuracy_mean"].iloc[0])


def gains(measured: pd.DataFrame, ks: Sequence[int], images: int) -> pd.DataFrame:
    """Claim C2 as differences in points of accuracy, paired, on the embedding h with the largest bag.

    `measured` as from `measure_all` on `images` test images. With several seeds: mean over seeds of the difference
    and its 95 % t-interval. With one: the paired bootstrap interval over test images, which with several stands beside
    it (images_low, images_high), of the mean over seeds. A difference counts when its interval excludes zero
    (`verdict` above | below, else undecided).
    """
    largest = max(ks)
    pairs = [(("patch-based", largest), ("multi-scale", largest))]
    pairs += [(("patch-based", largest), ("multi-scale", 0))] * (0 in ks)
    pairs += [(("patch-based", largest), ("patch-based", 1))] * (1 in ks and largest > 1)
    pairs += [((training, largest), ("untrained", largest)) for training in ("patch-based", "multi-scale")]
    rows, chosen = [], measured[measured["feature"] == "h"]
    objectives = [name for name in chosen["objective"].unique() if name != "none"]
    for objective, probe, pair in product(objectives, chosen["probe"].unique(), pairs):
        a, b = (_rows(chosen, objective="none" if training == "untrained" else objective, probe=probe,
                      training=training, k=k) for training, k in pair)
        first, second = (f"{training}, {'centre crop' if k == 0 else f'K = {k}'}" for training, k in pair)
        named = {"objective": objective, "probe": probe, "first": first, "second": second}
        rows.append({**named, **difference(a, b, images)})
    return pd.DataFrame(rows)


def _rows(table: pd.DataFrame, **where: Any) -> pd.DataFrame:
    return table[(table[list(where)] == list(where.values())).all(axis=1)]


def difference(a: pd.DataFrame, b: pd.DataFrame, images: int, beyond: Sequence[pd.DataFrame] = ()) -> dict[str, Any]:
    """a - b in points of accuracy, paired by seed: rows of `measure_all`, one per seed, on `images` test images.

    beyond: a pair (c, d), and then it is (a - b) - (c - d), how much more a gains on b than c on d. The interval and
    its verdict are those of `gains`. Raises InputError where they are not all of the same seeds.
    """
    plus, minus = ([rows.set_index("seed").sort_index() for rows in side]
                   for side in ((a, *beyond[1:]), (b, *beyond[:1])))  # fmt: skip
    if odd := [rows for rows in (*plus, *minus) if not rows.index.equals(plus[0].index)]:
        raise InputError(f"seeds {list(plus[0].index)} and {list(odd[0].index)} make no pairs: measure the same of all")
    points = sum(rows["accuracy"] for rows in plus) - sum(rows["accuracy"] for rows in minus)
    better = sum(_right(rows, images) for rows in plus) - sum(_right(rows, images) for rows in minus)  # [images]
    if len(points) > 1 or beyond:
        (found,) = intervals.bootstrap(100 * better[:, None], lambda means: means)
    else:
        found = intervals.paired(better)
    beside = {}
    if len(points) > 1:
        beside = {"images_low": found.low, "images_high": found.high}
        found = intervals.over_seeds(points.to_numpy(float))
    verdict = "above" if found.low > 0 else "below" if found.high < 0 else "undecided"
    return {"points": found.value, "low": found.low, "high": found.high, "seeds": len(points), **beside,
            "verdict": verdict}  # fmt: skip


def _right(rows: pd.DataFrame, images: int) -> np.ndarray:
    """How often each of the test images was right, over the seeds: [images]."""
    return np.mean([unpack_correct(packed, images) for packed in rows["correct"]], axis=0)


def median_difference(pairs: Sequence[tuple[pd.DataFrame, pd.DataFrame]], images: int,
                      seed: int = 0) -> dict[str, float]:
    """The median over pairs (a, b) of a - b, in points, and its 95 % interval.

    a and b as in `difference`. The interval is a bootstrap over the test images, the same for all pairs; the seeds
    of a pair are averaged.
    """
    better = np.stack([_right(a, images) - _right(b, images) for a, b in pairs])  # [pairs, images]
    (found,) = intervals.bootstrap(100 * better.T, lambda means: np.median(means, axis=1), seed)
    return {"points": found.value, "low": found.low, "high": found.high}


def evidence(reading: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """Evidence for claim C2, from `gains`: the largest patch-based bag over the multi-scale centre crop and bag.

    One row per objective, probe and other side, as `claims.write_evidence` takes them; for the centre crop none when
    K = 0 was not measured.
    """
    rows = []
    for row in reading.to_dict("records"):
        kind, bag = row["first"].split(", ")
        other = "centre crop" if row["second"].endswith("centre crop") else "bag"
        if kind == "patch-based" and row["second"].startswith("multi-scale"):
            on = f"{row['seeds']} seed{'s' * (row['seeds'] > 1)}"
            rows.append(evidence_row(row, f"patch-based bag over multi-scale {other}", dataset=dataset,
                                     setting=f"{row['objective']}, {row['probe']}, {bag}, {on}"))  # fmt: skip
    return pd.DataFrame(rows, columns=claims.COLUMNS)


def evidence_row(found: Mapping[str, Any], measure: str, **about: str) -> dict[str, Any]:
    """A row for `claims.write_evidence` of what `difference` or `median_difference` found; about: its other columns."""
    return {**about, "measure": measure, "value": found["points"], "low": found["low"], "high": found["high"],
            "unit": "points"}  # fmt: skip


def sentences(reading: pd.DataFrame) -> str:
    """The differences as a Markdown list, numbers and verdicts as they stand in `reading`."""
    seeds = reading["seeds"].max()
    interval = "95 % t-interval over seeds" if seeds > 1 else "95 % paired bootstrap over test images"
    interval += f", wide because there are only {seeds} of them" if 1 < seeds < 4 else ""
    interval += ", beside it that over test images" if seeds > 1 else ""
    words = {"above": "is better than", "below": "is worse than", "undecided": "cannot be told from"}
    def beside(row: Mapping[str, Any]) -> str:
        return f"; over images {row['images_low']:+.1f} to {row['images_high']:+.1f}" if row["seeds"] > 1 else ""

    lines = [f"- {row['objective']}, {row['probe']} probe: {row['first']} **{words[row['verdict']]}** {row['second']}: "
             f"{row['points']:+.1f} points ({row['low']:+.1f} to {row['high']:+.1f}{beside(row)})"
             for row in reading.to_dict("records")]
    return "\n".join([f"Differences in points of accuracy, with the {interval}:", "", *lines])


def provenance(output: Path, trained: Sequence[Run | Foreign], images: Mapping[str, Images],
               parameters: Mapping[str, Any] | None = None, opened: bool = False) -> pd.DataFrame:
    """What made the results, as a table; the runs are copied to output/runs, as `records.keep` does.

    opened: the notebook looks into the models, so that their weights must be the same to the bit.
    """
    for run in trained:
        if isinstance(run, Foreign):
            run.keep()
        records.keep(run.path, output / "runs" / run.path.name, opened)
    record = runs.provenance()
    rows = {**record["versions"], **record["hardware"], "commit": record["commit"], "changed since": record["dirty"],
            **{f"{name} data": split.fingerprint[:16] for name, split in images.items()},
            **{f"parameter {name}": str(given) for name, given in (parameters or {}).items()},
            "runs": ", ".join(run.path.name + " (weights as fp16)" * run.halved for run in trained),
            "time (UTC)": record["time"]}  # fmt: skip
    if runs.committed():
        for name in ("commit", "changed since", "time (UTC)"):
            del rows[name]
    return pd.Series(rows, name="value").rename_axis("made with").to_frame()


def output_folder(experiment: str) -> Path:
    """Where a notebook writes: $BAGSSL_OUTPUT from the batch; run by hand, results/by-hand/<experiment>."""
    return Path(os.environ.get("BAGSSL_OUTPUT") or results_root() / "by-hand" / experiment)
