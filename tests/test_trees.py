"""Trees and downloads: the same images give the same cache, wrong input one clear line with the cache as it was."""

import hashlib
import io
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from bagssl import caches, catalogue, cli, data, pictures, trees
from bagssl.errors import InputError

CLASSES = ("cat", "dog", "owl")


def picture(seed, height=12, width=12):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def plant(tree, classes=CLASSES, train=3, test=2, height=12, width=12, suffix="png"):
    """A class-folder tree of small pictures, all different."""
    for s, (split, count) in enumerate({"train": train, "test": test}.items()):
        for c, name in enumerate(classes):
            (tree / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(picture([s, c, i], height, width))
                image.save(tree / split / name / f"{i}.{suffix}")
    return tree


def contents(folder):
    """The bytes of every file below a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small_cifar(monkeypatch):
    """cifar10 with 2 train images and 1 test image of each class."""
    monkeypatch.setitem(catalogue.CIFAR, "cifar10", (catalogue.CIFAR["cifar10"][0], {"train": 2, "test": 1}))


def test_a_tree_comes_back_pixel_by_pixel(tree, root):
    line = trees.add("pets", tree, root=root)
    assert "9 train and 6 test images of 12×12 px in 3 classes" in line
    train, test = data.load("pets", "train", root), data.load("pets", "test", root)
    assert train.pixels.shape == (9, 3, 12, 12) and train.pixels.dtype == torch.uint8 and len(test) == 6
    assert train.classes == test.classes == CLASSES
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for c in range(3):
        found = {image.permute(1, 2, 0).numpy().tobytes() for image in train.pixels[train.labels == c]}
        assert found == {picture([0, c, i]).tobytes() for i in range(3)}


def test_names_and_order_of_files_do_not_matter(tree, root, tmp_path):
    trees.add("pets", tree, root=root)
    for c in CLASSES:
        files = sorted((tree / "train" / c).iterdir())
        for i, file in enumerate(files):
            file.rename(file.with_name(f"renamed-{len(files) - i}.png"))
    trees.add("again", tree, root=root)
    assert data.check("again", root) == data.check("pets", root)


# What an image may be


def one_image(path, root, size=None):
    """The pixels [H, W, 3] that `add` makes of one file, put in place of every image of a small tree."""
    tree = path.parent / "one"
    for split in data.SPLITS:
        for name in ("a", "b"):
            (tree / split / name).mkdir(parents=True)
            (tree / split / name / path.name).write_bytes(path.read_bytes())
    trees.add("one", tree, size=size, root=root)
    return data.load("one", "train", root).pixels[0].permute(1, 2, 0).numpy()


def made_of(mode):
    """An image of a mode, and the RGB that it stands for."""
    rgb = Image.fromarray(picture(7))
    grey = rgb.convert("L")
    if mode == "I;16":
        deep = np.asarray(grey).astype(np.uint16) * 257
        return Image.fromarray(deep), grey.convert("RGB")
    if mode == "P with transparency":
        image = Image.fromarray(np.arange(144, dtype=np.uint8).reshape(12, 12) % 3, "P")
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        image.info["transparency"] = 0
        colours = np.array([[255, 255, 255], [0, 255, 0], [0, 0, 255]], np.uint8)
        return image, Image.fromarray(colours[np.arange(144).reshape(12, 12) % 3])
    if mode == "RGBA":
        image = rgb.convert("RGBA")
        image.putalpha(0)
        return image, Image.new("RGB", rgb.size, "white")
    image = rgb.convert(mode)
    return image, image.convert("RGB")


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "I;16", "P with transparency"])
def test_every_mode_becomes_rgb(mode, tmp_path, root):
    image, expected = made_of(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path, **({"transparency": 0} if "with" in mode else {}))
    np.testing.assert_array_equal(one_image(path, root), np.asarray(expected))


def test_sixteen_bits_of_grey_keep_their_upper_eight(tmp_path, root):
    """Pillow opens a PGM of 16 bits as one of 32, of which 16 are used; its older versions a PNG as well."""
    grey = picture(7)[:, :, 0]
    header = f"P5 {grey.shape[1]} {grey.shape[0]} 65535\n".encode()
    (tmp_path / "image.pgm").write_bytes(header + (grey.astype(">u2") * 257).tobytes())
    expected = np.repeat(grey[:, :, None], 3, 2)
    np.testing.assert_array_equal(one_image(tmp_path / "image.pgm", root), expected)
    deep = Image.fromarray(grey.astype(np.int32) * 257)
    np.testing.assert_array_equal(np.asarray(pictures.rgb(deep, "PNG")), expected)
    with pytest.raises(ValueError, match="32 bits"):
        pictures.rgb(deep, "TIFF")


EXIF = {0x0112: 6, 0x011A: 72.0, 0x0131: "camera", 0x8769: {0x9003: "2020:01:01 00:00:00", 0x829A: 0.01}}


@pytest.mark.parametrize("field", ["whole", "value out of range", "type that does not exist", "count too large",
                                   "offset beyond the end", "cut short", "no header"])
def test_a_sound_picture_with_odd_exif_is_read(field, tmp_path, root):
    """Its pixels are those of the file; turned where the orientation can still be read."""
    exif = Image.Exif()
    for tag, value in EXIF.items():
        exif[tag] = value
    content = bytearray(exif.tobytes())
    start = content.index(b"MM" if b"MM" in content else b"II") + 10  # the first entry: tag, type, count, value
    if field == "value out of range":
        content[start + 8 : start + 10] = b"\xff\xff"
    elif field == "type that does not exist":
        content[start + 2 : start + 4] = b"\xee\xee"
    elif field == "count too large":
        content[start + 4 : start + 8] = b"\xff" * 4
    elif field == "offset beyond the end":
        content[start + 12 + 8 : start + 12 + 12] = b"\xff" * 4
    elif field == "cut short":
        content = content[:start]
    elif field == "no header":
        content[6:10] = b"????"
    Image.fromarray(picture(1, 8, 12)).save(tmp_path / "image.png", exif=bytes(content))
    found, turned = one_image(tmp_path / "image.png", root), np.rot90(picture(1, 8, 12), -1)
    sound = field in ("whole", "offset beyond the end")
    assert np.array_equal(found, turned if found.shape == turned.shape else picture(1, 8, 12))
    assert not sound or found.shape == turned.shape


def png(depth, kind, row, transparent):
    """A PNG of one row, 4 px wide, whose colour type has a transparent colour."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 4, 1, depth, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def tiff(bits, white, content):
    """A grey TIFF of one row, 4 px wide; white: 0 where zero is white, else 1."""
    tags = {256: 4, 257: 1, 258: bits, 259: 1, 262: white, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 1, 279: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + content


GREYS = {  # a file of four greys, and the four that it shows
    "PNG, 16 bits, one transparent": (png(16, 0, struct.pack(">4H", 0, 1, 2**15, 2**16 - 1), b"\0\0"),
                                      [255, 0, 128, 255]),
    "PNG, 4 bits, one transparent": (png(4, 0, b"\x05\xaf", b"\0\5"), [0, 255, 170, 255]),
    "PNG, 2 bits, one transparent": (png(2, 0, b"\x1b", b"\0\1"), [0, 255, 170, 255]),
    "PNG, 8 bits, one transparent": (png(8, 0, bytes([1, 2, 3, 4]), b"\0\2"), [1, 255, 3, 4]),
    "PNG, 1 bit, one transparent": (png(1, 0, b"\x50", b"\0\0"), [255, 255, 255, 255]),
    "TIFF, 16 bits": (tiff(16, 1, struct.pack("<4H", 0, 1, 0x8000, 0xFFFF)), [0, 0, 128, 255]),
    "TIFF, 16 bits, zero is white": (tiff(16, 0, struct.pack("<4H", 0, 1, 0x8000, 0xFFFF)), [255, 255, 127, 0]),
    "TIFF, 12 bits": (tiff(12, 1, bytes.fromhex("000010800fff")), [0, 1, 128, 255]),
    "TIFF, 8 bits, zero is white": (tiff(8, 0, bytes([0, 1, 128, 255])), [255, 254, 127, 0]),
    "PGM, 10 bits": (b"P5 4 1 1023\n" + struct.pack(">4H", 0, 3, 512, 1023), [0, 0, 128, 255]),
}  # fmt: skip


@pytest.mark.parametrize("kind", GREYS)
def test_a_grey_is_as_light_as_it_was_meant(kind, tmp_path, root):
    content, greys = GREYS[kind]
    (tmp_path / "image").write_bytes(content)
    assert one_image(tmp_path / "image", root).tolist() == [[[grey] * 3 for grey in greys]]


def test_a_transparent_colour_of_sixteen_bits_is_refused(tmp_path, root):
    (tmp_path / "image.png").write_bytes(png(16, 2, bytes(24), bytes(6)))
    with pytest.raises(InputError, match="one of its 16-bit colours is transparent: save it with an alpha channel"):
        one_image(tmp_path / "image.png", root)


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_a_tiff_is_turned_once(turn, compression, mode, tmp_path):
    """Pillow turns a grey one that it maps into memory as if it had the size that it has when turned."""
    exif = Image.Exif()
    exif[0x0112] = turn
    pixels = picture(1, 8, 12) if mode == "RGB" else picture(1, 8, 12)[:, :, 0]
    image = Image.fromarray(pixels.astype(np.uint16) * 256 if mode == "I;16" else pixels)
    image.save(tmp_path / "image.tif", exif=exif, compression=compression)
    expected = [None, lambda x: x, np.fliplr, lambda x: np.rot90(x, 2), np.flipud, lambda x: np.rot90(np.flipud(x), -1),
                lambda x: np.rot90(x, -1), lambda x: np.rot90(np.fliplr(x), -1), np.rot90][turn](pixels)  # fmt: skip
    found = pictures.read(tmp_path / "image.tif", None).transpose(1, 2, 0)
    np.testing.assert_array_equal(found, np.broadcast_to(expected.reshape(*expected.shape[:2], -1), found.shape))


SAVED = {"a bitmap of 1 bit": ("1", "BMP", {}), "inverted CMYK": ("CMYK", "JPEG", {"quality": 100}),
         "pages of a TIFF": ("RGB", "TIFF", {"save_all": True, "append_images": [Image.new("RGB", (9, 7))]}),
         "two views of a camera": ("RGB", "MPO", {"save_all": True, "append_images": [Image.new("RGB", (9, 7))]}),
         "one colour for four pixels": ("RGB", "JPEG", {"subsampling": "4:1:1", "quality": 95}),
         "WebP": ("RGB", "WEBP", {"lossless": True}), "a colour profile": ("RGB", "PNG", {"icc_profile": b"odd"})}


@pytest.mark.parametrize("kind", SAVED)
def test_what_cameras_and_programs_write_is_read(kind, tmp_path, root):
    """An odd size, a suffix in capitals; JPEG may be a little off."""
    mode, form, options = SAVED[kind]
    colour = (255, 255, 255) if mode == "1" else (200, 30, 60)
    Image.new("RGB", (9, 7), colour).convert(mode).save(tmp_path / f"IMAGE.{form}", form, **options)
    found = one_image(tmp_path / f"IMAGE.{form}", root)
    assert found.shape == (7, 9, 3) and np.abs(found.astype(int) - colour).max() <= 3


def test_splits_may_have_capitals_and_lists_beside_them(tree, root):
    trees.add("pets", tree, root=root)
    (tree / "train").rename(tree / "Train")
    (tree / "test").rename(tree / "TEST")
    (tree / "train.txt").write_text("cat/0.png")
    (tree / "list.txt").symlink_to("/etc/hostname")
    assert "nothing to do" in trees.add("pets", tree, root=root)
    (tree / "train").mkdir()  # where both are there, small letters count
    with pytest.raises(InputError, match="the class 'cat' is in .*TEST but not in .*train"):
        trees.add("pets", tree, root=root)


@pytest.mark.parametrize("second", ["val", "valid", "validation"])
def test_the_second_split_may_be_called_as_imagenets_is(second, tmp_path, root):
    tree = plant(tmp_path / "tree")
    trees.add("one", tree, root=root)
    (tree / "test").rename(tree / second)
    trees.add("other", tree, root=root)
    assert data.check("one", root) == data.check("other", root)
    shutil.copytree(plant(tmp_path / "another", test=1) / "test", tree / "test")  # where there is one, it is taken
    trees.add("third", tree, root=root)
    assert len(data.load("third", "test", root)) == len(CLASSES)


def test_a_letter_is_one_letter_in_whatever_codes(tmp_path, root):
    tree = plant(tmp_path / "tree", classes=("caf\u00e9", "tea"))
    trees.add("one", tree, root=root)
    (tree / "test" / "caf\u00e9").rename(tree / "test" / "cafe\u0301")
    trees.add("other", tree, root=root)
    assert data.check("one", root) == data.check("other", root)
    assert data.load("other", "test", root).classes == ("caf\u00e9", "tea")


def test_orientation_is_applied(tmp_path, root):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to view
    Image.fromarray(picture(1, 8, 12)).save(tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(one_image(tmp_path / "image.png", root), np.rot90(picture(1, 8, 12), -1))


def test_of_an_animation_the_first_picture_is_read(tmp_path, root):
    first, *others = (Image.fromarray(picture(seed)).convert("L") for seed in range(3))
    first.save(tmp_path / "image.gif", save_all=True, append_images=others)
    with Image.open(tmp_path / "image.gif") as image:
        assert image.n_frames == 3
    np.testing.assert_array_equal(one_image(tmp_path / "image.gif", root), np.asarray(first.convert("RGB")))


def test_one_pixel_is_an_image(tmp_path, root):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "image.png")
    assert one_image(tmp_path / "image.png", root).tolist() == [[[1, 2, 3]]]
    assert "nothing to do" not in trees.add("one-of-eight", tmp_path / "one", size=8, root=root)
    pixels = data.load("one-of-eight", "test", root).pixels
    assert pixels.shape == (2, 3, 8, 8) and (pixels == torch.tensor([1, 2, 3]).view(3, 1, 1)).all()


@pytest.mark.parametrize("height, width", [(40, 20), (20, 40), (20, 20)])
def test_size_takes_the_centred_square_antialiased(height, width, tmp_path, root):
    """Stripes one pixel wide become even grey, and of the red ends nothing is left but the kernel's reach."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, ::2] = 200
    top, left = (height - 20) // 2, (width - 20) // 2
    ends = np.ones((height, width), bool)
    ends[top : top + 20, left : left + 20] = False
    pixels[ends] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    small = one_image(tmp_path / "image.png", root, size=10).astype(int)
    assert small.shape == (10, 10, 3)
    assert np.abs(small[2:-2, 2:-2] - 100).max() <= 2
    assert np.ptp(small, axis=2).mean() < 20


def test_size_of_the_image_itself_changes_nothing(tmp_path, root):
    Image.fromarray(picture(3)).save(tmp_path / "image.png")
    np.testing.assert_array_equal(one_image(tmp_path / "image.png", root, size=12), picture(3))


def test_size_brings_mixed_sizes_to_one(tree, root):
    Image.fromarray(picture(9, 30, 20)).save(tree / "test" / "owl" / "large.jpg")
    trees.add("pets", tree, size=8, root=root)
    assert data.load("pets", "test", root).pixels.shape == (7, 3, 8, 8)


def test_what_file_managers_leave_behind_is_no_image(tree, root):
    trees.add("pets", tree, root=root)
    for path in (tree / ".DS_Store", tree / "train" / ".DS_Store", tree / "train" / "cat" / "Thumbs.db"):
        path.write_bytes(b"junk")
    assert "nothing to do" in trees.add("pets", tree, root=root)


def test_any_name_of_a_folder_or_file_will_do(tmp_path, monkeypatch, capsys):
    """Spaces, quotes, line breaks, wildcards, and in the tree bytes that are no text."""
    names = sorted(["a b", "Zoë's \"pets\"", "new\nline", "*[a]", "-n", os.fsdecode(b"\xff\xfe")])
    tree = tmp_path / os.fsdecode(b"of \xff\nto day")
    plant(tree, names, suffix=os.fsdecode(b"\xff\n.png"))
    monkeypatch.setenv("BAGSSL_DATA", str(tmp_path.joinpath(*names[:-1])))
    assert len(trees.add("pets", tree).encode().splitlines()) == 1
    assert data.load("pets", "test").classes == tuple(names) and data.check("pets")
    assert cli.main(["data", "list"]) == 0
    assert len(capsys.readouterr().out.encode().splitlines()) == 1 + len(catalogue.names())
    (tree / "train" / names[0] / os.fsdecode(b"\xfe\n.png")).write_bytes(b"")
    assert cli.main(["data", "add", "more", str(tree)]) == 2
    assert len(capsys.readouterr().err.encode().splitlines()) == 1


def test_links_inside_the_tree_are_followed(tree, root):
    (tree / "test" / "cat" / "link.png").symlink_to(tree / "train" / "cat" / "0.png")
    trees.add("pets", tree, root=root)
    assert len(data.load("pets", "test", root)) == 7


@pytest.mark.parametrize("what", ["", "test", "train/cat", "test/owl/1.png", "train/dog/0.png hard"])
def test_links_out_of_the_tree_are_followed_where_that_is_asked_for(what, tree, root, tmp_path, monkeypatch, capsys):
    """A split, a class, an image; the tree itself may be a link, and an image a hard link, as they are."""
    trees.add("pets", tree, root=root)
    place, hard, _ = what.partition(" hard")
    outside = tmp_path / "outside"
    (tree / place).rename(outside)
    os.link(outside, tree / place) if hard else (tree / place if place else tree).symlink_to(outside)
    monkeypatch.setenv("BAGSSL_DATA", str(root))
    free = not place or hard
    assert cli.main(["data", "add", "pets", str(tree)]) == (0 if free else 2)
    said = "links out of the tree: put the files themselves there, or give --follow-links"
    assert free or said in capsys.readouterr().err
    assert cli.main(["data", "add", "pets", str(tree), "--follow-links"]) == 0
    assert "nothing to do" in capsys.readouterr().out


# What is wrong: how the tree is spoilt, and what the line says


def no_tree(tree):
    return {"path": tree / "nowhere"}, "nowhere is not a folder"


def a_file_for_a_tree(tree):
    (tree / "x.tar").write_bytes(b"")
    return {"path": tree / "x.tar"}, "x.tar is not a folder"


def no_test_split(tree):
    (tree / "test").rename(tree / "testing")
    return {}, "has no folder test"


def one_class_in_two_spellings(tree):
    for split in data.SPLITS:
        shutil.copytree(tree / split / "cat", tree / split / "e\u0301")
        (tree / split / "cat").rename(tree / split / "\u00e9")
    return {}, "has the class '\u00e9' twice, in two spellings"


def empty_tree(tree):
    for split in data.SPLITS:
        (tree / split).rename(tree / f"old-{split}")
        (tree / split).mkdir()
    return {}, "fewer than two class folders, 0"


def one_class(tree):
    for split in data.SPLITS:
        for name in ("dog", "owl"):
            (tree / split / name).rename(tree / f"{split}-{name}")
    return {}, "fewer than two class folders, 1"


def class_missing_in_test(tree):
    (tree / "test" / "dog").rename(tree / "dog")
    return {}, "the class 'dog' is in"


def class_missing_in_train(tree):
    (tree / "train" / "owl").rename(tree / "owl")
    return {}, "the class 'owl' is in"


def empty_class(tree):
    for file in (tree / "test" / "cat").iterdir():
        file.unlink()
    return {}, "cat has no images"


def image_outside_the_classes(tree):
    (tree / "train" / "cat" / "0.png").rename(tree / "train" / "0.png")
    return {}, "0.png lies outside the class folders"


def folder_in_a_class(tree):
    (tree / "train" / "cat" / "more").mkdir()
    return {}, "more is no file"


def text_file(tree):
    (tree / "train" / "cat" / "labels.txt").write_text("0.png cat")
    return {}, "labels.txt cannot be read as an image"


def empty_image(tree):
    (tree / "train" / "cat" / "1.png").write_bytes(b"")
    return {}, "1.png cannot be read as an image"


def truncated_image(tree):
    path = tree / "test" / "owl" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    return {}, "1.png cannot be read as an image"


def damaged_image(tree):
    path = tree / "test" / "owl" / "1.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return {}, "1.png cannot be read as an image"


def truncated_jpeg(tree):
    path = tree / "test" / "owl" / "1.jpg"
    Image.fromarray(picture(1)).save(path)
    path.write_bytes(path.read_bytes()[:-60])
    return {}, "1.jpg cannot be read as an image"


def several_that_are_no_images(tree):
    for place in ("train/cat/notes.txt", "train/dog/1.png", "test/owl/1.png"):
        (tree / place).write_bytes(b"no picture")
    others = r"nor can 2 more \(train/dog/1.png, test/owl/1.png\): replace or remove them, or leave them out by --skip-"
    return {}, f"notes.txt cannot be read as an image .*, {others}"


def floating_point_image(tree):
    Image.fromarray(np.zeros((12, 12), np.float32)).save(tree / "train" / "cat" / "depth.tif")
    return {}, "its pixels have 32 bits"


def decompression_bomb(tree):
    Image.new("1", (11_000, 11_000)).save(tree / "train" / "cat" / "bomb.png")
    return {}, "bomb.png cannot be read as an image"


def mixed_sizes(tree):
    Image.fromarray(picture(1, 12, 16)).save(tree / "test" / "owl" / "wide.png")
    return {}, "12×12 px and .*wide.png with 16×12 px: give --size"


def link_out_of_the_tree(tree):
    outside = tree.parent / "secret.png"
    Image.fromarray(picture(1)).save(outside)
    (tree / "train" / "cat" / "link.png").symlink_to(outside)
    return {}, "link.png links out of the tree"


def folder_link_out_of_the_tree(tree):
    (tree / "test" / "owl").rename(tree.parent / "owl")
    (tree / "test" / "owl").symlink_to(tree.parent / "owl")
    return {}, "owl links out of the tree"


def split_link_out_of_the_tree(tree):
    (tree / "test").rename(tree.parent / "test")
    (tree / "test").symlink_to(tree.parent / "test")
    return {}, "test links out of the tree"


def dangling_link(tree):
    (tree / "test" / "owl" / "gone.png").symlink_to(tree / "nowhere.png")
    return {}, "gone.png is a link that leads nowhere .No such file.*mend or remove it"


def link_to_itself(tree):
    (tree / "test" / "owl" / "loop.png").symlink_to(tree / "test" / "owl" / "loop.png")
    return {}, "loop.png is a link that leads nowhere .*mend or remove it"


def class_that_is_gone(tree):
    shutil.rmtree(tree / "test" / "owl")
    (tree / "test" / "owl").symlink_to(tree / "nowhere")
    return {"follow_links": True}, "owl is a link that leads nowhere .No such file.*mend or remove it"


def split_that_is_gone(tree):
    shutil.rmtree(tree / "test")
    (tree / "test").symlink_to(tree / "nowhere")
    return {"follow_links": True}, "test is a link that leads nowhere"


def links_in_a_circle(tree):
    (tree / "train" / "cat" / "a.png").symlink_to(tree / "train" / "cat" / "b.png")
    (tree / "train" / "cat" / "b.png").symlink_to(tree / "train" / "cat" / "a.png")
    return {"follow_links": True}, "a.png is a link that leads nowhere .Too many levels.*mend or remove it"


def class_that_is_the_tree(tree):
    (tree / "train" / "zoo").symlink_to(tree)
    (tree / "test" / "zoo").symlink_to(tree)
    return {"follow_links": True}, "zoo/test is no file: images lie directly"


def link_to_a_folder_in_a_class(tree):
    (tree.parent / "more").mkdir()
    (tree / "train" / "cat" / "more").symlink_to(tree.parent / "more")
    return {"follow_links": True}, "more is no file: images lie directly in their class folder"


def link_to_a_device(tree):
    (tree / "train" / "cat" / "zero.png").symlink_to("/dev/zero")
    return {"follow_links": True}, "zero.png is no file but a device or a pipe"


def link_to_a_pipe(tree):
    os.mkfifo(tree.parent / "pipe")
    (tree / "train" / "cat" / "pipe.png").symlink_to(tree.parent / "pipe")
    return {"follow_links": True}, "pipe.png is no file but a device or a pipe"


def pipe(tree):
    os.mkfifo(tree / "train" / "cat" / "pipe.png")
    return {}, "pipe.png is no file but a device or a pipe"


def pipe_for_a_tree(tree):
    os.mkfifo(tree.parent / "pipe.npz")
    return {"path": tree.parent / "pipe.npz"}, "pipe.npz is not a folder, nor a file"


def name_with_a_line_break(tree):
    (tree / "train" / "cat" / "a\nb.png").write_bytes(b"")
    return {}, "a b.png cannot be read"


def name_in_capitals(tree):
    return {"name": "Pets"}, "'Pets' cannot name a dataset"


def name_that_is_a_path(tree):
    return {"name": "../pets"}, "cannot name a dataset"


def empty_name(tree):
    return {"name": ""}, "cannot name a dataset"


def name_with_a_line_break_at_its_end(tree):
    return {"name": "pets\n"}, "cannot name a dataset"


def reserved_name(tree):
    return {"name": "synthetic"}, "belongs to embedded data"


def size_of_nothing(tree):
    return {"size": 0}, "--size is 0"


def size_beyond_reason(tree):
    return {"size": 100_000}, "--size is 100000"


def size_in_words(tree):
    return {"size": "64"}, "--size is '64'"


def other_content(tree):
    Image.fromarray(picture(99)).save(tree / "test" / "owl" / "new.png")
    return {}, "holds other images: .*--force"


def cifar_of_other_classes(tree):
    return {"name": "cifar10"}, "cifar10 has 10 classes"


def cifar_of_another_size(tree):
    return {"name": "cifar10", "size": 64}, "cifar10 has images of 32×32 px"


ACTS = [
    no_tree, a_file_for_a_tree, no_test_split, one_class_in_two_spellings, empty_tree, one_class, class_missing_in_test,
    class_missing_in_train, empty_class, image_outside_the_classes, folder_in_a_class, text_file,
    empty_image, truncated_image, damaged_image, truncated_jpeg, several_that_are_no_images, floating_point_image,
    decompression_bomb, mixed_sizes, link_out_of_the_tree, folder_link_out_of_the_tree, split_link_out_of_the_tree,
    dangling_link, link_to_itself, class_that_is_gone, split_that_is_gone, links_in_a_circle, class_that_is_the_tree,
    link_to_a_folder_in_a_class, link_to_a_device, link_to_a_pipe, pipe, pipe_for_a_tree, name_with_a_line_break,
    name_in_capitals, name_that_is_a_path, empty_name, name_with_a_line_break_at_its_end, reserved_name,
    size_of_nothing, size_beyond_reason, size_in_words, other_content, cifar_of_other_classes, cifar_of_another_size,
]  # fmt: skip


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_wrong_input_is_one_line_and_leaves_the_cache(act, tree, root):
    trees.add("pets", tree, root=root)
    before = contents(root)
    changes, message = act(tree)
    with pytest.raises(InputError, match=message) as caught:
        trees.add(**{"name": "pets", "path": tree, "root": root} | changes)
    assert "\n" not in str(caught.value)
    assert contents(root) == before


def test_the_same_content_twice_changes_nothing(tree, root):
    trees.add("pets", tree, root=root)
    before, inode = contents(root), (root / "pets.safetensors").stat().st_ino
    assert "nothing to do" in trees.add("pets", tree, root=root)
    assert contents(root) == before and (root / "pets.safetensors").stat().st_ino == inode


def test_force_replaces_other_content(tree, root):
    trees.add("pets", tree, root=root)
    other_content(tree)
    trees.add("pets", tree, root=root, force=True)
    assert len(data.load("pets", "test", root)) == 7


def test_an_interrupt_leaves_the_cache(tree, root, monkeypatch):
    trees.add("pets", tree, root=root)
    before = contents(root)
    other_content(tree)

    def interrupt(*_):
        raise KeyboardInterrupt

    for module, name in ((caches, "blocks"), (caches, "canonical"), (caches, "_write"), (pictures, "read")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, interrupt)
            trees.add("pets", tree, root=root, force=True)
        assert contents(root) == before


def test_a_full_disk_is_one_line(tree, root, monkeypatch):
    def full(pixels, order):
        yield pixels[:1]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caches, "blocks", full)
    with pytest.raises(InputError, match="cannot be written .*No space left"):
        trees.add("pets", tree, root=root)
    assert contents(root) == {}


# What it takes


def test_the_cache_is_to_the_byte_what_the_library_writes(tree, root):
    """And what it was when the library wrote it: the SHA-256 of both splits, and of all but the header."""
    trees.add("pets", tree, root=root)
    content = (root / "pets.safetensors").read_bytes()
    images = {split: data.load("pets", split, root) for split in data.SPLITS}
    tensors = {f"{split}_{kind}": getattr(images[split], kind)
               for split in data.SPLITS for kind in ("pixels", "labels")}  # fmt: skip
    with catalogue.safe_open(root / "pets.safetensors", framework="pt") as file:
        assert content == save(tensors, file.metadata())
    body = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert [*(image.fingerprint for image in images.values()), body] == [
        "c8549b72f66b96d5239574da62177aa86bfc5b8525adfc20296a9ee45076ac40",
        "d1de6393035d844a3381172a171e7bdb4b23b2b2e638c093937fed38be521d3f",
        "2c4a33ffb605d6a6c15a3176aad0dff59d8af7eecdf3fe4621cb7eec0c50f0d9"]  # fmt: skip


MEASURED = """import sys
from pathlib import Path
from bagssl import data, trees
def memory(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[which].split()[0]) * 1024
root = Path(sys.argv[2])
trees.add("small", sys.argv[3], root=root)  # what comes with the first picture, code and buffers, is no dataset's
for work in (lambda: trees.add("large", sys.argv[1], root=root), lambda: trees.add("large", sys.argv[1], root=root),
             lambda: data.load("large", "train", root), lambda: data.check("large", root)):
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    kept = work()
    print(memory("VmHWM") - before)
    del kept"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not count the peak")
@pytest.mark.parametrize("kind", ["pictures", "arrays"])
def test_a_dataset_is_never_twice_in_memory(kind, tmp_path):
    """Added, added again, loaded and checked in a process of its own: the peak above what it had."""
    side, counts = 1000, {"train": 50, "test": 20}
    if kind == "pictures":
        Image.fromarray(picture(0, side, side)).save(tmp_path / "one.bmp")
        for split, count in counts.items():
            for i in range(count):
                (tmp_path / "large" / split / str(i % 2)).mkdir(parents=True, exist_ok=True)
                os.link(tmp_path / "one.bmp", tmp_path / "large" / split / str(i % 2) / f"{i}.bmp")
        path = tmp_path / "large"
    else:
        path = tmp_path / "large.npz"
        np.savez(path, **{f"{split}_x": np.full((count, side, side), 7, np.uint8) for split, count in counts.items()},
                 **{f"{split}_y": np.arange(count) % 2 for split, count in counts.items()})
    small = plant(tmp_path / "small", height=side, width=side, suffix="bmp")
    done = subprocess.run([sys.executable, "-c", MEASURED, str(path), str(tmp_path / "data"), str(small)], check=True,
                          capture_output=True, text=True, cwd=Path(data.__file__).parent.parent)
    peaks = [int(line) / (3 * side**2 * sum(counts.values())) for line in done.stdout.split()]
    assert len(peaks) == 4 and max(peaks) < 1.25 and min(peaks) > 0.5, peaks


# CIFAR


def served(name, split, folder):
    """What the archive holds: the pictures that `plant` saves, in another order."""
    s, count = (0, 2) if split == "train" else (1, 1)
    keys = [(s, c, i) for i in reversed(range(count)) for c in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
    pixels = np.stack([picture(list(key), 32, 32) for key in keys]).transpose(0, 3, 1, 2)
    return torch.from_numpy(pixels.copy()), torch.tensor([c for _, c, _ in keys])


def test_get_and_add_give_the_same_data(small_cifar, tmp_path, root, monkeypatch):
    monkeypatch.setattr(trees, "_download", served)
    assert "20 train and 10 test images of 32×32 px" in trees.get("cifar10", root)
    assert [path.name for path in root.iterdir()] == ["cifar10.safetensors"]
    tree = plant(tmp_path / "cifar", catalogue.CIFAR["cifar10"][0], 2, 1, 32, 32)
    assert "nothing to do" in trees.add("cifar10", tree, root=root)
    trees.add("cifar10", tree, root=tmp_path / "other")
    assert data.check("cifar10", tmp_path / "other") == data.check("cifar10", root)


def test_get_leaves_a_sound_cache_alone(small_cifar, tmp_path, root, monkeypatch):
    trees.add("cifar10", plant(tmp_path / "cifar", catalogue.CIFAR["cifar10"][0], 2, 1, 32, 32), root=root)
    monkeypatch.setattr(trees, "_download", lambda *_: pytest.fail("downloaded"))
    assert "nothing to do" in trees.get("cifar10", root)


@pytest.mark.parametrize("failure", [OSError("Network is unreachable"), RuntimeError("File corrupted.")])
def test_get_offline_names_the_other_way(failure, small_cifar, tmp_path, root, monkeypatch):
    trees.add("cifar10", plant(tmp_path / "cifar", catalogue.CIFAR["cifar10"][0], 2, 1, 32, 32), root=root)
    before = contents(root)

    def fail(name, split, folder):
        (tmp_path / "data").joinpath(folder, "half.tar.gz").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(trees, "_download", fail)
    with pytest.raises(InputError, match="bagssl data add cifar10 PATH") as caught:
        trees.get("cifar10", root, force=True)
    assert "\n" not in str(caught.value) and contents(root) == before


def test_a_silent_server_is_left_after_the_timeout(root, monkeypatch):
    """torchvision's own downloader against a socket that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(trees, "DOWNLOAD_TIMEOUT", 0.2)
        monkeypatch.setattr(
            "torchvision.datasets.CIFAR10.url", f"http://127.0.0.1:{server.getsockname()[1]}/c"
        )
        for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(proxy, raising=False)
        with pytest.raises(InputError, match="could not be downloaded .*timed out"):
            trees.get("cifar10", root)
    assert socket.getdefaulttimeout() is None and list(root.iterdir()) == []


@pytest.fixture
def site(monkeypatch):
    """A server that answers whatever it is asked for with `site.answer(request)`, and counts; cifar10 is there."""
    class Request(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked += 1
            server.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Request) as server:
        server.asked, server.where = 0, f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        for proxy in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            monkeypatch.delenv(proxy, raising=False)
            monkeypatch.delenv(proxy.upper(), raising=False)
        monkeypatch.setattr("urllib.request._opener", None)  # which would remember the proxies of an earlier request
        monkeypatch.setattr("torchvision.datasets.CIFAR10.url", f"{server.where}/cifar-10-python.tar.gz")
        yield server
        server.shutdown()


def answer(content, length=None, code=200):
    def send(request):
        request.send_response(code)
        request.send_header("Content-Length", str(length or len(content)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content)

    return send


def archive(**what):
    """A tar.gz with one member; `what` changes its header."""
    member, stream = tarfile.TarInfo("cifar-10-batches-py/data_batch_1"), io.BytesIO()
    content = what.pop("content", b"")
    for name, value in {"size": len(content), **what}.items():
        setattr(member, name, value)
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


ANSWERS = {
    "a page in place of the data": answer(b"<html>Please log in</html>"),
    "the page of a proxy": answer(b"<html>Please log in</html>"),
    "an error": answer(b"gone", code=404),
    "a truncated archive": answer(archive(content=os.urandom(5000))[:2000], 170_498_071),
    "another archive": answer(archive(content=b"other")),
    "a path out of the tree": answer(archive(name="../../escaped", content=b"x")),
    "an absolute path": answer(archive(name="/tmp/bagssl-escaped", content=b"x")),
    "a symbolic link": answer(archive(name="escaped", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "a hard link": answer(archive(name="escaped", type=tarfile.LNKTYPE, linkname="../../../etc/passwd")),
    "a device": answer(archive(name="escaped", type=tarfile.CHRTYPE, devmajor=1, devminor=3)),
    "a decompression bomb": answer(archive(content=bytes(30_000_000))),
}


@pytest.mark.parametrize("sent", ANSWERS)
def test_what_is_not_the_published_archive_is_never_opened(sent, site, tmp_path, root, monkeypatch):
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("opened"))
    if sent == "the page of a proxy":
        monkeypatch.setenv("http_proxy", site.where)
        monkeypatch.setattr("torchvision.datasets.CIFAR10.url", "http://data.invalid/cifar-10-python.tar.gz")
    site.answer = ANSWERS[sent]
    with pytest.raises(InputError, match="could not be downloaded .*bagssl data add cifar10 PATH") as caught:
        trees.get("cifar10", root)
    assert site.asked and "\n" not in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path != root] == []
    assert not os.path.exists("/tmp/bagssl-escaped")


def test_the_published_archive_would_be_opened(site, root, monkeypatch):
    """Negative control: with the checksum that was asked for, it is read."""
    content, opened = archive(content=b"x"), []
    monkeypatch.setattr("torchvision.datasets.CIFAR10.tgz_md5", hashlib.md5(content).hexdigest())

    def once(path, *_):
        opened.append(path)
        raise OSError("enough")

    monkeypatch.setattr(tarfile, "open", once)
    site.answer = answer(content)
    with pytest.raises(InputError, match="enough"):
        trees.get("cifar10", root)
    assert len(opened) == 1


def test_without_a_network_the_other_way_is_named(root, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", f"http://127.0.0.1:{port}/c")  # nobody listens now
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    with pytest.raises(InputError, match="could not be downloaded .*refused.*bagssl data add cifar10 PATH"):
        trees.get("cifar10", root)
    assert list(root.iterdir()) == []


def test_archives_of_downloads_that_were_killed_go_after_a_day(root, monkeypatch):
    """A killed process cannot tidy up; the next download may be going on beside this one."""
    def killed(name, split, folder):
        (Path(folder) / "half.tar.gz").write_bytes(b"half")
        left.append(shutil.copytree(folder, f"{folder[:-4]}x.tmp"))
        raise OSError("no network")

    left = []
    monkeypatch.setattr(trees, "_download", killed)
    for _ in range(2):
        with pytest.raises(InputError):
            trees.get("cifar10", root)
    assert sorted(map(str, root.iterdir())) == sorted(left) and len(left) == 2
    os.utime(left[0], (time.time() - 2 * 86_400,) * 2)
    with pytest.raises(InputError):
        trees.get("cifar10", root)
    assert sorted(map(str, root.iterdir())) == sorted(left[1:])


def test_get_knows_no_other_download(root):
    with pytest.raises(InputError, match="only cifar10 and cifar100 can be downloaded"):
        trees.get("imagenet", root)


# The archive of CIFAR as a file


def packed(folder, contents_of):
    """A tar.gz of a folder with these files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in contents_of.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture(params=["cifar10", "cifar100"])
def published(request, monkeypatch, tmp_path):
    """The name, a stand-in for the archive of CIFAR with its own MD5s, and a class-folder tree of the same pictures."""
    from torchvision import datasets

    name = request.param
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    classes = catalogue.CIFAR[name][0]
    monkeypatch.setitem(catalogue.CIFAR, name, (classes, {"train": 2, "test": 1}))
    key = "labels" if name == "cifar10" else "fine_labels"
    contents_of, lists = {}, {"train": [], "test": []}
    for s, (split, count) in enumerate({"train": 2, "test": 1}.items()):
        known = kind.train_list if split == "train" else kind.test_list
        keys = [(s, c, i) for i in range(count) for c in range(len(classes))]
        for j, (file, _) in enumerate(known):
            each = keys[j :: len(known)]
            pixels = np.stack([picture(list(key), 32, 32).transpose(2, 0, 1).reshape(-1) for key in each])
            contents_of[file] = pickle.dumps({"data": pixels, key: [c for _, c, _ in each]}, protocol=2)
            lists[split].append([file, hashlib.md5(contents_of[file]).hexdigest()])
    contents_of[kind.meta["filename"]] = pickle.dumps({kind.meta["key"]: list(classes)}, protocol=2)
    meta = {**kind.meta, "md5": hashlib.md5(contents_of[kind.meta["filename"]]).hexdigest()}
    archive_of = packed(kind.base_folder, contents_of)
    for attribute, value in {"train_list": lists["train"], "test_list": lists["test"], "meta": meta,
                             "tgz_md5": hashlib.md5(archive_of).hexdigest()}.items():
        monkeypatch.setattr(kind, attribute, value)
    (tmp_path / kind.filename).write_bytes(archive_of)
    return name, tmp_path / kind.filename, plant(tmp_path / "tree", classes, 2, 1, 32, 32)


@pytest.mark.parametrize("form", ["packed", "renamed", "unpacked", "the folder around it", "unpacked and renamed"])
def test_the_published_archive_is_read_from_a_file(form, published, root, tmp_path):
    name, path, tree = published
    if form == "renamed":
        path = path.rename(tmp_path / "download (1)")
    elif form != "packed":
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "unpacked", filter="data")
        path = tmp_path / "unpacked"
        if form != "the folder around it":
            path = next(path.iterdir())
        if form == "unpacked and renamed":
            path = path.rename(tmp_path / "batches")
    trees.add(name, path, root=root)
    assert [file.name for file in root.iterdir()] == [f"{name}.safetensors"]
    assert "nothing to do" in trees.add(name, tree, root=root)
    assert "nothing to do" in trees.add(name, path, size=32, root=root)


class Run:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("/tmp/bagssl-unpickled",)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def of_another_kind(path):
    path.write_bytes(archive(content=b"other"))


def a_page(path):
    path.write_bytes(b"<html>Please log in</html>")


def with_a_pickle_that_runs(path):
    path.write_bytes(packed("cifar-10-batches-py", {"data_batch_1": pickle.dumps(Run())}))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [cut_short, of_another_kind, a_page, with_a_pickle_that_runs, empty])
