"""Arrays in an .npz file: read as they are meant, or refused in one line that says what to do."""

import io
import math
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_trees import contents, picture, plant

from bagssl import arrays, caches, catalogue, cli, data, trees
from bagssl.errors import InputError
from bagssl.runs import Run


def labelled(seed, count, classes=3, side=12, channels=3):
    """Pixels [N, H, W, 3], or [N, H, W] without channels, and labels [N] in which each class is there."""
    rng = np.random.default_rng(seed)
    shape = (count, side, side, channels) if channels else (count, side, side)
    return rng.integers(0, 256, shape, np.uint8), rng.permutation(np.arange(count) % classes)


def ours(**changes):
    """Arrays as they should be, but for the changes; None takes one away."""
    (train_x, train_y), (test_x, test_y) = labelled(0, 9), labelled(1, 6)
    found = {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y, **changes}
    return {name: array for name, array in found.items() if array is not None}


@pytest.fixture
def add(tmp_path, root):
    """`add` what is saved as set.npz, by numpy or as the bytes that are given; the line that it says."""
    def add(content, name="set", **options):
        if isinstance(content, bytes):
            (tmp_path / "set.npz").write_bytes(content)
        else:
            np.savez(tmp_path / "set.npz", **content)
        return trees.add(name, tmp_path / "set.npz", root=root, **options)

    return add


def pixels(root, split="train", name="set"):
    """The images [N, H, W, 3] of a split, sorted by what they hold."""
    images = data.load(name, split, root)
    return sorted(zip(images.labels.tolist(), map(bytes, images.pixels.permute(0, 2, 3, 1).contiguous().numpy())))


def expected(x, y):
    x = np.broadcast_to(x.reshape(*x.shape[:3], -1), (*x.shape[:3], 3))
    return sorted(zip(y.reshape(-1).tolist(), (np.ascontiguousarray(image).tobytes() for image in x)))


def test_arrays_come_back_pixel_by_pixel(add, root):
    assert "9 train and 6 test images of 12×12 px in 3 classes" in add(ours())
    for split in data.SPLITS:
        assert pixels(root, split) == expected(ours()[f"{split}_x"], ours()[f"{split}_y"])
    assert data.load("set", "test", root).classes == ("0", "1", "2")
    assert "nothing to do" in add(ours()) and "nothing to do" in add(ours(classes=np.array(["0", "1", "2"])))


@pytest.mark.parametrize("names", arrays.NAMES)
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_grey_and_colour_by_each_of_the_three_customs(names, channels, add, root):
    found = {}
    for seed, place in enumerate(("train", "test", "val")):
        x, y = labelled(seed, 6, channels=channels)
        found |= dict(zip((name.format(place) for name in names), (x, y.astype(np.uint8)[:, None])))
    line = add(found)
    assert line.endswith("; its validation split is left out") and "6 train and 6 test images" in line
    for seed, split in enumerate(data.SPLITS):
        assert pixels(root, split) == expected(*labelled(seed, 6, channels=channels))
    second = {name: array for name, array in found.items() if "test" not in name}
    assert add(second, force=True).endswith("; its validation split serves as the test")
    assert pixels(root, "test") == expected(*labelled(2, 6, channels=channels))


SOUND = {
    "pixels by column": lambda d: {"train_x": np.asfortranarray(d["train_x"])},
    "pixels of 64 bits": lambda d: {"train_x": d["train_x"].astype(np.int64)},
    "pixels of 16 bits, the high byte first": lambda d: {"test_x": d["test_x"].astype(">u2")},
    "labels with the high byte first": lambda d: {"train_y": d["train_y"].astype(">i4")},
    "labels as a column": lambda d: {"test_y": d["test_y"][:, None]},
    "whole labels as fractions": lambda d: {"train_y": d["train_y"].astype(np.float32)},
    "a second class array": lambda d: {"class_names": np.array(["0", "1", "2"])},
    "classes in bytes": lambda d: {"classes": np.array([b"0", b"1", b"2"])},
    "classes by number": lambda d: {"classes": np.arange(3)},
    "something else beside": lambda d: {"notes": np.array([{"author": 1}], dtype=object)},
}


@pytest.mark.parametrize("change", SOUND)
def test_the_same_images_written_otherwise_are_the_same(change, add, root):
    add(ours())
    assert "nothing to do" in add(ours(**SOUND[change](ours())))


