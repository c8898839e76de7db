"""What an experiment trains, embeds and probes, without any of it being done: its own cells say so.

The cells of the notebook are executed on a store that shows the finished runs as they are. There the loop of training,
the networks, the passes over patches and the probes are stand-ins, which note what they are asked for and answer with
nonsense. All else is the real thing: parameters, data, configurations, keys, what the store holds and what `evaluate`
remembers. So no second list of models can go stale; and what a cell works out from the nonsense goes to a folder that
is removed. Where a cell cannot go on with it, the count ends there, and says so. A choice that hangs on a result, such
as the best scale, is made by the nonsense: of what is embedded after it only the amount is sure, and what is remembered
from before may differ.
"""

import contextlib
import copy
import importlib
import io
import os
import pkgutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bagssl import bags, catalogue, data, evaluation, patches, pretraining, probes, records, runs, study
from bagssl.batch.notebook import error_line, failing_cell, run_cells
from bagssl.config import PretrainConfig
from bagssl.data import Images
from bagssl.data import load as _load
from bagssl.errors import InputError
from bagssl.foreign import Foreign
from bagssl.intervals import Estimate
from bagssl.paths import runs_root
from bagssl.runs import Run

PATIENCE = 60.0  # seconds in which nothing more is asked for: what follows is arithmetic with nonsense
# What is counted though it is not here, as it is published and imported: the side in px, classes, images.
PUBLISHED = {"imagenet": (256, 1000, {"train": 1_281_167, "test": 50_000})}
COUNTED = 2  # crops that FLOPs are counted on: batch-norm wants more than one


@dataclass
class Work:
    """Work of one kind on one model. A crop is a patch, or the whole image as one; FLOPs count both of a multiply-add.

    read: bytes of pixels that are given to the device. size: px, at which the encoder sees a crop.
    """

    model: str
    kind: str  # training, embedding, or the name of a probe
    images: int = 0
    crops: int = 0
    flops: float = 0.0
    read: int = 0
    encoder: str = ""
    size: int = 0
    largest: int = 0  # crops of the largest pass
    fits: list[tuple[int, int, int]] = field(default_factory=list)  # of a probe: training images, test images, dim
    config: PretrainConfig | None = None  # of a training
    resident: int = 0  # bytes of pixels that lie on the device during it
    fingerprint: str = ""  # of the images that are trained on
    count: int = 0  # of these images


@dataclass
class Rehearsal:
    """What was noted: works, in the order in which they come; the models and measurements that the store holds."""

    works: dict[tuple, Work] = field(default_factory=dict)
    models: set[str] = field(default_factory=set)
    evaluations: set[Path] = field(default_factory=set)
    ended: str = ""  # where and why a cell could not go on: all counts are then "at least"

    def work(self, model: str, kind: str, encoder: str = "", size: int = 0) -> Work:
        """The work of that kind on that model: new, or what there is of it."""
        if hasattr(signal, "SIGALRM") and signal.getsignal(signal.SIGALRM) is _enough:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        return self.works.setdefault((model, kind, size), Work(model, kind, encoder=encoder, size=size))


def rehearse(notebook: Path, parameters: Mapping[str, Any]) -> Rehearsal:
    """What the cells of a notebook would do now, with these parameters in the place of its own.

    A dataset of `PUBLISHED` need not be here. Raises InputError for what they refuse before any work, or fail by.
    """
    noted = Rehearsal()
    with tempfile.TemporaryDirectory(prefix="bagssl-") as folder, contextlib.ExitStack() as stack:
        store = Path(folder, "runs")
        _mirror([runs_root(), *records.roots()], store)
        usual = {"BAGSSL_RUNS": str(store), "BAGSSL_RECORD": "", "BAGSSL_OUTPUT": str(Path(folder, "output")),
                 "BAGSSL_DEADLINE": "", "BAGSSL_WHOLE": "", "BAGSSL_PACE": ""}  # fmt: skip
        stack.enter_context(mock.patch.dict(os.environ, usual))
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # of figures of nonsense
        stack.enter_context(_patience())
        _stand_in(noted, stack)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                run_cells(notebook, parameters)
        except InputError as error:
            if not noted.works:
                raise
            noted.ended = _place(error, notebook)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - what a cell makes of nonsense may be anything
            noted.ended = _place(error, notebook)
            if not noted.works and not isinstance(error, Enough):  # there was no nonsense yet
                raise InputError(f"what it takes cannot be counted: {noted.ended}") from None
    return noted


