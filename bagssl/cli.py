"""The command line. Exit codes: 0 done, 1 failed, 2 wrong input, 3 stopped by a time limit, 130 by Ctrl-C, SIGTERM."""

import argparse
import codecs
import errno
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from bagssl import __version__
from bagssl.commands import (
    bench,
    cost,
    data_add,
    data_check,
    data_get,
    data_list,
    docs,
    evaluate,
    figures,
    list_experiments,
    notebooks,
    pretrain,
    report,
    reproduce,
    runs_compare,
    runs_export,
    runs_import,
    runs_list,
    runs_pull,
    runs_push,
    runs_remove,
    runs_show,
    runs_watch,
    verify,
)
from bagssl.errors import Diverged, InputError, Lost, Stopped, shortage
from bagssl.ranks import launched

# What a disk refuses, does not know, or no longer answers; any other OSError is a bug.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR,
         errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.EILSEQ, errno.ELOOP, errno.EMLINK,
         errno.EXDEV, errno.EBUSY, errno.ETXTBSY, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP,
         errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def duration(text: str) -> float:
    """Seconds: 90, 90s, 9m, 1h30m."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    numbers = match.groups(default="0") if match else ("0", "0", "0")
    seconds = sum(float(number) * unit for number, unit in zip(numbers, (3600, 60, 1), strict=True))
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write 90s, 9m or 1h30m")
    return seconds


def age(text: str) -> float:
    """Seconds: 30d, 2w, or as `duration`."""
    if match := re.fullmatch(r"([1-9]\d*)([dw])", text.strip()):
        return int(match[1]) * {"d": 1, "w": 7}[match[2]] * 86_400.0
    try:
        return duration(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no age; write 30d, 2w, 12h or 90m") from None


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def number(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def amount(text: str) -> float:
    """A decimal number above 0."""
    if not re.fullmatch(r"\d+(\.\d+)?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(text)


def size(text: str) -> int:
    """Bytes: 15MiB, 16MB, 500KiB, 1GiB, or a number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMG])(i?)B)?", text.strip())
    if not match or not (count := float(match[1]) * (1024 if match[3] else 1000) ** "_KMG".index(match[2] or "_")) >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 15MiB, 16MB or a number of bytes")
    return int(count)