@pytest.mark.parametrize("save", [np.savez_compressed, "bzip2", "lzma"])
def test_any_compression_will_do(save, add, root, tmp_path):
    add(ours())
    stream = io.BytesIO()
    if callable(save):
        save(stream, **ours())
    else:
        np.savez(tmp_path / "plain.npz", **ours())
        kind = {"bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}[save]
        with zipfile.ZipFile(tmp_path / "plain.npz") as plain, zipfile.ZipFile(stream, "w", kind) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
    assert "nothing to do" in add(stream.getvalue())


def test_reading_in_pieces_changes_nothing(add, root, monkeypatch):
    add(ours())
    before = contents(root)
    for block in (1, 433, 1000):
        monkeypatch.setattr(arrays, "_BLOCK", block)
        monkeypatch.setattr(data, "_BLOCK", block)
        assert "nothing to do" in add(ours())
        (root / "set.safetensors").unlink()
        add(ours())
        assert contents(root) == before


@pytest.mark.parametrize("side", [1, 7, 1030])
def test_small_and_large_images_are_read_as_they_are(side, add, root):
    (x, y), (other, labels) = labelled(0, 2, 2, side, None), labelled(1, 2, 2, side, None)
    add({"train_x": x, "train_y": y, "test_x": other, "test_y": labels})
    assert pixels(root) == expected(x, y)


@pytest.mark.parametrize("channels", [None, 3])
def test_size_gives_what_it_gives_for_pictures(channels, add, root, tmp_path):
    found = {}
    for seed, split in enumerate(data.SPLITS):
        x, y = labelled(seed, 6, side=20 + 10 * seed, channels=channels)  # the splits may differ
        found |= {f"{split}_x": x[:, :, 2:], f"{split}_y": y}
        for i, (image, label) in enumerate(zip(x[:, :, 2:], y)):
            (tmp_path / "tree" / split / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "tree" / split / str(label) / f"{i}.png")
    with pytest.raises(InputError, match="images of 18×20 px and of 28×30 px: give --size"):
        add(found)
    add(found, size=16)
    assert "nothing to do" in trees.add("set", tmp_path / "tree", size=16, root=root)


def test_names_of_classes_are_kept(add, root):
    add(ours(classes=np.array(["cat", "cafe\u0301", "owl \U0001f989"])))
    assert data.load("set", "train", root).classes == ("cat", "caf\u00e9", "owl \U0001f989")


def test_one_can_train_on_what_medmnist_is_like(tmp_path, monkeypatch, capsys):
    """Grey and colour, 28 px, from the file to two steps of training, by the command line."""
    settings = {"epochs": 1, "batch_size": 6, "views": 2, "width": 8, "size": 8, "projector_hidden": 16,
                "projector_dim": 8}  # fmt: skip
    for name, channels in (("breast", None), ("blood", 3)):
        found = {}
        for seed, split in enumerate(("train", "val", "test")):
            x, y = labelled(seed, 12, side=28, channels=channels)
            found |= {f"{split}_images": x, f"{split}_labels": y.astype(np.uint8)[:, None]}
        np.savez_compressed(tmp_path / f"{name}mnist.npz", **found)
        assert cli.main(["data", "add", name, str(tmp_path / f"{name}mnist.npz")]) == 0
        line, = capsys.readouterr().out.splitlines()
        assert "12 train and 12 test images of 28×28 px in 3 classes" in line and line.endswith("split is left out")
        given = [word for item in settings.items() for word in ("--set", "{}={}".format(*item))]
        assert cli.main(["pretrain", "--dataset", name, *given]) == 0
        folder = capsys.readouterr().out.splitlines()[-1]
        history = Run(Path(folder)).history
        assert history[-1]["step"] == 2


# CIFAR


def cifar(count=2, side=32):
    """The pictures of test_trees.plant as arrays."""
    keys = {"train": [(0, c, i) for i in range(count) for c in range(10)], "test": [(1, c, 0) for c in range(10)]}
    found = {f"{split}_x": np.stack([picture(list(key), side, side) for key in each]) for split, each in keys.items()}
    return found | {f"{split}_y": np.array([c for _, c, _ in each]) for split, each in keys.items()}


@pytest.fixture
def small_cifar(monkeypatch):
    monkeypatch.setitem(catalogue.CIFAR, "cifar10", (catalogue.CIFAR["cifar10"][0], {"train": 2, "test": 1}))


def test_cifar_as_arrays_is_cifar(small_cifar, add, root, tmp_path):
    classes = catalogue.CIFAR["cifar10"][0]
    trees.add("cifar10", plant(tmp_path / "tree", classes, 2, 1, 32, 32), root=root)
    assert "nothing to do" in add(cifar(), "cifar10")
    assert "nothing to do" in add(cifar() | {"classes": np.array(classes)}, "cifar10")


@pytest.mark.parametrize("found, message", [
    (lambda: cifar(1), "2 train images of each class, here are 1 of 'airplane': add it under another name"),
    (lambda: cifar(side=28), "cifar10 has images of 32×32 px"),
    (lambda: cifar() | {"classes": np.array(catalogue.CIFAR["cifar10"][0][::-1])},
     "have an order, airplane, automobile"),
    (lambda: cifar() | {"classes": np.array([*"abcdefghij"])}, "here 'a' does not belong"),
    (ours, "cifar10 has 10 classes"),
])  # fmt: skip
@pytest.mark.parametrize("size", [None, 32])
def test_a_part_of_cifar_is_not_cifar(found, message, size, small_cifar, add, root):
    with pytest.raises(InputError, match=message):
        add(found(), "cifar10", size=size)
    assert not root.exists()
    add(found(), "part")


# What is wrong


def archive(shape, content=b"", dtype="|u1", order=False):
    """An .npz whose train_x claims a shape, whatever its content."""
    header = str({"descr": dtype, "fortran_order": order, "shape": shape}).encode().ljust(117) + b"\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content
    stream = io.BytesIO()
    np.savez(stream, **ours(train_x=None))
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train_x.npy", member)
    return stream.getvalue()


def saved(**changes):
    stream = io.BytesIO()
    np.savez(stream, **ours(**changes))
    return stream.getvalue()


def spoilt(name):
    """One byte of an array is changed: only the check sum of the zip tells."""
    content = bytearray(saved())
    at = content.index(ours()[name].tobytes()[:30])
    content[at + 5] ^= 1
    return bytes(content)


def encrypted():
    content = bytearray(saved())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := content.find(mark, at + 1)) >= 0:
            content[at + flags] |= 1
    return bytes(content)