class Enough(Exception):
    """Nothing more was asked for in a while."""


def _enough(*_: Any) -> None:
    raise Enough(f"nothing more was asked of a network in {PATIENCE:g} s")


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Within it `Enough` is raised so long after the last note; but only in the main thread, which has signals."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, _enough)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _place(error: BaseException, notebook: Path) -> str:
    cell = failing_cell(error, notebook) or notebook.name
    return f"{cell}: {error_line({'ename': type(error).__name__, 'evalue': error})}"


def _mirror(stores: Sequence[Path], target: Path) -> None:
    """The runs of stores, and what was measured, as links: what is written there takes the place of a link.

    What the first has finished is taken from there alone.
    """
    target.mkdir()
    for folder in (folder for store in stores for folder in store.glob("*/")):
        if (target / folder.name / runs.MARK).exists():
            continue
        for path in folder.glob("**/*"):
            place = target / path.relative_to(folder.parent)
            hidden = any(part.startswith(".") for part in place.relative_to(target).parts)
            if path.is_file() and not hidden and not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(path)


# ---- the stand-ins


class Silent(nn.Module):
    """A network on the meta device, which has shapes and no numbers: crops [n, 3, s, s] -> [n, dim], at random."""

    def __init__(self, network: nn.Module, model: str, encoder: str, note: Callable[..., Tensor]):
        super().__init__()
        self.network, self.model, self.encoder, self.note = network.to("meta"), model, encoder, note
        if hasattr(network, "dim"):
            self.dim = network.dim

    def to(self, *where: Any, **how: Any) -> "Silent":
        return self

    def forward(self, crops: Tensor) -> Tensor:
        return self.note(self, crops)


def _published(name: str, split: str, root: Path | None = None) -> Images:
    """The split of a dataset as it is published, all of it black; from here, if it is here."""
    if name not in PUBLISHED or catalogue.available(name):
        return _load(name, split, root)
    side, classes, counts = PUBLISHED[name]
    black = torch.zeros(1, dtype=torch.uint8).expand(counts[split], 3, side, side)
    pixels = data.Shards([counts[split]], [side, side], lambda _: black)
    labels = torch.arange(counts[split]) % classes
    return Images(pixels, labels, tuple(f"class {i}" for i in range(classes)), f"{name}, {split}, as published")