def test_a_file_that_is_not_the_published_archive_is_never_opened(spoil, published, root, monkeypatch):
    name, path, _ = published
    spoil(path)
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("opened"))
    for called in (name, "other"):
        message = "is not the published cifar-.*MD5" if called == name else "is not a folder, nor an .npz file"
        with pytest.raises(InputError, match=message) as caught:
            trees.add(called, path, root=root)
        assert "\n" not in str(caught.value) and not root.exists()


@pytest.mark.parametrize("damage", ["a pickle that runs", "one that is missing", "a pipe", "another meta"])
def test_unpacked_files_that_are_not_the_published_ones_are_never_opened(damage, published, root, tmp_path):
    from torchvision import datasets

    name, path, _ = published
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    folder = tmp_path / "unpacked" / kind.base_folder
    file = folder / (kind.meta["filename"] if "meta" in damage else kind.test_list[0][0])
    file.unlink()
    if damage == "a pipe":
        os.mkfifo(file)
    elif "missing" not in damage:
        file.write_bytes(pickle.dumps(Run()))
    with pytest.raises(InputError, match=f"cannot be read as what was published of {name} .*corrupted") as caught:
        trees.add(name, folder, root=root)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("data/*"))
    assert not os.path.exists("/tmp/bagssl-unpickled")


@pytest.mark.parametrize(
    "shape, message",
    [
        (
            {"train": 1, "test": 1, "height": 32, "width": 32},
            "2 train images of each class, here are 1 of 'airpl",
        ),
        (
            {"train": 2, "test": 2, "height": 32, "width": 32},
            "1 test images of each class, here are 2 of 'airpl",
        ),
        ({"train": 2, "test": 1, "height": 24, "width": 24}, "cifar10 has images of 32×32 px"),
    ],
)
def test_a_part_of_cifar_is_not_cifar(shape, message, small_cifar, tmp_path, root):
    tree = plant(tmp_path / "cifar", catalogue.CIFAR["cifar10"][0], **shape)
    with pytest.raises(InputError, match=f"{message}.*another name"):
        trees.add("cifar10", tree, root=root)
    assert not root.exists()
    trees.add("cifar10-part", tree, root=root)
