"""Datasets: what is loaded is what was stored, and what is absent or damaged is one clear line."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from test_trees import plant

from bagssl import catalogue, data, trees
from bagssl.errors import InputError


def test_the_fingerprint_covers_pixels_labels_classes_and_shape():
    pixels, labels = torch.arange(96, dtype=torch.uint8).reshape(2, 3, 4, 4), torch.tensor([0, 1])
    images = data.Images(pixels, labels, ("a", "b"))
    changed = pixels.clone()
    changed[1, 2, 3, 3] ^= 1
    others = [
        data.Images(changed, labels, ("a", "b")),
        data.Images(pixels, labels.flip(0), ("a", "b")),
        data.Images(pixels, labels, ("a", "c")),
        data.Images(pixels.reshape(2, 3, 2, 8), labels, ("a", "b")),
        images.take(torch.tensor([1])),
    ]
    assert len({images.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert images.take(torch.tensor([0, 1])).fingerprint == images.fingerprint == images.to("cpu").fingerprint
    assert data.Images(pixels.mT.contiguous().mT, labels, ("a", "b")).fingerprint == images.fingerprint


def test_images_of_a_wrong_type_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        data.Images(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), ("a",))
    with pytest.raises(ValueError, match="labels"):
        data.Images(torch.zeros(2, 3, 4, 4).byte(), torch.zeros(3).long(), ("a",))


def test_synthetic_needs_no_cache(root):
    images = data.load("synthetic", "test", root)
    assert len(images) == 1000 and images.pixels.shape[1:] == (3, 32, 32) and len(images.classes) == 10
    assert data.available("synthetic", root) and not root.exists()
    assert "embedded" in trees.get("synthetic", root)


def test_status_lists_every_state(tree, root):
    trees.add("pets", tree, root=root)
    (root / "broken.safetensors").write_bytes(b"not a cache")
    rows = {row["name"]: row for row in catalogue.status(root)}
    known = ["synthetic", "synthetic-jpeg", "cifar10", "cifar100"]
    assert list(rows) == catalogue.names(root) == [*known, "broken", "pets"]
    assert {name: row["state"] for name, row in rows.items()} == {
        "synthetic": "embedded",
        "synthetic-jpeg": "embedded",
        "cifar10": "absent",
        "cifar100": "absent",
        "broken": "damaged",
        "pets": "ready",
    }
    assert (rows["pets"]["train"], rows["pets"]["test"], rows["pets"]["classes"]) == (9, 6, 3)
    assert rows["pets"]["size"] == "12×12" and str(tree) in rows["pets"]["source"]
    assert len({tuple(row) for row in rows.values()}) == 1


def test_cifar_classes_are_in_the_published_order():
    for name, (classes, counts) in catalogue.CIFAR.items():
        assert list(classes) == sorted(set(classes)) and len(classes) == int(name.removeprefix("cifar"))
        assert [len(classes) * counts[split] for split in data.SPLITS] == [50_000, 10_000]


# Caches that are absent or damaged


def flip_a_pixel(path):
    content = bytearray(path.read_bytes())
    content[-500] ^= 1
    path.write_bytes(content)


def flip_a_label(path):
    tensors, metadata = opened(path)
    tensors["train_labels"][0] = 2
    save_file(tensors, path, metadata)


def rename_a_class(path):
    tensors, metadata = opened(path)
    save_file(tensors, path, {"bagssl": metadata["bagssl"].replace('"owl"', '"elk"')})


def lose_a_split(path):
    tensors, metadata = opened(path)
    save_file({key: value for key, value in tensors.items() if "train" not in key}, path, metadata)


def lose_the_header(path):
    save_file(opened(path)[0], path)


def come_from_the_future(path):
    tensors, metadata = opened(path)
    save_file(tensors, path, {"bagssl": metadata["bagssl"].replace(catalogue.FORMAT, "bagssl-images-99")})


def opened(path):
    with catalogue.safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata()  # noqa: SIM118 - no dict


DAMAGE = [
    flip_a_pixel, flip_a_label, rename_a_class, lose_a_split, lose_the_header, come_from_the_future,
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(os.urandom(1000)),
    lambda path: path.write_bytes(pickle.dumps({"pixels": 1})),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_names_the_command_that_rebuilds_it(damage, tree, root):
    trees.add("pets", tree, root=root)
    sound = data.check("pets", root)
    path = root / "pets.safetensors"
    damage(path)
    for read in (lambda: data.check("pets", root), lambda: data.load("pets", "train", root)):
        with pytest.raises(
            InputError, match="pets.safetensors is damaged .*bagssl data add pets PATH"
        ) as caught:
            read()
        assert "\n" not in str(caught.value)
    trees.add("pets", tree, root=root)  # which needs no force
    assert data.check("pets", root) == sound


@pytest.mark.parametrize(
    "name, split, message",
    [
        ("cifar10", "train", "bagssl data get cifar10, or bagssl data add cifar10 PATH"),
        ("pets", "train", "add it by bagssl data add pets PATH"),
        ("../secrets", "train", "is not in"),
        ("synthetic", "validation", "unknown split 'validation'"),
    ],
)
def test_absent_data_is_never_replaced_by_other_data(name, split, message, root):
    with pytest.raises(InputError, match=message):
        data.load(name, split, root)
    assert not root.exists()


def test_what_is_said_of_made_data_without_making_it_is_so(monkeypatch):
    assert catalogue.MADE.keys() == catalogue.EMBEDDED.keys()
    for name, said in catalogue.MADE.items():
        images = {split: data.load(name, split) for split in data.SPLITS}
        assert {split: count for split, (count, _) in said["splits"].items()} == {k: len(v) for k, v in images.items()}
        assert all(digest == images[split].fingerprint for split, (_, digest) in said["splits"].items()
                   if digest != catalogue.DECODED)  # fmt: skip
        assert said["classes"] == len(images["train"].classes)
        assert said["size"] == "{2}×{3}".format(*images["train"].pixels.shape)
        assert catalogue.recorded(name) in (data.check(name), dict.fromkeys(data.SPLITS, catalogue.DECODED))
    assert catalogue.recorded("synthetic") == data.check("synthetic")
    monkeypatch.setitem(catalogue.EMBEDDED, "stripes", None)
    assert catalogue.recorded("stripes") is None and catalogue._about("stripes", None)["state"] == "embedded"


def test_what_a_cache_was_written_with_is_read_without_its_images(tmp_path, monkeypatch):
    trees.add("pets", plant(tmp_path / "tree"), root=tmp_path)
    assert catalogue.recorded("pets", tmp_path) == data.check("pets", tmp_path)
    for name, match in (("pats", "did you mean 'pets'"), ("../pets", "is not in")):
        with pytest.raises(InputError, match=match):
            catalogue.recorded(name, tmp_path)
    catalogue.cache("pets", tmp_path).write_bytes(b"damaged")
    with pytest.raises(InputError, match="is damaged"):
        catalogue.recorded("pets", tmp_path)


@pytest.mark.parametrize("words", ["list", "data list", "--help", "runs --help", "reproduce nothing", "--version"])
def test_what_computes_nothing_loads_no_torch(words):
    code = "import sys; from bagssl.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True,
                           check=False)
    assert ended.stdout.splitlines()[-1] == "False", ended.stderr


@pytest.mark.parametrize("side", [8, 150])
def test_gathering_is_index_select(side):
    pixels = torch.randint(256, (9, 3, side, side), dtype=torch.uint8)
    places, out = torch.tensor([8, 0, 0, 3]), torch.empty(4, 3, side, side, dtype=torch.uint8)
    assert torch.equal(data.gather(pixels, places), pixels.index_select(0, places))
    assert data.gather(pixels, places, out) is out and torch.equal(out, pixels[places])
    assert data.gather(pixels, places[:0]).shape == (0, 3, side, side)
    for wrong in (9, -1):
        with pytest.raises(IndexError, match="among 9 images"):
            data.gather(pixels, torch.tensor([0, wrong]))