def _stand_in(noted: Rehearsal, stack: contextlib.ExitStack) -> None:
    """Put the stand-ins, which write into `noted`, in their places until the stack is left."""
    for module in pkgutil.iter_modules(study.__path__):  # or one that is imported later would keep them
        importlib.import_module(f"{study.__name__}.{module.name}")
    passes = _Passes(noted)
    claimed, kept = pretraining._claimed, evaluation._kept

    @contextlib.contextmanager
    def found(*asked: Any) -> Iterator[tuple[str, bool]]:
        with claimed(*asked) as (path, left):
            if Path(path, runs.MARK).is_symlink():
                noted.models.add(Path(path).name)
            yield path, left

    def known(path: Path) -> list[dict[str, Any]] | None:
        rows = kept(path)
        if rows is not None and path.is_symlink():
            noted.evaluations.add(path)
        return rows

    def train(learner: Any, images: Images, run: Run, *_: Any, along: Sequence[float] = (), **__: Any) -> None:
        _train(noted, learner.config, images, run)
        for shorter in (replace(learner.config, until=epochs) for epochs in along):
            left = runs.open_run(shorter.to_dict(), images.fingerprint, shorter.label, run.path.parent)
            if not left.finished:
                _finish(shorter, images, left)

    def probe(name: str, features: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, *, device: str):
        noted.work(passes.last, name).fits.append((len(labels), len(test_labels), features.shape[1]))
        return _answer(test_labels)

    def fit_linear(features: Tensor, labels: Tensor, *_: Any, **__: Any) -> probes.Classifier:
        noted.work(passes.last, "linear").fits.append((len(labels), 0, features.shape[1]))
        classes, dim = labels.unique(), features.shape[1]
        weights = torch.randn(len(classes), dim, dtype=torch.float64)
        return probes.Classifier(weights, weights[:, 0], classes, torch.zeros(dim, dtype=torch.float64), {})

    def learner(config: PretrainConfig, *_: Any) -> SimpleNamespace:
        return SimpleNamespace(config=config)

    places = [(data, "load", _published), (pretraining, "Learner", learner), (pretraining, "train", train),
              (pretraining, "_claimed", found), (pretraining, "_load", passes.load), (evaluation, "_kept", known),
              (evaluation, "_probe", probe), (evaluation, "_recent", {})]  # fmt: skip
    for module, name, stand_in in places:
        stack.enter_context(mock.patch.object(module, name, stand_in))
    for original, stand_in in ((evaluation.load_network, passes.load_network), (bags.embed_bags, passes.embed_bags),
                               (bags.patch_embeddings, passes.patch_embeddings), (probes.fit_linear, fit_linear)):
        for module in [each for name, each in sys.modules.items() if name.startswith("bagssl")]:
            for name in [name for name, value in vars(module).items() if value is original]:
                stack.enter_context(mock.patch.object(module, name, stand_in))


def _train(noted: Rehearsal, config: PretrainConfig, images: Images, run: Run) -> None:
    """Note the steps that are left, and leave a finished run of nonsense."""
    state = runs.load_checkpoint(run, torch.device("cpu"), ["step"])
    steps, begun = config.steps(len(images)), state["step"] if state else 0
    left, picture = steps - begun, images.pixels.shape[1:].numel()
    work = noted.work(run.path.name, "training", config.encoder, config.size)
    work.images += left * config.batch_size
    work.crops += left * config.crops_per_step
    work.flops += left * config.crops_per_step * trained_flops(config) if left else 0
    work.read += left * config.batch_size * picture
    work.config, work.resident = config, len(images) * picture * isinstance(images.pixels, Tensor)
    work.fingerprint, work.count = images.fingerprint, len(images)
    _finish(config, images, run)


def _finish(config: PretrainConfig, images: Images, run: Run) -> None:
    steps, epochs = config.steps(len(images)), config.until or config.epochs
    crops = steps * config.crops_per_step
    row = {"step": steps, "epoch": epochs, "crops": crops, "learning_rate": 0.0, "crops_per_second": 1.0}
    last = {"loss": 1.0, "spread": 1.0}
    metrics = {"steps": steps, "epochs": epochs, "crops": crops, "images": len(images), "seconds": 1.0,
               "final": last}  # fmt: skip
    record = {**runs.provenance(), "device": "none", "precision": "none", "seed": config.seed,
              "data": images.fingerprint, "wall_seconds": 1.0}  # fmt: skip
    own = {"stand-in": torch.tensor(list(run.key.encode()))}  # no other run's: bags are remembered by their hash
    runs.finish(run, own, [{**row, **last}] if steps else [], metrics, record)


def _answer(labels: Tensor) -> probes.Accuracy:
    right = torch.arange(len(labels)) % 2 == 0
    return probes.Accuracy(50.0, 49.0, 51.0, right, labels.cpu(), Estimate(50.0, 49.0, 51.0), {})


