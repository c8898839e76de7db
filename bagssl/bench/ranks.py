"""The row of several processes: what the engine between them costs, or what further GPUs bring."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from bagssl import runs
from bagssl.bench.race import Machine, compared
from bagssl.bench.works import of_steps, short_run
from bagssl.config import PretrainConfig
from bagssl.errors import InputError
from bagssl.paths import home


def processes(machine: Machine) -> Iterator[dict]:
    """Crops a second of one training by two processes, over those by one, both as `bagssl pretrain` is; on a CPU with
    the same sum of threads, so that the ratio is what gathering, averaging and waiting leave. On GPUs, one for each.
    """
    count = torch.cuda.device_count() if machine.device.type == "cuda" else 2
    if count < 2:
        return  # what a second process costs on one GPU would say nothing
    for size in machine.size["crops"]:
        config = machine.config(size)
        config = of_steps(machine, config, short_run(machine, config))
        threads = max(1, machine.cores // count)
        works = {f"{n} process{'es' * (n > 1)}": partial(_pretrained, machine, config, n, threads * count // n)
                 for n in (count, 1)}  # fmt: skip
        yield compared(f"training at {size} px, by {count} processes", machine.race(works), "crops/s")


def _pretrained(machine: Machine, config: PretrainConfig, count: int, threads: int) -> tuple[int, float]:
    """A run by so many processes: its crops and seconds after the first row of its history, which warms up."""
    settings = {name: value for name, value in config.to_dict().items() if value != {}}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "BAGSSL_RUNS": folder, "OMP_NUM_THREADS": str(threads), "BAGSSL_COMPILE": "none"}
        command = [sys.executable, "-m", "bagssl.cli", "pretrain", "--processes", str(count), *words]
        done = subprocess.run(command, env=environment, cwd=home(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"training by {count} processes failed: {(done.stderr.splitlines() or [''])[-1]}")
        (run,) = runs.list_runs(Path(folder))
        first, *rows = run.history
    crops = [row["crops"] - before["crops"] for before, row in zip([first, *rows], rows, strict=False)]
    return int(sum(crops)), sum(n / row["crops_per_second"] for n, row in zip(crops, rows, strict=True))
