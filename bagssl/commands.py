"""What each command does; the words that it takes are those of cli.py.

Every command imports what it needs when it runs: `bagssl --help` waits for no torch.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from bagssl.errors import InputError, Stopped
from bagssl.ranks import launched, rank


def assignments(texts: Sequence[str]) -> dict[str, str]:
    """name=value, several of them, to a mapping; the values stay text until their type is known."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"--set {text!r} is not name=value")
        if name in found:
            raise InputError(f"--set {name} is given twice")
        found[name] = value
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first row as header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def reproduce(arguments: argparse.Namespace) -> int:
    from bagssl.batch import reproduce

    if arguments.bare and (arguments.jobs > 1 or arguments.fresh):
        raise InputError("--bare executes one after the other, in this process: leave out --jobs and --fresh")
    if arguments.results:
        from bagssl.paths import runs_root

        os.environ["BAGSSL_RUNS"] = str(runs_root())  # models stay where they are
        os.environ["BAGSSL_RESULTS"] = os.path.abspath(arguments.results)
    if arguments.whole and not (arguments.bare and arguments.time_limit):
        raise InputError("--whole is for a box that is gone afterwards: give --bare and --time-limit with it")
    asked = arguments.experiment, arguments.profile, assignments(arguments.set)
    if arguments.cluster:
        return _submit(arguments, asked)
    if arguments.cluster_options or arguments.dry_run:
        raise InputError("--cluster-options and --dry-run go with --cluster slurm or --cluster local")
    if arguments.bare:
        return reproduce.reproduce_bare(*asked, time_limit=arguments.time_limit, whole=arguments.whole)
    return reproduce.reproduce(*asked, jobs=arguments.jobs, fresh=arguments.fresh, time_limit=arguments.time_limit,
                               replace=arguments.replace)  # fmt: skip


def _submit(arguments: argparse.Namespace, asked: tuple) -> int:
    from bagssl.batch import cluster

    if arguments.bare or arguments.whole or arguments.time_limit:
        raise InputError("--cluster has jobs with limits of their own (timeout_min in --cluster-options): leave out "
                         "--bare, --whole and --time-limit")  # fmt: skip
    plan = cluster.prepare(*asked, arguments.cluster, arguments.cluster_options, dry_run=arguments.dry_run,
                           fresh=arguments.fresh, replace=arguments.replace)  # fmt: skip
    if arguments.dry_run:
        print(table(cluster.table(plan)), "", *plan.notes, sep="\n")
        return 2 if plan.lacks else 0
    return cluster.submit(plan, arguments.jobs)


def list_experiments(arguments: argparse.Namespace) -> None:
    from bagssl.batch import experiments, stages

    rows = [("EXPERIMENT", "PROFILE", "STATE", "COST", "NOTEBOOK", "PAPER")]
    for experiment in experiments.load_experiments().values():
        for profile, details in experiment.profiles.items():
            state = stages.state(stages.plan(experiment, profile, fetch=False))
            rows.append((experiment.name, profile, state, details.cost, experiment.notebook.name, experiment.artefact))
    print(table(rows))


def cost(arguments: argparse.Namespace) -> None:
    from bagssl.batch import cost

    if sys.stderr.isatty():  # it may take minutes
        print(f"counting what {arguments.experiment} takes, cell by cell, without doing it", file=sys.stderr)
    found = cost.cost(arguments.experiment, arguments.profile, assignments(arguments.set), gpus=arguments.gpus,
                      machine=arguments.machine, rate=arguments.rate)
    print(table(cost.table(found, arguments.price)), "", *cost.notes(found, arguments.gpus, arguments.price), sep="\n")


def data_list(arguments: argparse.Namespace) -> None:
    from bagssl.catalogue import status

    columns = ("name", "state", "train", "test", "classes", "size", "source")
    rows = [[str(row[name] if row[name] is not None else "") for name in columns] for row in status()]
    print(table([[name.upper() for name in columns], *rows]))


def data_get(arguments: argparse.Namespace) -> None:
    from bagssl import trees

    print(trees.get(arguments.name))


def data_add(arguments: argparse.Namespace) -> None:
    from bagssl import trees

    print(trees.add(arguments.name, arguments.path, size=arguments.size, force=arguments.force,
                    follow_links=arguments.follow_links, classes=arguments.classes,
                    skip_unreadable=arguments.skip_unreadable))


def data_check(arguments: argparse.Namespace) -> None:
    from bagssl import data

    fingerprints = data.check(arguments.name)
    print(f"{arguments.name}: as it was written", table([*fingerprints.items()]), sep="\n")