class _Passes:
    """The networks, and the passes of crops through them."""

    def __init__(self, noted: Rehearsal):
        self.noted, self.last, self.flops = noted, "", {}

    def load(self, run: Run, network: str, build: Callable[[PretrainConfig], nn.Module]) -> Silent:
        config = PretrainConfig.from_dict(run.config)
        return Silent(build(config), run.path.name, config.encoder * (network == "encoder"), self.through).eval()

    def load_network(self, model: Run | Foreign, device: Any = "cpu") -> Silent:
        if isinstance(model, Run):
            return pretraining.load_encoder(model)
        return Silent(copy.deepcopy(model.network), model.path.name, model.name, self.through).eval()

    def through(self, network: Silent, crops: Tensor) -> Tensor:
        """Crops that a cell shows to the network itself."""
        if not network.encoder:  # a projector, on what is there
            return torch.randn(len(crops), *_output(network.network, crops)[0])
        return torch.randn(len(crops), self.note(network, crops.shape[-1], len(crops), 0, 0))

    def note(self, network: nn.Module, size: int, crops: int, images: int, read: int) -> int:
        """Note a pass of crops [3, size, size]; the dimensions of what comes out."""
        parts = [each for each in network.modules() if isinstance(each, Silent)] or [network]
        dim, flops = 0, 0.0
        shape = torch.empty(COUNTED, 3, size, size, device="meta")
        for part in parts:  # an encoder, and its projector
            inner = part.network if isinstance(part, Silent) else part
            if (key := (getattr(part, "model", id(inner)), type(inner), size)) not in self.flops:
                self.flops[key] = _output(inner, shape)
            (width,), each = self.flops[key]
            dim, flops, shape = dim + width, flops + each, torch.empty(COUNTED, width, device="meta")
        name, encoder = getattr(parts[0], "model", type(network).__name__), getattr(parts[0], "encoder", "")
        work = self.noted.work(name, "embedding", encoder, size)
        self.last, work.largest = name, max(work.largest, crops)
        work.crops, work.flops, work.images, work.read = (
            before + more for before, more in zip((work.crops, work.flops, work.images, work.read),
                                                  (crops, crops * flops, images, read), strict=True))
        return dim

    def embed_bags(self, encoder: nn.Module, pixels: Any, ks: list[int], *, scale: float, size: int | None,
                   crop: float = 1.0, **_: Any) -> dict[int, Tensor]:  # fmt: skip
        count, (height, width), read = len(pixels), pixels.shape[-2:], pixels.shape.numel()
        whole = size or max(1, round(crop * min(height, width)))
        side, most = size or patches.native_size(scale, height, width), max(ks)
        if 0 in ks:
            dim = self.note(encoder, whole, count, 0 if most else count, 0 if most else read)
        if most:
            dim = self.note(encoder, side, count * most, count, read)
        if isinstance(encoder, evaluation._Features):  # which gives them to no one but a probe
            return {k: torch.empty(count, dim, device="meta") for k in ks}
        return {k: torch.randn(count, dim) for k in ks}

    def patch_embeddings(self, encoder: nn.Module, pixels: Any, boxes: Tensor, size: int, **_: Any) -> Tensor:
        crops = boxes.shape[0] * boxes.shape[1]
        return torch.randn(*boxes.shape[:2], self.note(encoder, size, crops, len(pixels), pixels.shape.numel()))


# ---- FLOPs: a multiplication and an addition are two


def _output(network: nn.Module, given: Tensor) -> tuple[tuple[int, ...], float]:
    """The shape of what a network on the meta device makes of one of `given`, and its FLOPs."""
    given = given[:1].expand(COUNTED, *given.shape[1:]).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made = network(given)
    return tuple(made.shape[1:]), counter.get_total_flops() / COUNTED


def trained_flops(config: PretrainConfig) -> float:
    """FLOPs of a trained crop: through encoder, projector and predictor, back, and through the averaged network.

    Convolutions and products of matrices count, a multiply-add as two; the objective and the optimiser do not.
    """
    crops = torch.empty(1, COUNTED * config.norm_groups, 3, config.size, config.size, device="meta")
    model = pretraining.build_model(config).to("meta").train()
    with FlopCounterMode(display=False) as counter:
        model(crops).sum().backward()
        if config.needs_target:
            with torch.no_grad():
                model.projector(model.encoder(crops.flatten(0, 1)))
    return counter.get_total_flops() / crops.shape[1]


def embedded_flops(config: PretrainConfig) -> float:
    """FLOPs of an embedded crop, by the convention of `trained_flops`."""
    encoder = pretraining._encoder(config).to("meta").eval()
    return _output(encoder, torch.empty(1, 3, config.size, config.size, device="meta"))[1]
