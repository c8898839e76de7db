"""Fed from shards or from memory, a training sees the same pixels as of a dataset that lies on its device."""

import threading

import pytest
import torch
from test_pretraining import TINY, same_weights, train

from bagssl import feeding, pretraining
from bagssl.config import PretrainConfig
from bagssl.data import Images, Shards, load
from bagssl.errors import InputError, Stopped
from bagssl.pretraining import load_encoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    return load("synthetic", "train").take(torch.arange(0, 4000, 50))  # 80 images: 5 steps an epoch


def in_shards(images, per=7, read=None):
    """The same images, in shards, with the same fingerprint."""
    parts = images.pixels.split(per)
    pixels = Shards(list(map(len, parts)), images.pixels.shape[2:], read or (lambda number: parts[number].clone()))
    return Images(pixels, images.labels, images.classes, images.fingerprint)


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    monkeypatch.setattr(feeding, "_told", set())


def batches(pixels, places, device=CPU):
    with feeding.feed(pixels, lambda device: (each.to(device) for each in places), device) as fed:
        return [batch.clone() for batch in fed]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 20])
def test_the_same_batches_come_in_their_order(images, count):
    places = [torch.randperm(80)[:16] for _ in range(count)]
    expected = [images.pixels[each] for each in places]
    for pixels in (images.pixels, in_shards(images).pixels):
        found = batches(pixels, places)
        assert len(found) == count and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("settings", [{"objective": "simclr"}, {"objective": "byol", "training": "multi-scale"},
                                      {"objective": "tcr", "batch_size": 11, "epochs": 2.5}])
def test_from_shards_the_weights_are_those_from_memory_to_the_bit(images, tmp_path, settings):
    kept, fed = (train(each, tmp_path / name, **settings)
                 for name, each in (("memory", images), ("shards", in_shards(images))))  # fmt: skip
    assert same_weights(kept, fed) and kept.key == fed.key
    columns = [[{**row, "crops_per_second": 0} for row in run.history] for run in (kept, fed)]
    assert columns[0] == columns[1]
    encoder = load_encoder(fed)
    assert torch.equal(encoder(torch.ones(2, 3, 8, 8)), load_encoder(kept)(torch.ones(2, 3, 8, 8)))


def test_an_order_that_is_not_followed_shows(images, tmp_path, monkeypatch):
    """Negative control: the batches of two steps exchanged."""
    kept, told = train(images, tmp_path / "memory"), pretraining._batches

    def exchanged(*how):
        first, second, *others = told(*how)
        return iter([second, first, *others])

    monkeypatch.setattr(pretraining, "_batches", exchanged)
    assert not same_weights(kept, train(in_shards(images), tmp_path / "shards"))


def test_stopped_at_every_step_it_goes_on_from_shards_and_from_memory_in_turn(images, tmp_path):
    kept, stops = train(images, tmp_path / "undisturbed", epochs=2), 0
    for turn in range(30):
        try:
            run = train((images, in_shards(images))[turn % 2], tmp_path / "stopped", epochs=2, time_limit=0)
            break
        except Stopped:
            stops += 1
    assert stops == 9 or stops == 10
    assert same_weights(kept, run) and threading.active_count() < 10
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("feed")]


def test_an_error_of_the_thread_ends_the_training_with_its_own_words(images, tmp_path):
    """In the middle; the thread is gone then, and the next call goes on."""
    parts, asked = images.pixels.split(7), []

    def read(number):
        asked.append(threading.current_thread().name)
        if len(asked) == 12:
            raise InputError("shard 12 is damaged")
        return parts[number].clone()

    fed = in_shards(images, read=read)
    fed.pixels._mapped = type("Forgetful", (dict,), {"__setitem__": lambda *_: None,
                                                     "__getitem__": lambda self, number: read(number).numpy()})()
    with pytest.raises(InputError, match="shard 12 is damaged"):
        train(fed, tmp_path)
    assert all(name.startswith("feed") for name in asked)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("feed")]
    assert same_weights(train(in_shards(images), tmp_path), train(images, tmp_path / "memory"))