def build_parser() -> argparse.ArgumentParser:
    text = "Regenerates the tables and figures of arXiv 2206.08954."
    codes = "Exit codes: 0 done, 1 failed, 2 wrong input, 3 stopped by the time limit, 130 by Ctrl-C or SIGTERM."
    parser = _Parser(prog="bagssl", description=text, epilog=codes, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"bagssl {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)

    def command(name: str, run, text: str, group=commands) -> argparse.ArgumentParser:
        options = group.add_parser(name, help=text, description=text, allow_abbrev=False)
        options.set_defaults(run=run)
        return options

    options = command("reproduce", reproduce, "Execute notebooks into results/; what is fresh is kept.")
    options.add_argument("experiment", nargs="*", help="names from `bagssl list`; none: all with the profile")
    options.add_argument("--profile", default="smoke", help="smoke (default), laptop or paper")
    options.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                         help="override a parameter of the notebooks (in the cell of parameters of each)")  # fmt: skip
    options.add_argument("--results", metavar="FOLDER", help="write there; models stay in the store (results/)")
    options.add_argument("--replace", action="store_true",
                         help="let --set take the place of a record with other parameters")
    options.add_argument("--jobs", type=positive, default=1, metavar="N", help="notebooks side by side")
    options.add_argument("--fresh", action="store_true", help="execute even what is fresh")
    options.add_argument("--time-limit", type=duration, metavar="TIME", help="stop after 90s, 9m, 1h30m")
    options.add_argument("--bare", action="store_true",
                         help="without Jupyter, in this process: for a box that only trains and measures models")
    options.add_argument("--whole", action="store_true",
                         help="begin no model or measurement that cannot end in the time limit, the most wanted first")
    options.add_argument("--cluster", metavar="KIND", help="slurm or local: a job for each model, then one for each "
                         "notebook, by submitit; local: --jobs N side by side, or one on each GPU")  # fmt: skip
    options.add_argument("--cluster-options", metavar="FILE", help="YAML: submitit's parameters, such as timeout_min")
    options.add_argument("--dry-run", action="store_true", help="say what --cluster would submit, and what is missing")

    command("list", list_experiments, "Show experiments: paper artefact, notebook, cost per profile, state.")
    options = command("cost", cost, "Show what an experiment will take, before anything is trained: images, crops, "
                      "FLOPs, hours, disk, memory, money; by rates that `bagssl bench` measured.")  # fmt: skip
    options.add_argument("experiment", help="a name from `bagssl list`")
    options.add_argument("--profile", default="smoke", help="smoke (default), laptop or paper")
    options.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override a parameter")
    options.add_argument("--gpus", type=positive, metavar="N", help="on so many GPUs; by default on this machine")
    options.add_argument("--machine", metavar="NAME", help="whose rates: a file of results/bench, nvidia-h200")
    options.add_argument("--rate", type=amount, metavar="CROPS_PER_SECOND", help="of training, where you know it")
    options.add_argument("--price", type=amount, metavar="EUR", help="of an hour of a GPU, or of the machine")

    options = command("report", report, "Write the ledger of claims and results/index.html, the page of all results.")
    options.add_argument("--readme", action="store_true", help="what README.md and results/README.md cite as well")

    options = command("figures", figures, "Copy the figures of an experiment for print, from its record.")
    options.add_argument("experiment", help="a name from `bagssl list`")
    options.add_argument("--profile", default="laptop", help="smoke, laptop (default) or paper")
    options.add_argument("--format", default="pdf", help="pdf (default), fonts embedded, or png, 200 dpi")
    options.add_argument("--width", default="double", help="double (default), 7 inches, or single, 3.5; png: double")
    options.add_argument("--to", metavar="FOLDER", default="figures", help="where to (default: ./figures)")

    options = command("docs", docs, "Write the pages of the code and the notebooks, build/docs/index.html.")
    options.add_argument("--to", metavar="FOLDER", help="another folder")

    options = command("verify", verify, "Check a record from what it holds alone, without training: hashes, models, "
                      "tables against evaluations and notebook, verdicts, what texts cite. A line for each artefact; "
                      "code 1 and the first that is off, or 0.")  # fmt: skip
    options.add_argument("folder", help="results, results/PROFILE or results/PROFILE/EXPERIMENT")
    options.add_argument("--quiet", action="store_true", help="a line for what is off alone")

    options = command("data", None, "List, fetch, add and check datasets.")
    actions = options.add_subparsers(title="commands", metavar="COMMAND", dest="action", required=True)
    command("list", data_list, "Show the datasets, and which are here.", actions)
    command("get", data_get, "Download cifar10 or cifar100.", actions).add_argument("name")
    options = command("add", data_add, "Read train/CLASS/*.png and test/CLASS/*.png, or arrays, to the cache.", actions)
    options.add_argument("name")
    options.add_argument("path", help="the folder that holds train/ and test/; an .npz file; CIFAR's published archive")
    options.add_argument("--size", type=positive, help="resize to this side in pixels")
    options.add_argument("--classes", metavar="FILE", help="only the classes that this text names, one a line")
    options.add_argument("--skip-unreadable", action="store_true", help="leave out, and count, what cannot be read")
    options.add_argument("--follow-links", action="store_true", help="also those that lead out of the folder")
    options.add_argument("--force", action="store_true", help="replace a dataset of this name")
    command("check", data_check, "Recompute the SHA-256 of a cached dataset.", actions).add_argument("name")

    options = command("pretrain", pretrain, "Train one encoder, or find it trained; prints its folder.")
    options.add_argument("--dataset", help="a name from `bagssl data list`")
    options.add_argument("--objective", help="tcr, simclr, or another of bagssl/objectives.py")
    options.add_argument("--training", help="patch-based or multi-scale")
    options.add_argument("--seed", help="a whole number")
    options.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting")
    options.add_argument("--processes", type=positive, default=1, metavar="N",
                         help="train by so many processes of this machine, of several GPUs one on each; or on several "
                         "machines, `torchrun … -m bagssl.cli pretrain`")  # fmt: skip
    options.add_argument("--recompute", action="store_true",
                         help="save memory: compute the activations of residual blocks again when they are needed")
    options.add_argument("--accumulate", action="store_true",
                         help="save more: go through a batch in its parts; needs --set norm_groups=N of them")
    options.add_argument("--log-to", action="append", metavar="NAME",
                         help="where the curves go as well, while it trains: tensorboard, trackio, wandb; csv is the "
                         "run's own history.csv, always written")  # fmt: skip
    options.add_argument("--online", metavar="PROBE",
                         help="measure the encoder on its way, on training images: knn, or knn:EVERY, every so many "
                         "crops; into the run's online.csv and to the loggers")  # fmt: skip
    options.add_argument("--time-limit", type=duration, metavar="TIME", help="stop after 90s, 9m, 1h30m")

    options = command("evaluate", evaluate, "Measure any encoder: the centre crop against bags of patches. ENCODER is "
                      "torchvision:NAME[@WEIGHTS], timm:NAME, a file of weights with --arch, or a run's key, name or "
                      "folder; what was measured is kept, and not measured again.")  # fmt: skip
    options.add_argument("encoder", help="one word; options may follow after commas, FILE.pth,arch=nets:make,size=32")
    options.add_argument("--dataset", required=True, help="a name from `bagssl data list`")
    options.add_argument("--ks", default="0,1,16,64", help="patches in a bag; 0 is the centre crop (0,1,16,64)")
    options.add_argument("--scales", default="0.2,0.4", help="of patches, shares of the image's area (0.2,0.4)")
    options.add_argument("--probes", default="knn,linear", help="knn, linear or both (knn,linear)")
    options.add_argument("--arch", help="of a file: torchvision:NAME, timm:NAME, bagssl:NAME, or MODULE:FUNCTION, code "
                         "of your own that is imported from this folder")  # fmt: skip
    options.add_argument("--width", help="of bagssl:NAME (64)")
    options.add_argument("--normalise", help="what it takes: imagenet, cifar10, cifar100, half, none, or three means "
                         "and three deviations, 0.5/0.5/0.5/0.2/0.2/0.2")  # fmt: skip
    options.add_argument("--size", help="side in pixels at which patches are shown to it, or native: each at its own")
    options.add_argument("--pool", help="features, as the network does itself (default); mean, cls: of tokens")
    options.add_argument("--crop", help="share of the image's side in the centre crop (as the makers of the weights)")
    options.add_argument("--train-images", type=number, default=0, metavar="N", help="drawn at random; 0: all")
    options.add_argument("--test-images", type=number, default=0, metavar="N", help="drawn at random; 0: all")
    options.add_argument("--csv", metavar="FILE", help="write the table there as well")
    options.add_argument("--processes", type=positive, default=1, metavar="N",
                         help="embed by so many processes of this machine, or by torchrun, as in pretrain")

    options = command("runs", None, "List, show, compare, watch and remove trained models, and carry them from one "
                      "machine to another.")  # fmt: skip
    actions = options.add_subparsers(title="commands", metavar="COMMAND", dest="action", required=True)
    command("list", runs_list, "Show what is trained: where, for how long, how accurate.", actions)
    options = command("show", runs_show, "Show one run: settings, loss, accuracies, where it lies.", actions)
    options.add_argument("name", help="the run's folder, name or key, or how the last two begin")
    options = command("compare", runs_compare, "Show what differs between runs: settings, final terms, speed, and "
                      "accuracies by the same protocol.", actions)  # fmt: skip
    options.add_argument("name", nargs="+", help="two runs or more, as in show")
    options.add_argument("--csv", metavar="FILE", help="write the table there as well, with the names of the runs")
    options = command("watch", runs_watch, "Say of each run in training how far it was at its last checkpoint, one a "
                      "minute: where its page was reloaded, or from another terminal.", actions)  # fmt: skip
    options.add_argument("name", nargs="?", help="one run of the store, until it is no longer in training")
    options.add_argument("--once", action="store_true", help="say it once; else until Ctrl-C")
    options = command("remove", runs_remove, "Remove runs from the store, never from a record nor one that is in "
                      "training. Without --yes it only shows which, and their bytes. Several choices: runs that "
                      "all of them choose.", actions)  # fmt: skip
    options.add_argument("name", nargs="*", help="names or keys, or how they begin")
    options.add_argument("--older-than", type=age, metavar="AGE", help="last written before 30d, 2w, 12h")
    options.add_argument("--unfinished", action="store_true", help="not trained to their end, by nobody now")
    options.add_argument("--dry-run", action="store_true", help="show what would be removed (without --yes as well)")
    options.add_argument("--yes", action="store_true", help="remove")
    options = command("export", runs_export, "Pack finished runs and their evaluations into files.", actions)
    options.add_argument("folder", help="where to write the files")
    options.add_argument("name", nargs="*", help="names or keys, or how they begin; none: all that are finished")
    options.add_argument("--part", type=size, default="15MiB", metavar="SIZE", help="of a file at most (15MiB)")
    options.add_argument("--weights", default="fp16", metavar="KIND",
                         help="fp16 (default), fp32 or none: tables need none")
    options.add_argument("--new", action="store_true", help="only what no pack in the folder holds")
    options = command("import", runs_import, "Bring exported runs into the store, whole or not at all.", actions)
    options.add_argument("file", nargs="+", help="all the files, or the folder that holds them")
    options = command("push", runs_push, "Publish a finished run on the Hugging Face hub, with its card.", actions)
    options.add_argument("name", help="the run's name or key, or how it begins")
    options.add_argument("repo", help="OWNER/NAME; made where it is not there")
    options.add_argument("--private", action="store_true", help="make the repository private")
    options.add_argument("--dry-run", metavar="FOLDER", help="write there what would be published, and nothing else")
    options = command("pull", runs_pull, "Bring a run from the hub into the store.", actions)
    options.add_argument("repo", help="OWNER/NAME, as it was pushed")
    options.add_argument("--revision", metavar="REV", help="a branch, tag or commit of it")

    options = command("bench", bench, "Measure speed as ratios, side by side, into results/bench/.")
    options.add_argument("row", nargs="*", help="some of the measurements; none: all, in about half an hour")
    options.add_argument("--dataset", help="real images to use; by default cifar10 where it is at hand")
    options.add_argument("--quick", action="store_true", help="show that everything runs; nothing is kept")
    options.add_argument("--time-limit", type=duration, metavar="TIME",
                         help="begin no row after 9m; the next call goes on")

    options = command("notebooks", notebooks, "Execute notebooks/ with their defaults, in place.")
    options.add_argument("notebook", nargs="*", help="file names; none means all")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. What is no error of the user's, and not foreseen, is raised: a bug."""
    codecs.register_error("bagssl", _shown)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="bagssl")
    try:
        words = sys.argv[1:] if argv is None else argv
        arguments = build_parser().parse_args(words, argparse.Namespace(words=words))
        if launched() > 1 and arguments.run not in (pretrain, evaluate):
            raise InputError(f"{arguments.command} is work for one process: only pretrain and evaluate are for several")
        code = arguments.run(arguments) or 0
        sys.stdout.flush()  # here, where a closed pipe can still be caught
        return code
    except InputError as error:
        return _say(f"{error}", 2)
    except Stopped as error:
        return _say(f"{error}", 130 if error.interrupted else 3)
    except (Diverged, Lost) as error:
        return _say(f"{error}", 1)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if lacking := shortage(type(error).__name__, str(error)):
            return _say(lacking, 1)
        if not isinstance(error, OSError) or error.errno not in _DISK:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"{where}{error.strerror}; make room or let it be written, or set BAGSSL_DATA, "
                    "BAGSSL_RESULTS or BAGSSL_RUNS to another folder", 1)


def _shown(error: UnicodeError) -> tuple[str | bytes, int]:
    """A path that is no UTF-8 is printed as it is; what the terminal's encoding does not have is a question mark."""
    codes = map(ord, error.object[error.start : error.end])
    return b"".join(bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else b"?" for code in codes), error.end


def _say(message: str, code: int) -> int:
    if launched() > 1:  # one of several processes that end alike
        from bagssl.distributed import speaks
        if not speaks():
            return code
    print(f"bagssl: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    code = main()
    if launched() > 1:
        from bagssl.distributed import leave
        leave(code)
    sys.exit(code)