X, Y = ours()["train_x"], ours()["train_y"]
NO = {  # what is given, and what the line says
    "no zip": (b"train_x", "cannot be read .*not a zip"),
    "an empty file": (b"", "cannot be read"),
    "a truncated zip": (saved()[:2000], "cannot be read .*not a zip"),
    "an array that was changed": (spoilt("train_x"), "train_x cannot be read .*CRC"),
    "labels that were changed": (spoilt("train_y"), "train_y cannot be read .*CRC"),
    "an encrypted zip": (encrypted(), "cannot be read .*encrypted"),
    "a zip of something else": (saved(**dict.fromkeys(ours()), a=np.zeros(1)), "no array train_x; it holds a: name"),
    "no labels": (ours(test_y=None), "no array test_y; it holds test_x, train_x, train_y"),
    "no test": (ours(test_x=None, test_y=None), "no array test_x"),
    "half a test, and a validation split": (ours(test_y=None, val_x=X, val_y=Y), "no array test_y"),
    "pixels that are pickled": (ours(train_x=np.array([X[0], X[1][:5]], dtype=object)), "train_x holds pickled obj"),
    "labels that are pickled": (ours(test_y=np.array([*"abcabc"], dtype=object)), "test_y holds pickled objects"),
    "names that are pickled": (ours(classes=np.array([*"abc"], dtype=object)), "classes holds pickled objects"),
    "a claim of more than there is": (archive((10**7, 1000, 1000, 3)), "longer or shorter than its header"),
    "a claim that no number holds": (archive((2**62, 2**62, 2**62)), "longer or shorter than its header"),
    "a claim of less than there is": (archive((8, 12, 12, 3), X.tobytes()), "longer or shorter than its header"),
    "a shape below nothing": (archive((-9, 12, 12, 3), X.tobytes()), "holds nothing"),
    "a number for a shape": (archive((), b"1"), "holds nothing, its shape being"),
    "no dtype": (archive((9, 12, 12, 3), X.tobytes(), "nonsense"), "train_x cannot be read"),
    "a dtype of no bytes": (archive((9, 12, 12, 3), b"", "|S0"), "train_x holds nothing"),
    "a header that is no header": (archive("__import__('os')", X.tobytes()), "train_x cannot be read"),
    "several images of volumes": (ours(train_x=np.zeros((9, 12, 12, 12), np.uint8)), r"\[9, 12, 12, 12\]: give \[N"),
    "channels first": (ours(train_x=X.transpose(0, 3, 1, 2)), r"train_x has the shape \[9, 3, 12, 12\]"),
    "transparency": (ours(test_x=np.zeros((6, 12, 12, 4), np.uint8)), r"test_x has the shape \[6, 12, 12, 4\]"),
    "flat pixels": (ours(train_x=X.reshape(9, -1)), r"train_x has the shape \[9, 432\]"),
    "pixels in [0, 1]": (ours(train_x=X / 255), "train_x is of float64: give whole numbers from 0 to 255"),
    "pixels of truth": (ours(train_x=X > 9), "train_x is of bool"),
    "pixels below 0": (ours(train_x=X.astype(int) - 1), "train_x has pixels from -1 to"),
    "pixels of 16 bits": (ours(test_x=ours()["test_x"].astype(np.uint16) * 257), "test_x has pixels from .* to 65535"),
    "pixels of text": (ours(train_x=X.astype("U3")), "train_x is of <U3"),
    "two sizes": (ours(test_x=np.zeros((6, 10, 14, 3), np.uint8)), "12×12 px and of 14×10 px: give --size"),
    "no image": (ours(test_x=X[:0], test_y=Y[:0]), r"test_x holds nothing, its shape being \[0, 12"),
    "fewer labels": (ours(train_y=Y[:-1]), "train_y has 8 labels, for 9 images"),
    "several labels": (ours(train_y=np.eye(3, dtype=int)[Y]), r"train_y has the shape \[9, 3\]: give one label"),
    "labels from 1 on": (ours(train_y=Y + 1, test_y=ours()["test_y"] + 1), "image of the train split has the label 0"),
    "a gap": (ours(train_y=Y * 2, test_y=ours()["test_y"] * 2), "no image of the train split has the label 1"),
    "a label that only the test has": (ours(test_y=np.arange(6)), "no image of the train split has the label 3"),
    "a label that the test has not": (ours(test_y=np.arange(6) % 2), "no image of the test split has the label 2"),
    "labels below 0": (ours(train_y=Y - 1), "train_y holds -1: give the numbers 0 to C-1"),
    "a huge label": (ours(train_y=Y.astype(np.uint64) + np.uint64(2**63)), "train_y holds 92233720368547758"),
    "a large label": (ours(train_y=Y * 10**9), "no image of the train split has the label 1"),
    "half a label": (ours(train_y=Y + 0.5), "train_y holds .*5: give the numbers"),
    "NaN": (ours(train_y=np.where(Y, Y, np.nan)), "train_y holds nan"),
    "infinity": (ours(train_y=np.where(Y, Y, -np.inf)), "train_y holds -inf"),
    "labels in words": (ours(train_y=Y.astype("U3")), "train_y is of <U"),
    "days as labels": (ours(train_y=Y.astype("M8[D]")), "train_y is of datetime64"),
    "one class": (ours(train_y=Y * 0, test_y=np.zeros(6, int)), "has one class: a dataset needs two or more"),
    "too few names": (ours(classes=np.array(["a", "b"])), "has the label 2, and names 2 classes"),
    "too many names": (ours(classes=np.array([*"abcd"])), "no image of the train split has the label 3"),
    "one name twice": (ours(classes=np.array([*"aba"])), "a name that is empty, or there twice"),
    "an empty name": (ours(classes=np.array(["a", "", "b"])), "a name that is empty, or there twice"),
    "names in rows": (ours(classes=np.array([[*"abc"]])), r"classes is of <U1, \[1, 3\]: give the name"),
    "names that are no text": (ours(classes=np.array([b"\xff", b"a", b"b"])), "classes cannot be read"),
}