def test_the_next_batch_is_gathered_while_the_step_works(images):
    """And no more than one: two buffers are enough, and are used again."""
    gathered, places = [], [torch.arange(16) + i for i in range(5)]

    class Slow(Shards):
        def index_select(self, dim, index, out=None):
            gathered.append(int(index[0]))
            return super().index_select(dim, index, out)

    parts = images.pixels.split(7)
    pixels, used = Slow(list(map(len, parts)), images.pixels.shape[2:], lambda number: parts[number].clone()), []
    with feeding.feed(pixels, lambda device: iter(places), CPU) as fed:
        for i, batch in enumerate(fed):
            used.append(batch.data_ptr())
            until = threading.Event()
            while len(gathered) < min(i + 2, 5):
                until.wait(0.001)
            until.wait(0.02)
            assert len(gathered) == min(i + 2, 5) and torch.equal(batch, images.pixels[places[i]])
    assert gathered == list(range(5)) and len(set(used)) == 2


def test_what_fits_lies_on_the_device_and_what_is_fed_is_said_once(images, tmp_path, monkeypatch, capsys):
    gpu, shards = torch.device("cuda"), in_shards(images).pixels
    assert feeding.fits(images.pixels, CPU) and not feeding.fits(shards, CPU)
    for free, fits in ((2 * images.pixels.nbytes, True), (2 * images.pixels.nbytes - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        assert feeding.fits(images.pixels, gpu) == feeding.fits(shards, gpu) == fits
    train(images, tmp_path, epochs=1)
    assert capsys.readouterr().err == ""
    for seed in (1, 2):
        train(in_shards(images), tmp_path, epochs=1, seed=seed)
    assert capsys.readouterr().err == "80 images, 0.0 GB: they stay on disk, and are fed while it trains\n"


@pytest.mark.parametrize("step", [0, 3, 5, 9, 12])
def test_the_places_of_a_step_do_not_depend_on_where_it_began(step):
    config = PretrainConfig(**TINY)
    every = list(pretraining._batches(config, 83, 0, CPU))
    assert len(every) == config.steps(83) == 15
    rest = list(pretraining._batches(config, 83, step, CPU))
    assert len(rest) == 15 - step and all(map(torch.equal, rest, every[step:]))
    for epoch in range(3):
        assert len(torch.cat(every[5 * epoch : 5 * epoch + 5]).unique()) == 80


@pytest.mark.gpu
@pytest.mark.parametrize("shards", [False, True])
def test_a_gpu_is_fed_the_same_batches(images, shards, monkeypatch):
    places = [torch.randperm(80)[:16] for _ in range(50)]
    monkeypatch.setattr(feeding, "SHARE", 0)
    pixels = in_shards(images).pixels if shards else images.pixels
    with feeding.feed(pixels, lambda device: (each.to(device) for each in places), torch.device("cuda")) as fed:
        for each, batch in zip(places, fed, strict=True):
            assert batch.is_cuda
            torch.cuda._sleep(10_000_000)  # the device lags behind, and the buffers must wait for it
            assert torch.equal(batch.cpu(), images.pixels[each])
    monkeypatch.setattr(feeding, "SHARE", 0.5)
    assert feeding.fits(pixels, torch.device("cuda"))
    assert all(torch.equal(batch.cpu(), images.pixels[each])
               for each, batch in zip(places, batches(pixels, places, torch.device("cuda")), strict=True))  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["none", "graphs"])
def test_a_gpu_that_is_fed_trains(images, tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(feeding, "SHARE", 0)
    run = train(in_shards(images), tmp_path, device="cuda", compiled=compiled, training="multi-scale")
    monkeypatch.setattr(feeding, "SHARE", 0.5)
    kept = train(images, tmp_path / "kept", device="cuda", compiled=compiled, training="multi-scale")
    assert run.history[0]["loss"] == pytest.approx(kept.history[0]["loss"], rel=1e-3)
