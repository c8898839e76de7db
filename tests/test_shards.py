"""Datasets in shards: written whole or gone on with, equal to the bit to the same in memory, damage one clear line."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from test_pretraining import same_weights
from test_pretraining import train as training
from test_trees import contents, plant

from bagssl import caches, catalogue, cli, data, patches, pictures, shards, trees
from bagssl.bags import embed_bags, patch_embeddings
from bagssl.encoders import build_encoder
from bagssl.errors import InputError
from bagssl.evaluation import evaluate
from bagssl.study import explore, sizes

SIZE, PER = 16, 7  # pixels; pictures in a shard


def photo(seed, height, width):
    """A picture that has larger and smaller features, as a photo has."""
    random = np.random.default_rng(seed)
    layers = [Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).resize((width, height), 3)
              for side in (3, 9, 27)]  # fmt: skip
    return Image.blend(Image.blend(layers[0], layers[1], 0.4), layers[2], 0.2)


def album(tree, train, test=3, sides=(17, 31), classes=("cat", "dog", "owl")):
    """Pictures of every kind that are not broken, shorter sides from one to the other."""
    for s, (split, count) in enumerate({"train": train, "val": test}.items()):
        for c, name in enumerate(classes):
            (tree / split / name).mkdir(parents=True)
            for i in range(count):
                draw = np.random.default_rng([s, c, i])
                short, more = int(draw.integers(*sides, endpoint=True)), int(draw.integers(0, 20))
                image = photo([s, c, i], *((short, short + more) if i % 2 else (short + more, short)))
                save(image, tree / split / name / f"{i:05}", i % 8)
    return tree


def save(image, path, kind):
    if kind == 0:
        image.save(path.with_suffix(".png"))
    elif kind == 1:
        image.convert("L").save(path.with_suffix(".jpg"))
    elif kind == 2:
        image.convert("CMYK").save(path.with_suffix(".JPEG"))
    elif kind == 3:
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path.with_suffix(".png"))
    elif kind == 4:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path.with_suffix(".jpg"), exif=exif)
    else:
        image.save(path.with_suffix(".JPEG"))


def broken(tree):
    """Some of the tree's pictures, spoilt in several ways."""
    files = sorted(tree.rglob("*.JPEG"))
    for i, path in enumerate(files[:: max(1, len(files) // 8)]):
        content = path.read_bytes()
        path.write_bytes([b"", content[:-60], b"no picture", content[: len(content) // 2]][i % 4])
    return len(files[:: max(1, len(files) // 8)])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return album(tmp_path_factory.mktemp("album") / "tree", train=20)


def make_small(patch):
    patch.setattr(catalogue, "SHARDED_FROM", 1)
    patch.setattr(shards, "SHARD", PER * 3 * SIZE**2)


@pytest.fixture
def small(monkeypatch):
    """Every dataset is large, and lies in shards of few pictures."""
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def once(tree, tmp_path_factory):
    """A folder of datasets with the album in shards, and what was said of it; not to be changed."""
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return folder, add(tree, folder)


@pytest.fixture
def stored(once, root, small):
    """A copy of it, which may."""
    shutil.copytree(once[0], root)
    return root


def add(tree, root, name="pets", **options):
    return trees.add(name, tree, size=SIZE, root=root, **options)


def in_memory(images):
    return data.Images(images.pixels.to("cpu"), images.labels, images.classes)


def files(root, name="pets"):
    return sorted((root / name).glob("*.safetensors"))


def times(root):
    """When each shard was written."""
    return {path: path.stat().st_mtime_ns for path in files(root)}


# The same pictures


def test_a_dataset_is_in_shards_from_a_size_on_and_has_the_same_pictures(tree, once, stored, monkeypatch):
    root = stored
    assert "60 train and 9 test images of 16×16 px in 3 classes, in 11 shards in" in once[1]
    monkeypatch.setattr(catalogue, "SHARDED_FROM", 69 * 3 * SIZE**2 + 1)
    assert "in 3 classes, in " in (line := add(tree, root, "one")) and line.endswith("one.safetensors")
    for split in data.SPLITS:
        many, one = (data.load(name, split, root) for name in ("pets", "one"))
        assert isinstance(many.pixels, data.Shards) and isinstance(one.pixels, torch.Tensor)
        assert torch.equal(many.labels, one.labels) and many.classes == one.classes
        for label in range(3):
            found = [sorted(image.numpy().tobytes() for image in each.pixels[each.labels == label])
                     for each in (many, one)]  # fmt: skip
            assert found[0] == found[1]
    with pytest.raises(InputError, match="holds other images"):  # and the other way round
        add(tree, root)


def reduced_and_whole(path, image, size):
    """Of a JPEG: mean and largest difference in grey levels, of 255, and the share of detail that is kept."""
    image.save(path)
    reduced, whole = (pictures.read(path, size, reduced=each).astype(int) for each in (True, False))
    detail = [np.abs(np.diff(each)).mean() for each in (reduced, whole)]
    return np.abs(reduced - whole).mean(), np.abs(reduced - whole).max(), detail[0] / detail[1]


@pytest.mark.parametrize("side", [64, 255, 256, 300, 511, 512, 640, 1100])
@pytest.mark.parametrize("other", [0, 1, 37])
def test_a_jpeg_is_reduced_only_where_that_loses_nothing(side, other, tmp_path):
    """But for rounding; one that is too small for that, is turned, or no JPEG, is the same to the bit."""
    size, image = 64, photo(side, side, side + other)
    scale = max(scale for scale in (1, 2, 4, 8) if side >= scale * pictures.SPARE * size or scale == 1)
    image.save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as opened:
        square = pictures._reduce(opened, size)
        assert min(opened.size) == -(-side // scale) and square[2] - square[0] == side / scale
        assert scale == 1 or side / scale >= 2 * size
    mean, most, detail = reduced_and_whole(tmp_path / "a.jpg", image, size)
    assert (mean, most) == (0, 0) if scale == 1 else 0 < mean < 0.4 and most <= 3 and 0.99 < detail < 1.03
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / "b.jpg", exif=exif), image.save(tmp_path / "c.png")
    for name in ("b.jpg", "c.png"):
        assert np.array_equal(*(pictures.read(tmp_path / name, size, reduced=each) for each in (False, True)))


def test_a_jpeg_that_is_reduced_too_far_is_found(tmp_path, monkeypatch):
    """Negative control: at the size itself a decoder leaves means of blocks."""
    monkeypatch.setattr(pictures, "SPARE", 1)
    mean, _, detail = reduced_and_whole(tmp_path / "a.jpg", photo(512, 512, 512), 64)
    assert mean > 0.4 and detail < 0.99


INDICES = [0, 22, -1, slice(3, 6), slice(5, 30), slice(None), slice(50, 90), slice(7, 7), slice(0, 14),
           torch.tensor([], dtype=torch.int64), torch.tensor([5]), torch.tensor([59, 0, 7, 7, 13]),
           torch.tensor([-1, 3]), torch.tensor([[1, 2], [30, 44]]), torch.arange(60) % 3 == 1, torch.tensor(9)]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("chosen", [False, True])
def test_shards_are_indexed_as_a_tensor_is(index, chosen, once):
    images = data.load("pets", "train", once[0])
    pixels, whole = images.pixels, images.pixels.to("cpu")
    if chosen:
        order = torch.randperm(60)
        pixels, whole = pixels.take(order), whole[order]
    assert torch.equal(pixels[index], whole[index])


def test_shards_have_what_a_tensor_has(once):
    images = data.load("pets", "train", once[0])
    shards, whole = images.pixels, in_memory(images).pixels
    for name in ("shape", "dtype", "device", "ndim", "nbytes"):
        assert getattr(shards, name) == getattr(whole, name)
    assert len(shards) == len(whole) == 60 and shards.numel() == whole.numel()
    for count in (1, 7, 8, 100):
        assert [torch.equal(*pair) for pair in zip(shards.split(count), whole.split(count), strict=True)]
    assert all(map(torch.equal, shards, whole))  # one by one, to the end
    out = torch.empty(3, 3, SIZE, SIZE, dtype=torch.uint8)
    assert shards.index_select(0, torch.tensor([0, 50, 9]), out=out) is out and torch.equal(out, whole[[0, 50, 9]])
    for wrong in (60, -61, torch.tensor([60]), torch.tensor([-61])):
        with pytest.raises(IndexError):
            shards[wrong]


def test_large_images_are_gathered_by_several_threads_and_an_error_of_one_is_raised():
    whole = torch.randint(256, (20, 3, 110, 120), dtype=torch.uint8)

    def read(number):
        if number == 2:
            raise InputError("the third shard is damaged")
        return whole[number * 6 : number * 6 + 6]

    pixels = data.Shards([6, 6, 6, 2], (110, 120), read)
    for places in ([0], [], [19, 18, 3], list(range(12)) * 2):
        index = torch.tensor(places, dtype=torch.int64)
        assert torch.equal(pixels[index], whole[index])
    with pytest.raises(InputError, match="third shard"):
        pixels[torch.arange(20)]


def test_all_that_uses_images_gives_the_same_from_shards(once, tmp_path):
    train, test = (data.load("pets", split, once[0]) for split in data.SPLITS)
    assert len(files(once[0])) > 3 and isinstance(train.pixels, data.Shards)
    kept, kept_test = in_memory(train), in_memory(test)
    runs = [training(images, tmp_path / name, epochs=1) for name, images in (("shards", train), ("memory", kept))]
    rows = [evaluate(run, *pair, [0, 4], probes=["knn"], scale=0.3, progress=False)
            for run, pair in zip(runs, ((train, test), (kept, kept_test)), strict=True)]  # fmt: skip
    assert same_weights(*runs) and rows[0] == rows[1] and runs[0].key != runs[1].key
    encoder = build_encoder("resnet10", 8).eval()
    for batch in (5, 64):
        bags, same = (embed_bags(encoder, images.pixels, [0, 1, 4], scale=0.3, size=8, batch=batch)
                      for images in (train, kept))  # fmt: skip
        assert all(torch.equal(bags[k], same[k]) for k in (0, 1, 4))
    boxes = patches.evaluation_boxes(3, 60, SIZE, SIZE, 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(*(patch_embeddings(encoder, images.pixels, boxes, 8) for images in (train, kept)))
    shown = [explore.growing_bags(encoder, *pair, [0, 5], [1, 4], scale=0.3, size=8)._repr_html_()
             for pair in ((train, test), (kept, kept_test))]  # fmt: skip
    assert shown[0] == shown[1]
    for check in (lambda images: sizes.check_scales("scale", [0.3], images), sizes.check_probes,
                  lambda images: sizes.check_grid("grid", 2, 0.3, images)):  # fmt: skip
        check(train), check(kept)


def test_a_choice_of_images_is_in_memory_unless_it_is_large(once, monkeypatch):
    images = data.load("pets", "train", once[0])
    kept = in_memory(images)
    monkeypatch.setattr(catalogue, "SHARDED_FROM", 21 * 3 * SIZE**2)
    few, same = (sizes.sample(each, "train_images", 20) for each in (images, kept))
    assert isinstance(few.pixels, torch.Tensor) and torch.equal(few.pixels, same.pixels)
    assert few.fingerprint == same.fingerprint and torch.equal(few.labels, same.labels)
    many, same, other = data.subset(images, 21), data.subset(kept, 21), data.subset(images, 21, seed=1)
    assert isinstance(many.pixels, data.Shards) and torch.equal(many.pixels.to("cpu"), same.pixels)
    assert torch.equal(many.labels, same.labels)
    assert len({many.fingerprint, other.fingerprint, images.fingerprint}) == 3
    again = data.load("pets", "train", once[0])
    assert data.subset(again, 21).fingerprint == many.fingerprint
    assert torch.equal(many.take(torch.tensor([4, 2])).pixels, same.take(torch.tensor([4, 2])).pixels)


# Pictures that cannot be read


def test_unreadable_pictures_are_refused_and_named_or_left_out_and_counted(root, small, tmp_path, monkeypatch, capsys):
    tree = album(tmp_path / "tree", train=20)
    count = broken(tree)
    monkeypatch.setenv("BAGSSL_DATA", str(root))
    words = ["data", "add", "pets", str(tree), "--size", str(SIZE)]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and f"nor can {count - 1} more (" in said and "--skip-unreadable" in said
    named = (root / "pets.unreadable.txt").read_text().splitlines()
    assert len(named) == count > pictures.NAMED and all("cannot be read as an image" in line for line in named)
    assert not catalogue.available("pets", root) and all(row["name"] != "pets" for row in catalogue.status(root))
    before = times(root)
    assert cli.main([*words, "--skip-unreadable"]) == 0
    assert f"{count} that cannot be read are left out, and named in" in capsys.readouterr().out
    assert times(root) == before  # nothing was decoded again
    assert catalogue.sharded("pets", root)["skipped"] == count
    assert sum(len(data.load("pets", split, root)) for split in data.SPLITS) == 69 - count
    monkeypatch.setattr(catalogue, "SHARDED_FROM", 2**31)
    assert cli.main(["data", "add", "one", *words[3:], "--skip-unreadable"]) == 0
    for split in data.SPLITS:
        many, one = (data.load(name, split, root) for name in ("pets", "one"))
        assert torch.equal(many.labels, one.labels)
        assert sorted(x.numpy().tobytes() for x in many.pixels) == sorted(x.numpy().tobytes() for x in one.pixels)
    with catalogue.opened(root / "one.safetensors", "one") as (_, about):
        assert about["skipped"] == count


def test_a_box_that_lacks_something_leaves_no_picture_out(tree, monkeypatch):
    def lacking(*_):
        raise OSError(24, "Too many open files")

    path = next(tree.rglob("*.JPEG"))
    monkeypatch.setattr(Image, "open", lacking)
    with pytest.raises(OSError, match="Too many open files"):
        pictures.read(path, SIZE)


@pytest.mark.parametrize("large", [True, False])
def test_a_class_of_which_nothing_can_be_read_is_refused(large, root, small, tmp_path, monkeypatch):
    tree = plant(tmp_path / "tree")
    if not large:
        monkeypatch.setattr(catalogue, "SHARDED_FROM", 2**31)
    for path in (tree / "test" / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="no test image of the class 'dog' can be read"):
        add(tree, root, skip_unreadable=True)
    assert not catalogue.available("pets", root)


def test_without_a_size_all_must_have_one(root, small, tmp_path):
    tree = plant(tmp_path / "tree")
    trees.add("pets", tree, root=root)
    assert data.load("pets", "train", root).pixels.shape == (9, 3, 12, 12)
    photo(0, 12, 16).save(tree / "test" / "owl" / "wide.png")
    with pytest.raises(InputError, match="12×12 px and .*wide.png with 16×12 px: give --size"):
        trees.add("others", tree, root=root)


# Stopped, and gone on with

CODE = """if True:
    import sys
    from pathlib import Path
    from bagssl import catalogue, layouts, shards
    def main():
        tree, root, size, most = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
        shards.SHARD = most
        print(shards.add("pets", layouts.find(tree), "class folders", size, (size, size), root, False, True))
    main()
"""


def adding(tree, root, size=SIZE, most=PER * 3 * SIZE**2, code=CODE):
    """A process of its own that adds a tree, without torch."""
    words = [sys.executable, "-c", code, str(tree), str(root), str(size), str(most)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            cwd=Path(shards.__file__).parent.parent)  # fmt: skip


def killed_after(process, root, count, seconds=30.0):
    """Kill a process, and no other, when so many shards are there; its workers, which must end with it."""
    until = time.monotonic() + seconds
    while len(files(root)) < count and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    return process.returncode == -signal.SIGKILL


def ended(process):
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


def test_killed_at_several_points_it_goes_on_and_ends_with_the_same_shards(tmp_path):
    tree = album(tmp_path / "tree", train=50)
    broken(tree)
    out = ended(adding(tree, tmp_path / "undisturbed"))
    assert "in 24 shards" in out
    for attempt in range(20):  # on a busy machine it may have ended before we look
        root, kills, kept = tmp_path / f"data {attempt}", 0, {}
        for count in (1, 8, 16):
            if not killed_after(adding(tree, root), root, count):
                break
            assert not catalogue.available("pets", root)
            now, kills = times(root), kills + 1
            assert kept.items() <= now.items()
            kept = now
        if kills == 3:
            break
    assert kills == 3 and len(kept) >= 16
    assert ended(adding(tree, root)).replace(root.name, "") == out.replace("undisturbed", "")
    assert kept.items() <= times(root).items()
    found, expected = (contents(folder) for folder in (root, tmp_path / "undisturbed"))
    assert found == expected and len(found) > 24


COMMAND = """if True:
    import os, sys
    from bagssl import catalogue, cli, shards
    catalogue.SHARDED_FROM, shards.SHARD, os.environ["BAGSSL_DATA"] = 1, int(sys.argv[4]), sys.argv[2]
    sys.exit(cli.main(["data", "add", "pets", sys.argv[1], "--size", sys.argv[3]]))
"""


def interrupt(process):
    """As a terminal does: the workers hear it as well."""
    os.killpg(process.pid, signal.SIGINT)


def kill_a_worker(process):
    psutil.Process(process.pid).children()[-1].kill()


@pytest.mark.parametrize("end, code, said", [(interrupt, 130, "bagssl: interrupted"), (
    kill_a_worker, 1, "the memory does not suffice (MemoryError: a process that decodes images was killed; the next")])
def test_ctrl_c_and_a_worker_that_is_killed_are_one_line_and_lose_nothing(end, code, said, tmp_path):
    tree = album(tmp_path / "tree", train=150, test=2)
    for attempt in range(20):  # on a busy machine it may have ended before we look
        root = tmp_path / f"data {attempt}"
        process = adding(tree, root, code=COMMAND)
        while len(files(root)) < 3 and process.poll() is None:
            time.sleep(0.002)
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, IndexError):
            end(process)
        error = process.communicate(timeout=60)[1]
        if process.returncode:
            break
    assert process.returncode == code and said in error and len(error.splitlines()) == 1, error
    kept = times(root)
    assert 3 <= len(kept) < 66 and "in 66 shards" in ended(adding(tree, root))
    assert kept.items() <= times(root).items()


def test_a_picture_that_was_replaced_in_between_is_read_anew(tmp_path, small):
    tree, root = album(tmp_path / "tree", train=8), tmp_path / "data"
    path = tree / "train" / "cat" / "00005.JPEG"
    sound = path.read_bytes()
    path.write_bytes(b"x" * len(sound))
    with pytest.raises(InputError, match="00005.JPEG cannot be read"):
        add(tree, root)
    kept = times(root)
    path.write_bytes(sound)
    assert "24 train and 9 test" in add(tree, root)
    assert len(kept.items() & times(root).items()) == len(kept) - 1
    add(tree, tmp_path / "anew")
    assert data.check("pets", root) == data.check("pets", tmp_path / "anew")


def test_two_that_add_one_dataset_are_not_let_in_together(tree, root, small):
    (root / "pets").mkdir(parents=True)
    with shards._alone(root / "pets", "pets"), pytest.raises(InputError, match="another process is adding pets"):
        add(tree, root)
    assert "shards" in add(tree, root)


def test_a_full_disk_is_one_line(tree, root, small, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_write_all", full)
    with pytest.raises(InputError, match="pets cannot be written .*No space left.*BAGSSL_DATA"):
        add(tree, root)


# What is there already


def test_the_same_again_changes_nothing_and_other_pictures_need_force(root, small, tmp_path, monkeypatch):
    tree = plant(tmp_path / "tree")
    add(tree, root)
    before = contents(root)
    assert "nothing to do" in add(tree, root) and contents(root) == before
    photo(0, 20, 20).save(tree / "test" / "owl" / "new.png")
    with pytest.raises(InputError, match="holds other images.*--force"):
        add(tree, root)
    assert contents(root) == before
    add(tree, root, force=True)
    assert len(data.load("pets", "test", root)) == 7
    assert {path.name for path in files(root)} == {
        entry["file"] for split in data.SPLITS for entry in catalogue.sharded("pets", root)["splits"][split]["shards"]}
    monkeypatch.setattr(catalogue, "SHARDED_FROM", 2**31)  # a small one in its place, and back
    with pytest.raises(InputError, match="pets holds other images.*--force"):
        add(tree, root)
    add(tree, root, force=True)
    assert isinstance(data.load("pets", "test", root).pixels, torch.Tensor) and not (root / "pets").exists()
    monkeypatch.setattr(catalogue, "SHARDED_FROM", 1)
    add(tree, root, force=True)
    assert isinstance(data.load("pets", "test", root).pixels, data.Shards) and not (root / "pets.safetensors").exists()


def test_what_is_said_of_shards_is_read_from_the_index_alone(once, monkeypatch):
    root = once[0]
    monkeypatch.setattr(catalogue, "safe_open", None)
    said = {"name": "pets", "state": "ready", "train": 60, "test": 9, "classes": 3, "size": "16×16"}
    assert said.items() <= catalogue.status(root)[-1].items()
    recorded = catalogue.recorded("pets", root)
    assert recorded == {split: data.load("pets", split, root).fingerprint for split in data.SPLITS}


# Damage


def swap(root):
    shards = catalogue.sharded("pets", root)["splits"]["train"]["shards"]
    first, second = (root / "pets" / entry["file"] for entry in shards[:2])
    first.rename(root / "x"), second.rename(first), (root / "x").rename(second)
    return "another shard", "SHA-256"


def flip_a_pixel(root):
    path = files(root)[-3]
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    return None, "SHA-256"


def lose_a_shard(root):
    files(root)[-3].unlink()
    return ("it is missing",) * 2


def cut_a_shard(root):
    path = files(root)[-3]
    path.write_bytes(path.read_bytes()[:-1])
    return ("of .* bytes",) * 2


def overwrite_a_shard(root):
    path = files(root)[-3]
    path.write_bytes(os.urandom(len(path.read_bytes())))
    return "", ""


def change_the_index(root):
    path = root / "pets" / "index.json"
    path.write_text(path.read_text().replace("owl", "elk"))
    return ("not what was written",) * 2


def cut_the_index(root):
    path = root / "pets" / "index.json"
    path.write_text(path.read_text()[:-100])
    return ("",) * 2


def come_from_the_future(root):
    path = root / "pets" / "index.json"
    path.write_text(path.read_text().replace(catalogue.SHARDED, "bagssl-shards-9"))
    return ("format is bagssl-shards-9",) * 2


DAMAGE = [swap, flip_a_pixel, lose_a_shard, cut_a_shard, overwrite_a_shard, change_the_index, cut_the_index,
          come_from_the_future]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_one_line_and_adding_again_mends_what_is_damaged(damage, tree, stored):
    root = stored
    before, sound = contents(root), data.check("pets", root)
    loading, checking = damage(root)
    kept = {path: time for path, time in times(root).items() if before[path.relative_to(root)] == path.read_bytes()}

    def load():
        for split in data.SPLITS:
            list(data.load("pets", split, root).pixels.split(1))

    for read, said in ((load, loading), (lambda: data.check("pets", root), checking)):
        if said is not None:
            with pytest.raises(InputError, match=f"damaged .*{said}.*bagssl data add pets PATH") as caught:
                read()
            assert "\n" not in str(caught.value)
    assert "shards" in add(tree, root)
    assert contents(root) == before and data.check("pets", root) == sound
    assert kept.items() <= times(root).items()


def test_loading_reads_no_pixels(once, monkeypatch):
    monkeypatch.setattr(data, "opened", None)
    images = data.load("pets", "train", once[0])
    assert len(images) == 60 and images.labels.tolist() == [label for label in range(3) for _ in range(20)]


# What it takes

PEAK = CODE + """
    import resource
    print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


def links(tree, count):
    """A tree of so many pictures of each class, all one file."""
    photo(0, 80, 100).save(tree.with_suffix(".jpg"))
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tree / split / name).mkdir(parents=True)
            for i in range(count if split == "train" else 1):
                os.link(tree.with_suffix(".jpg"), tree / split / name / f"{i:06}.JPEG")
    return tree


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    peaks = {}
    for count in (100, 900):
        out = ended(adding(links(tmp_path / f"tree{count}", count), tmp_path / str(count), 64, 2**20, PEAK))
        peaks[count] = int(out.splitlines()[-1]) / 2**10  # MiB
    # 1,600 pictures more are 19 MiB more of pixels
    assert peaks[900] - peaks[100] < 5, peaks


@pytest.mark.nightly
def test_twenty_thousand_pictures_killed_at_ten_random_moments(tmp_path):
    tree = album(tmp_path / "tree", train=1990, test=10, sides=(40, 400), classes=[f"n{i:08}" for i in range(10)])
    count = broken(tree)
    begun = time.monotonic()
    out = ended(adding(tree, tmp_path / "undisturbed", 32, 2**20, PEAK))
    took, root, kills = time.monotonic() - begun, tmp_path / "data", 0
    assert f"{20_000 - count:,}".split(",")[0] in out and f"{count} that cannot be read" in out
    for _ in range(10):
        process = adding(tree, root, 32, 2**20)
        time.sleep(random.uniform(0.3, took / 6))
        kills += killed_after(process, root, 0)
    ended(adding(tree, root, 32, 2**20))
    assert kills >= 5 and contents(root) == contents(tmp_path / "undisturbed")
    assert json.loads((root / "pets" / "index.json").read_text())["skipped"] == count
    small = links(tmp_path / "few", 100)
    peaks = [int(ended(adding(each, tmp_path / each.name / "out", 32, 2**20, PEAK)).splitlines()[-1]) / 2**10
             for each in (small, tree)]  # fmt: skip
    assert peaks[1] - peaks[0] < 16, peaks  # of which names are 4


def test_the_parts_that_the_processes_load_know_no_torch():
    code = "import sys; import bagssl.shards, bagssl.layouts; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False" and caches.blank