def pretrain(arguments: argparse.Namespace) -> int | None:
    from bagssl import data, distributed, online, overview, pretraining, runs, watching
    from bagssl.config import PretrainConfig
    from bagssl.parameters import conform

    types = {field.name: field.type.__name__.replace("Mapping", "dict") for field in fields(PretrainConfig)}
    given: dict[str, Any] = assignments(arguments.set)
    for name in ("dataset", "objective", "training", "seed"):
        if getattr(arguments, name) is not None:
            if name in given:
                raise InputError(f"{name} is given twice: --{name} and --set {name}")
            given[name] = getattr(arguments, name)
    typed = {name: conform(name, value, types[name]) if name in types else value for name, value in given.items()}
    config = PretrainConfig.from_dict(typed)
    watching.loggers(arguments.log_to)
    if arguments.online is not None:
        online.interval(arguments.online)
    if arguments.processes > launched() == 1:
        return distributed.launch(arguments.processes, arguments.words)
    images = data.load(config.dataset, "train")
    key = runs.run_key(config.to_dict(), images.fingerprint)
    before = (arguments.log_to or arguments.online) and any(run.finished for run in overview.matching(key))
    run = pretraining.pretrain(config, images, accumulate=arguments.accumulate, recompute=arguments.recompute,
                               time_limit=arguments.time_limit, log_to=arguments.log_to, online=arguments.online)
    if rank():
        return
    if before:
        print("it was trained before: nothing is left to log; `bagssl report` draws its curve", file=sys.stderr)
    print(os.path.relpath(run.path))


def evaluate(arguments: argparse.Namespace) -> int | None:
    from bagssl import data, distributed, evaluation, foreign, overview, words
    from bagssl.batch.kernels import sigterm_as_ctrl_c
    from bagssl.parameters import conform
    from bagssl.study import sizes

    ks, scales, probes = (conform(f"--{name}", getattr(arguments, name), kind) for name, kind in
                          (("ks", "list[int]"), ("scales", "list[float]"), ("probes", "list[str]")))
    evaluation.check_protocol(ks, probes, ["h"])
    if arguments.csv and os.path.isdir(arguments.csv):
        raise InputError(f"--csv {arguments.csv} is a folder: name a file")
    if arguments.processes > launched() == 1:
        return distributed.launch(arguments.processes, arguments.words)
    encoder = foreign.find(arguments.encoder, **{name: getattr(arguments, name) for name in words.OPTIONS})
    train, test = (sizes.sample(data.load(arguments.dataset, split), f"--{split}-images", count)
                   for split, count in (("train", arguments.train_images), ("test", arguments.test_images)))
    sizes.check_scales("--scales", scales, train)
    sizes.check_probes(train, probes)
    if not rank():
        print(encoder if isinstance(encoder, foreign.Foreign) else encoder.path.name, file=sys.stderr, flush=True)
    top5 = len(train.classes) >= evaluation.TOP5_FROM
    try:
        with sigterm_as_ctrl_c():  # a launcher sends it where one of its processes has ended
            rows = evaluation.over_scales(encoder, train, test, ks, scales, probes=probes, top5=top5)
    except KeyboardInterrupt:
        peer = ", or another process of it has ended" * (launched() > 1)
        raise Stopped(f"interrupted{peer}; the next call goes on after what was measured", interrupted=True) from None
    if rank():
        return
    about = {"encoder": encoder.path.name, "dataset": arguments.dataset, "train_images": len(train),
             "test_images": len(test)}  # fmt: skip
    if arguments.csv:
        overview.write_csv(arguments.csv, [{**about, **row} for row in rows])
    print(f"{about['encoder']}, kept in {os.path.relpath(encoder.path)}", file=sys.stderr)
    names = ("SHOWN", "K", "PROBE", "ACCURACY", "FROM", "TO", *["TOP-5"] * top5, "GAIN", "FROM", "TO")
    print(table([names, *map(overview.measured, rows)]))


def runs_list(arguments: argparse.Namespace) -> None:
    from bagssl.overview import rows

    print(table([("RUN", "STATE", "CROPS", "SECONDS", "MACHINE", "WEIGHTS", "ACCURACY"), *rows()]))


def runs_show(arguments: argparse.Namespace) -> None:
    from bagssl import details, overview

    print(details.show(overview.find(arguments.name)))