@pytest.mark.parametrize("what", NO)
def test_wrong_arrays_are_one_line_and_leave_the_cache(what, add, root):
    content, message = NO[what]
    add(ours())
    before = contents(root)
    with pytest.raises(InputError, match=message) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        add(content, force=True)
    assert "\n" not in str(caught.value) and contents(root) == before


@pytest.mark.parametrize("shape, by_column, size, free, message", [
    ((9, 12, 12, 3), False, None, 3887, "9 images of 12×12 px need 0.0 GB of memory, and there are 0.0: give"),
    ((9, 900, 900, 3), True, 8, 5e6, "train_x needs 0.0 GB of memory at once, and there are fewer"),
    ((9, 2000, 900, 3), False, 8, 5e6, "train_x needs 0.0 GB of memory at once"),
    ((9, 900, 900, 3), False, 8, 5e6, None),
    ((9, 12, 12, 3), False, None, 3888, None),
])  # fmt: skip
def test_what_the_memory_has_no_room_for_is_refused(shape, by_column, size, free, message, add, root, monkeypatch):
    """Zeros that are packed to almost nothing. A few at a time, and made small, they may fit."""
    for module in (caches, arrays):
        monkeypatch.setattr(module, "free_memory", lambda: free)
    content = archive(shape, bytes(math.prod(shape)), order=by_column)
    if message is None:
        assert "9 train" in add(content, size=size)
        return
    with pytest.raises(InputError, match=message):
        add(content, size=size)
    assert not root.exists()
