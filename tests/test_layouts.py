"""Trees as ImageNet and Tiny-ImageNet have them, and a part of their classes."""

import shutil

import pytest
from test_trees import CLASSES

from bagssl import cli, data, layouts, trees
from bagssl.errors import InputError


def as_tiny_imagenet(tree):
    """A tree of class folders, laid out as Tiny-ImageNet is: the same pictures."""
    lines = []
    for label in CLASSES:
        (tree / "train" / label / "images").mkdir()
        for file in (tree / "train" / label).glob("*.png"):
            file.rename(file.parent / "images" / f"{label}_{file.name}")
        (tree / "train" / label / f"{label}_boxes.txt").write_text("0.png\t0\t0\t62\t57\n")
    (tree / "val" / "images").mkdir(parents=True)
    for i, file in enumerate(sorted((tree / "test").rglob("*.png"), key=lambda file: file.name)):
        file.rename(tree / "val" / "images" / f"val_{i}.png")
        lines.append(f"val_{i}.png\t{file.parent.name}\t0\t32\t44\t62\n")
    (tree / "val" / "val_annotations.txt").write_text("".join(lines))
    shutil.rmtree(tree / "test")
    (tree / "test" / "images").mkdir(parents=True)
    shutil.copy(tree / "val" / "images" / "val_0.png", tree / "test" / "images" / "test_0.png")
    (tree / "wnids.txt").write_text("\n".join(CLASSES))
    return tree


def test_tiny_imagenet_is_read_as_it_was_published(tree, root):
    trees.add("folders", tree, root=root)
    line = trees.add("tiny", as_tiny_imagenet(tree), root=root)
    assert "9 train and 6 test images" in line and data.check("tiny", root) == data.check("folders", root)


def lose_a_line(tree):
    path = tree / "val" / "val_annotations.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    return "val_0.png has no class in .*val_annotations.txt"


def lose_a_picture(tree):
    (tree / "val" / "images" / "val_3.png").unlink()
    return "names 'val_3.png', which is not in"


def name_one_twice(tree):
    path = tree / "val" / "val_annotations.txt"
    path.write_text(path.read_text() + path.read_text().splitlines()[0])
    return "names 'val_0.png', which is not in .*twice"


def lose_the_classes(tree):
    path = tree / "val" / "val_annotations.txt"
    path.write_text("\n".join(line.split("\t")[0] for line in path.read_text().splitlines()))
    return "has no class"


def name_another_class(tree):
    path = tree / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace("cat", "elk"))
    return "the class 'cat' is in .*train but not in .*val"


def keep_a_list_that_is_no_text(tree):
    (tree / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe\xfd")
    return "val_annotations.txt cannot be read .*UTF-8"


def keep_a_picture_beside(tree):
    (tree / "train" / "cat" / "more.png").write_bytes(b"")
    return "images is no file: images lie directly"


@pytest.mark.parametrize("spoil", [lose_a_line, lose_a_picture, name_one_twice, lose_the_classes, name_another_class,
                                   keep_a_list_that_is_no_text, keep_a_picture_beside])
def test_a_list_that_does_not_fit_the_pictures_is_refused(spoil, tree):
    with pytest.raises(InputError, match=spoil(as_tiny_imagenet(tree))) as caught:
        layouts.find(tree)
    assert "\n" not in str(caught.value)


def test_some_classes_are_taken_by_a_list(tree, root, tmp_path):
    """The others may be whatever they are: a class of one split, a folder without images."""
    (tree / "test").rename(tree / "val")
    for other in ("train/gnu", "val/yak"):
        (tree / other).mkdir()
    listed = tmp_path / "two.txt"
    listed.write_text("\ufeffowl\n\ncat\n", encoding="utf-8")
    line = trees.add("two", tree, root=root, classes=listed)
    assert "6 train and 4 test images of 12×12 px in 2 classes" in line
    assert data.load("two", "test", root).classes == ("cat", "owl")


@pytest.mark.parametrize("text, message", [
    ("cat\nelk\ngnu\n", "names the class 'elk', and .*train has no such folder, nor 1 more of them: name one a line"),
    ("cat owl\n", "names the class 'cat owl'"), ("cat\n", "fewer than two class folders, 1"),
    ("", "two class folders, 0"),
    (None, "cannot be read .*a name on each line")])  # fmt: skip
def test_a_list_of_other_classes_is_refused_in_one_line(text, message, tree, tmp_path, capsys):
    if text is not None:
        (tmp_path / "listed.txt").write_text(text)
    assert cli.main(["data", "add", "some", str(tree), "--classes", str(tmp_path / "listed.txt")]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    with pytest.raises(InputError, match=message):
        layouts.find(tree, listed=tmp_path / "listed.txt")


def test_what_goes_with_folders_is_refused_with_arrays(tmp_path, root):
    (tmp_path / "some.npz").write_bytes(b"PK")
    for options in ({"classes": "list.txt"}, {"skip_unreadable": True}):
        with pytest.raises(InputError, match="go with class folders"):
            trees.add("some", tmp_path / "some.npz", root=root, **options)