def runs_compare(arguments: argparse.Namespace) -> None:
    from bagssl import details, overview

    if arguments.csv and os.path.isdir(arguments.csv):
        raise InputError(f"--csv {arguments.csv} is a folder: name a file")
    chosen = [overview.find(name) for name in arguments.name]
    rows = details.compare(chosen)
    if arguments.csv:
        details.write_csv(arguments.csv, chosen, rows)
    shown = details.side_by_side(chosen, rows)
    print(*(f"{letter} = {run.path.name}" for letter, run in zip(shown[0][2:], chosen, strict=True)), sep="\n")
    print("", table(shown), sep="\n")
    if not any(row[0] == "accuracy" for row in rows):
        print("\nNo accuracy was measured by the same protocol on two of them.")


def runs_remove(arguments: argparse.Namespace) -> int:
    from bagssl import details, tending

    if arguments.yes and arguments.dry_run:
        raise InputError("--yes removes, --dry-run does not: give one of them")
    chosen, held = tending.candidates(tending.choose(arguments.name, arguments.older_than, arguments.unfinished))
    if held and arguments.name:
        raise InputError(f"{held[0].path} is held by another process: nothing was removed")
    for run in held:
        print(f"{run.path.name} is held by another process: it is left", file=sys.stderr)
    if not chosen:
        print("There is nothing to remove.")
        return 0
    print(table([("RUN", "STATE", "WRITTEN", "BYTES"), *map(tending.row, chosen)]))
    if not arguments.yes:
        count = sum(map(details.size, chosen))
        print(f"Runs {len(chosen)}, {count:,} bytes: nothing is removed yet; --yes removes them.")
        return 0
    freed, code = [], 0
    for run in chosen:
        try:
            freed.append(tending.remove(run))
        except Stopped as stop:  # another process has begun to train it meanwhile
            print(f"bagssl: {stop}", file=sys.stderr)
            code = 1
    print(f"Runs removed {len(freed)}, {sum(freed):,} bytes.")
    return code


def runs_watch(arguments: argparse.Namespace) -> None:
    from bagssl import tending

    for line in tending.watch(arguments.name, arguments.once):
        print(line, flush=True)


def runs_export(arguments: argparse.Namespace) -> None:
    from bagssl.overview import choose
    from bagssl.packing import export

    for path in export(choose(arguments.name), arguments.folder, arguments.part, arguments.weights,
                       new=arguments.new):  # fmt: skip
        print(os.path.relpath(path))


def runs_import(arguments: argparse.Namespace) -> None:
    from bagssl.packing import unpack

    print(*unpack(arguments.file), sep="\n")


def runs_push(arguments: argparse.Namespace) -> None:
    from bagssl.hub import push

    print(push(arguments.name, arguments.repo, private=arguments.private, folder=arguments.dry_run))


def runs_pull(arguments: argparse.Namespace) -> None:
    from bagssl.hub import pull

    print(os.path.relpath(pull(arguments.repo, arguments.revision).path))


def notebooks(arguments: argparse.Namespace) -> int:
    from bagssl.batch.reproduce import refresh_notebooks

    return refresh_notebooks(arguments.notebook)


def report(arguments: argparse.Namespace) -> None:
    from bagssl.batch.report import write_report

    print(os.path.relpath(write_report()))
    if arguments.readme:
        from bagssl.batch.cited import TEXTS, refresh
        from bagssl.paths import home

        for text in TEXTS:
            for line in refresh(home() / text):
                print(line)


def figures(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from bagssl.batch.experiments import choose, load_experiments
    from bagssl.paths import results_root
    from bagssl.study.prints import copies

    (experiment,) = choose(load_experiments(), [arguments.experiment], arguments.profile)
    record = results_root() / arguments.profile / experiment.name
    for path in copies(record, Path(arguments.to), arguments.format, arguments.width):
        print(os.path.relpath(path))


def docs(arguments: argparse.Namespace) -> None:
    from bagssl.batch.docs import write_docs

    print(os.path.relpath(write_docs(arguments.to)))


def verify(arguments: argparse.Namespace) -> int:
    from bagssl.batch.verify import verify

    found = verify(arguments.folder)
    for line in found.lines:
        if line.startswith("OFF") or not arguments.quiet:
            print(line)
    sys.stdout.flush()  # before what is said last
    if faults := found.faults:
        print(f"bagssl: {len(faults)} of {len(found.lines)} artefacts are off, first {faults[0]}", file=sys.stderr)
        return 1
    print(f"{len(found.lines)} artefacts, all as they were recorded")
    return 0


def bench(arguments: argparse.Namespace) -> None:
    from bagssl.bench import bench

    path = bench(arguments.row, arguments.dataset, arguments.quick, time_limit=arguments.time_limit)
    print("quick sizes: nothing kept" if arguments.quick else os.path.relpath(path))
