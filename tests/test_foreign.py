"""Encoders that others trained: strictly loaded, asked as they want to be, and never taken for one another."""

from __future__ import annotations

import argparse
import csv
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file
from test_experiments import write_notebook
from test_sizes import ASKED as LEAST
from test_sizes import NOTEBOOKS, RECIPE, WORLDS, Began
from torch import nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from bagssl import architectures, cli, data, evaluation, foreign, runs
from bagssl.bags import default_batch, embed_bags
from bagssl.batch import kernels, stages
from bagssl.batch.experiments import load_experiments
from bagssl.batch.notebook import run_cells
from bagssl.config import PretrainConfig
from bagssl.data import Images, load, subset
from bagssl.errors import InputError
from bagssl.patches import centre_crop
from bagssl.pretraining import load_encoder, pretrain
from bagssl.study import claims, comparison

pytestmark = pytest.mark.usefixtures("one_thread")

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer = nn.Sequential(nn.Conv2d(width, 16, 3, padding=1), nn.ReLU())

    def forward(self, x):
        return self.layer(self.bn1(self.conv1(x)).relu()).mean(dim=(2, 3))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x):
        return self.embed(x).flatten(2).mT

def net(): return Net()
def wide(): return Net(16)
def tokens(): return Tokens()
def maps(): return nn.Conv2d(3, 8, 3)
def lists(): return [1, 2]
def broken(): raise RuntimeError("no such\\nluck")
def leaves(): raise SystemExit(0)
def large(): return nn.Sequential(nn.Conv2d(3, 8, 12), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
"""
ASKED = "arch=nets:net,normalise=none,size=8"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder where the command is given, with the user's own code in it."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.setattr(architectures, "_imported", {})
    return tmp_path


def net(width: int = 8) -> nn.Module:
    names: dict = {}
    exec(NETS, names)  # noqa: S102 - the text above
    network = names["Net"](width).eval()
    network.bn1.running_mean.normal_(0, 0.1), network.bn1.running_var.uniform_(0.01, 0.1)
    return network


def prefixed(prefix: str, tensors: dict) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def projector(prefix: str = "projector.") -> dict:
    return prefixed(prefix, nn.Sequential(nn.Linear(512, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).state_dict())


# ---- files as others write them


@functools.cache
def resnet(seed: int = 0) -> nn.Module:
    """torchvision's, of which no two tensors are alike; to be left as it is."""
    torch.manual_seed(seed)
    network = models.resnet18(weights=None).eval().requires_grad_(False)
    for name, tensor in network.state_dict().items():
        if name.endswith(("running_mean", "bn1.bias", "bn2.bias")):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    return network


def embedded(network: nn.Module, patches: torch.Tensor) -> torch.Tensor:
    """What a ResNet's last layer is given."""
    return create_feature_extractor(network, ["flatten"])(patches)["flatten"]


def numbered(network: nn.Module) -> dict:
    """lightly's customary backbone: a Sequential of a network's children, without the last."""
    return nn.Sequential(*list(network.children())[:-1]).state_dict()


LAYOUTS: dict[str, Callable[[dict, dict, dict], dict]] = {  # own, another network's, own numbered -> what is saved
    "plain": lambda own, other, _: own,
    "vicreg": lambda own, other, _: {"epoch": 9, "optimizer": {"state": {}}, "model": {
        **prefixed("module.backbone.", own), **projector("module.projector.")}},
    "solo-learn": lambda own, other, _: {"state_dict": {
        **prefixed("backbone.", own), **projector(), **prefixed("momentum_backbone.", other),
        **prefixed("momentum_projector.", projector("")), "classifier.weight": torch.ones(10, 512)}, "loops": {}},
    "lightly": lambda own, other, _: {"state_dict": {
        **prefixed("backbone.", own), **projector("projection_head.layers."), **prefixed("backbone_momentum.", other)}},
    "lightly, numbered": lambda own, other, numbers: {"state_dict": {
        **prefixed("encoder.", numbers), **projector("projection_head.layers.")}},
    "moco": lambda own, other, _: {"arch": "resnet18", "state_dict": {
        **prefixed("module.encoder_q.", own), **prefixed("module.encoder_k.", other),
        "module.queue": torch.ones(128, 4), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}},
    "moco, in one process": lambda own, other, _: {"state_dict": {
        **prefixed("encoder_q.", own), **prefixed("encoder_k.", other), "queue": torch.ones(4, 4)}},
    "dino": lambda own, other, _: {"student": prefixed("module.backbone.", other), "teacher": {
        **prefixed("module.backbone.", own), **projector("module.head.mlp.")}},
    "dino, later": lambda own, other, _: {"student": prefixed("backbone.", other), "teacher": {
        **prefixed("backbone.", own), **projector("head.")}},
    "twice wrapped": lambda own, other, _: {"model": {"state_dict": prefixed("module.module.", own)}},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_what_the_network_itself_gives(layout, folder):
    own, other = resnet(0), resnet(1)
    torch.save(LAYOUTS[layout](own.state_dict(), other.state_dict(), numbered(own)), "model.pth")
    found = foreign.find("model.pth,arch=torchvision:resnet18,normalise=none,size=32")
    patches = torch.rand(4, 3, 32, 32)
    assert torch.equal(found.network(patches), embedded(own, patches)) and found.network.dim == 512
    assert not torch.allclose(found.network(patches), embedded(other, patches), atol=1e-3)  # negative control
    assert "120 of 120 tensors" in repr(found)


def test_what_is_left_over_is_counted_by_name(folder):
    own = prefixed("module.backbone.", net().state_dict())
    torch.save({"model": own | projector("module.projector.")}, "m.pt")
    found = foreign.find(f"m.pt,{ASKED}")
    assert found.record["loaded"] == "m.pt: 8 of 8 tensors under module.backbone.; left over: projector.*, 9"


def test_a_file_is_the_same_as_torch_or_safetensors_and_by_options_apart(folder):
    network = net()
    torch.save(network.state_dict(), "a.pth")
    save_file(prefixed("encoder.", network.state_dict()), "b.safetensors")
    one = foreign.find(f"a.pth,{ASKED}")
    other = foreign.find("b.safetensors", arch="nets:net", normalise="0/0/0/1/1/1", size=8, pool=None)
    assert one.digest == other.digest and one.path.parent == other.path.parent == runs.runs_root()
    with pytest.raises(InputError, match="size is given twice"):
        foreign.find(f"a.pth,{ASKED}", size=16)
    with pytest.raises(InputError, match="named twice"):
        foreign.find_all([f"a.pth,{ASKED}", f"a.pth,{ASKED}"])
    assert [each.name for each in foreign.find_all(["a.pth", *ASKED.split(",")])] == ["a"]  # a list split at commas


def test_what_is_rounded_is_read_as_fp32_and_said(folder):
    tensors = net().state_dict()
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    bf16 = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    torch.save(half, "half.pth"), save_file(bf16, "bf16.safetensors")
    for file, kind in (("half.pth", "float16"), ("bf16.safetensors", "bfloat16")):
        found = foreign.find(f"{file},{ASKED}")
        assert f"{kind} read as float32" in repr(found)
        assert {parameter.dtype for parameter in found.network.parameters()} == {torch.float32}


def test_counters_that_old_files_lack_are_zero_and_this_is_said(folder):
    tensors = net().state_dict()
    torch.save({name: tensor for name, tensor in tensors.items() if "num_batches" not in name}, "old.pth")
    torch.save(tensors, "new.pth")
    old, new = (foreign.find(f"{name}.pth,{ASKED}") for name in ("old", "new"))
    assert "7 of 7 tensors; num_batches_tracked absent, taken as 0" in repr(old) and old.digest == new.digest


# ---- files that are refused


class Runs:
    """A pickle of it would make a file, were it loaded."""

    def __reduce__(self):
        return open, (os.path.abspath("ran"), "w")


def without(names: int, tensors: dict) -> dict:
    return dict(list(tensors.items())[names:])


def bent(tensors: dict, **changes) -> dict:
    return {**tensors, **{name.replace("__", "."): change for name, change in changes.items()}}


def truncated() -> None:
    torch.save(net().state_dict(), OWN)
    content = Path(OWN).read_bytes()
    Path(OWN).write_bytes(content[: len(content) // 2])


def written(content: bytes, path: str = "m.pth") -> Callable[[], None]:
    def write() -> None:
        Path(path).write_bytes(content)

    return write


def loop() -> dict:
    content: dict = {"model": {}}
    content["model"]["model"] = content
    return content


OWN = "m.pth"
WRONG = {  # what is wrong: (what the file holds, None where that is written already; words; what the line says)
    "another architecture": (lambda: resnet().state_dict(), "", "is not of nets:net"),
    "another width": (lambda: net(16).state_dict(), "", "conv1.weight is float32 [16, 3, 3, 3] instead of"),
    "half the tensors": (lambda: without(4, net().state_dict()), "", "4 of 8 tensors fit; missing conv1.weight and 3"),
    "one more layer": (lambda: bent(net().state_dict(), layer__4__bias=torch.ones(3)), "", "unexpected layer.4.bias"),
    "the network twice": (lambda: prefixed("a.", net().state_dict()) | prefixed("b.", net().state_dict()), "",
                          "holds the network more than once, under 'a.' and 'b.'"),
    "two prefixes": (lambda: prefixed("module.", without(4, net().state_dict()))
                     | prefixed("module.module.", dict(list(net().state_dict().items())[:4])), "", "unexpected module"),
    "a pickled Namespace": (lambda: {"state_dict": net().state_dict(), "args": argparse.Namespace(lr=1)}, "",
                            "it holds a pickled argparse.Namespace, which could run code"),
    "a pickled model": (lambda: nn.Conv2d(3, 8, 3), "", "is no checkpoint that can be read"),
    "a pickle that would run code": (lambda: {"state_dict": net().state_dict(), "x": Runs()}, "", "could run code"),
    "wrong shapes": (lambda: bent(net().state_dict(), conv1__weight=torch.ones(8, 3, 5, 5)), "", "[8, 3, 5, 5]"),
    "whole numbers": (lambda: bent(net().state_dict(), conv1__weight=torch.ones(8, 3, 3, 3, dtype=torch.int8)), "",
                      "conv1.weight is int8"),
    "sparse": (lambda: bent(net().state_dict(), bn1__bias=torch.ones(8).to_sparse()), "", "bn1.bias is float32 [8]"),
    "NaN": (lambda: bent(net().state_dict(), bn1__weight=torch.full((8,), torch.nan)), "", "bn1.weight holds NaN"),
    "infinity": (lambda: bent(net().state_dict(), bn1__bias=torch.full((8,), torch.inf)), "", "bn1.bias holds NaN or"),
    "beyond fp32": (lambda: bent(net().state_dict(), bn1__bias=torch.full((8,), 1e300, dtype=torch.float64)), "",
                    "bn1.bias holds NaN or infinity"),
    "an empty dictionary": (dict, "", "holds no tensors by name"),
    "an empty container": (lambda: {"state_dict": {}, "epoch": 3}, "", "holds no tensors by name"),
    "a list": (lambda: [torch.ones(3)], "", "holds no tensors by name"),
    "a container in itself": (loop, "", "holds no tensors by name"),
    "truncated": (truncated, "", "is no checkpoint that can be read"),
    "empty": (written(b""), "", "is no checkpoint that can be read"),
    "text": (written(b"weights\n" * 99), "", "is no checkpoint that can be read"),
    "safetensors of a wrong header": (written(b"\xff" * 64, "m.safetensors"), "m.safetensors",
                                      "is no checkpoint that can be read"),
    "torch's, called safetensors": (lambda: torch.save(net().state_dict(), "m.safetensors"), "m.safetensors",
                                    "is no checkpoint that can be read"),
    "a directory": (lambda: Path(OWN).mkdir(), "", "is a folder"),
    "absent": (lambda: None, "", "m.pth is not there"),
    "no arch": (net().state_dict, "m.pth --size 8", "arch is needed"),
    "no network of torchvision": (net().state_dict, "m.pth --arch torchvision:resnet19", "did you mean 'resnet1"),
    "no weights of torchvision": (net().state_dict, "m.pth --arch torchvision:resnet18@V3", "unknown weights"),
    "no network of ours": (net().state_dict, "m.pth --arch bagssl:resnet11", "unknown encoder 'resnet11'"),
    "no arch at all": (net().state_dict, "m.pth --arch resnet", "none of torchvision:NAME"),
    "a module that is missing": (net().state_dict, "m.pth --arch nots:net", "No module named 'nots'"),
    "a function that is missing": (net().state_dict, "m.pth --arch nets:nit", "has no attribute 'nit'"),
    "a function that raises": (net().state_dict, "m.pth --arch nets:broken", "RuntimeError: no such (nets.py, line"),
    "a function that leaves": (net().state_dict, "m.pth --arch nets:leaves", "SystemExit"),
    "a function that gives no module": (net().state_dict, "m.pth --arch nets:lists", "returns list"),
    "a network without classifier": (net().state_dict, "m.pth --arch torchvision:squeezenet1_0", "no linear classif"),
    "no normalise": (net().state_dict, "m.pth --arch nets:net --size 8", "normalise is needed"),
    "no size": (net().state_dict, "m.pth --arch nets:net --normalise none", "size is needed"),
    "an odd normalise": (net().state_dict, f"m.pth,{ASKED.replace('none', '1/2')}", "normalise = '1/2' makes no sense"),
    "a deviation of 0": (net().state_dict, f"m.pth,{ASKED.replace('none', '0/0/0/0/1/1')}", "makes no sense"),
    "an odd pool": (net().state_dict, f"m.pth,{ASKED},pool=max", "one of features, mean, cls"),
    "an odd crop": (net().state_dict, f"m.pth,{ASKED},crop=2", "a share in (0, 1]"),
    "an odd size": (net().state_dict, f"m.pth,{ASKED.replace('8', 'big')}", "a number of pixels, or native"),
    "no such option": (net().state_dict, f"m.pth,{ASKED},archi=a", "did you mean 'arch'"),
    "no tokens": (net().state_dict, f"m.pth,{ASKED},pool=cls", "with pool = cls gives"),
    "patches that are too small": (lambda: large().state_dict(), "m.pth --arch nets:large --normalise none --size 8",
                                   "takes no patches of 8 px"),
    "no encoder": (net().state_dict, "resnet18", "'resnet18' is no encoder"),
    "no library's": (net().state_dict, "torchvision:resnet19", "unknown network of torchvision"),
    "arch of a library's": (net().state_dict, "torchvision:resnet18 --arch nets:net", "arch is for files"),
}  # fmt: skip


def large() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 12))


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_one_line_code_2_nothing_run_and_nothing_written(what, folder, capsys):
    content, words, answer = WRONG[what]
    if (held := content()) is not None:
        torch.save(held, OWN)
    if words in ("", "m.safetensors"):
        words = f"{words or OWN} --arch nets:net --normalise none --size 8"
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
    assert cli.main(["evaluate", *words.split(), "--dataset", "synthetic", "--csv", "table.csv"]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and err.startswith("bagssl: ") and answer in err and not out, err
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))} == before
    assert not Path("ran").exists()


# ---- identity


def test_an_encoder_is_known_by_all_that_decides_h(folder):
    tensors = net().state_dict()
    torch.save(tensors, "a.pth")
    (folder / "sub").mkdir()
    torch.save({"state_dict": prefixed("module.", tensors), "epoch": 3}, "sub/b.pth")
    a = foreign.find(f"a.pth,{ASKED}")
    assert a.digest == foreign.find(f"a.pth,{ASKED}").digest == foreign.find(f"sub/b.pth,{ASKED}").digest
    torch.save(bent(tensors, bn1__bias=torch.nextafter(tensors["bn1.bias"], torch.tensor(9.0))), "c.pth")
    others = [foreign.find(word).digest for word in (
        f"c.pth,{ASKED}", f"a.pth,{ASKED.replace('none', 'half')}", f"a.pth,{ASKED.replace('=8', '=9')}",
        f"a.pth,{ASKED.replace('=8', '=native')}")]  # fmt: skip
    (folder / "nets.py").write_text(NETS + "\n# another")
    others.append(foreign.find(f"a.pth,{ASKED}").digest)
    assert len({a.digest, *others}) == 6


def test_code_that_was_changed_is_imported_again(folder):
    torch.save(net().state_dict(), "a.pth")
    patches = torch.rand(2, 3, 8, 8)
    before = foreign.find(f"a.pth,{ASKED}").network(patches)
    (folder / "nets.py").write_text(NETS.replace(".mean(dim=(2, 3))", ".amax(dim=(2, 3))"))
    assert not torch.equal(foreign.find(f"a.pth,{ASKED}").network(patches), before)
    assert not list(folder.rglob("__pycache__"))


def test_the_pool_is_part_of_it_and_tokens_are_pooled_as_asked(folder):
    network = nn.Conv2d(3, 8, 4, 4)
    torch.save(prefixed("embed.", network.state_dict()), "t.pth")
    mean, cls = (foreign.find(f"t.pth,arch=nets:tokens,normalise=none,size=8,pool={pool}") for pool in ("mean", "cls"))
    patches = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        maps = network(patches)
        assert torch.allclose(mean.network(patches), maps.mean(dim=(2, 3)), atol=1e-6)
        assert torch.equal(cls.network(patches), maps[:, :, 0, 0])
    assert mean.digest != cls.digest
    with pytest.raises(InputError, match=r"pool = features gives \[2, 4, 8\] for 2 patches.* mean, cls"):
        foreign.find("t.pth,arch=nets:tokens,normalise=none,size=8")
    torch.save(nn.Conv2d(3, 8, 3).state_dict(), "m.pth")
    assert foreign.find("m.pth,arch=nets:maps,normalise=none,size=8").network(patches).shape == (5, 8)


# ---- asked as they want to be


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16"])
def test_pixels_come_as_by_the_librarys_own_transforms(name, folder, monkeypatch):
    seen = []

    class Seen(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.mean(dim=(2, 3))

    monkeypatch.setattr(models, "get_model", lambda *_, **__: nn.Sequential(Seen(), nn.Linear(3, 2)))
    found = foreign.load(f"torchvision:{name}", untrained=0)
    (image,) = torch.randint(256, (1, 3, 256, 256), dtype=torch.uint8)
    preset = models.get_model_weights(name).DEFAULT.transforms()
    assert found.crop_of(image[None]) == preset.crop_size[0] / preset.resize_size[0] == 0.875
    # resized to 256, the crop of 224 pixels is what we cut
    evaluation.load_network(found)(centre_crop(image[None], found.size, found.crop_of(image[None])))
    assert torch.allclose(seen[-1], preset(image)[None], atol=1e-6)
    evaluation.load_network(found)(centre_crop(image[None], found.size))  # negative control
    assert not torch.allclose(seen[-1], preset(image)[None], atol=1e-1)
    assert found.crop_of(image[None, :, :128]) == 1  # smaller than its makers meant: shown whole
    assert foreign.load(f"torchvision:{name},crop=0.5", untrained=0).crop_of(image[None, :, :128]) == 0.5


def test_torchvisions_transformer_gives_its_class_token_or_the_mean_of_the_others(folder):
    network = models.VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=3).eval()
    nn.init.normal_(network.heads.head.weight)
    features, cls, mean = (architectures.PatchEncoder(network, (0.0,) * 3, (1.0,) * 3, pool)
                           for pool in ("features", "cls", "mean"))
    patches = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(features(patches), network.heads(cls(patches)))
        assert mean(patches).shape == (4, 8) and not torch.allclose(mean(patches), cls(patches))
    with pytest.raises(InputError, match="takes no patches of 48 px .*Wrong image height! Expected 32 but got 48"):
        architectures.embedding_dim(mean, 48, "vit")


def cached(folder: Path, monkeypatch) -> Path:
    """The place of torchvision's weights of ResNet-18 in its cache, on a machine without a network."""
    def refused(*_, **__):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(folder / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    place = folder / "cache/hub/checkpoints" / Path(models.ResNet18_Weights.DEFAULT.url).name
    place.parent.mkdir(parents=True)
    return place


def test_the_librarys_own_weights_come_from_its_cache(folder, monkeypatch):
    place, network = cached(folder, monkeypatch), resnet()
    with pytest.raises(InputError, match=r"cannot be had \(URLError: .*no network.*bring the file https:.* to .*cache"):
        foreign.find("torchvision:resnet18")
    torch.save(network.state_dict(), place)
    found = foreign.find("torchvision:resnet18@IMAGENET1K_V1,size=64")
    patches = torch.rand(2, 3, 64, 64)
    logits = found.classifier(found.network(patches))
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.equal(logits, network((patches - mean) / deviation))
    with pytest.raises(InputError, match="unknown weights of torchvision's resnet18 'V3'"):
        foreign.find("torchvision:resnet18@V3")
    torch.save({"x": Runs()}, place)
    with pytest.raises(InputError, match="ResNet18_Weights.* cannot be had"):
        foreign.find("torchvision:resnet18")
    assert not Path("ran").exists()


def test_timm_is_asked_as_its_data_configuration_says(folder, monkeypatch):
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_vit").eval()
    save_file(network.state_dict(), "vit.safetensors")
    found, cls, mean = (foreign.find(f"vit.safetensors,arch=timm:test_vit{pool}")
                        for pool in ("", ",pool=cls", ",pool=mean"))
    about = timm.data.resolve_model_data_config(network)
    assert (found.size, found.crop) == (about["input_size"][-1], about["crop_pct"])
    patches = torch.rand(2, 3, found.size, found.size)
    mean_, deviation = (torch.tensor(about[name]).view(3, 1, 1) for name in ("mean", "std"))
    network.reset_classifier(0)
    with torch.no_grad():
        tokens = network.forward_features((patches - mean_) / deviation)
        assert torch.equal(found.network(patches), network((patches - mean_) / deviation))
        assert torch.equal(cls.network(patches), tokens[:, 0])
        assert torch.equal(mean.network(patches), tokens[:, 1:].mean(1))
    assert "left over: head.*, 2" in repr(found)
    with pytest.raises(InputError, match="takes no patches of 100 px"):
        foreign.load("timm:vit_tiny_patch16_224,size=native", untrained=0).check(100)
    with pytest.raises(InputError, match="timm has no network 'resnet19'"):
        foreign.find("timm:resnet19")


def test_a_vision_transformer_of_timm_is_made_for_the_size_that_is_given(folder):
    timm = pytest.importorskip("timm")
    network = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=0).eval()
    save_file(network.state_dict(), "vit.safetensors")
    found = foreign.find("vit.safetensors,arch=timm:vit_tiny_patch16_224,normalise=none,size=48")
    patches = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(found.network(patches), network(patches))
    with pytest.raises(InputError, match=r"pos_embed is float32 \[1, 10, 192\] instead of float32 \[1, 197, 192\]"):
        foreign.find("vit.safetensors,arch=timm:vit_tiny_patch16_224")


def test_without_timm_one_line_says_how_to_install_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="timm:resnet18 needs timm, which is not installed.*pip install timm"):
        foreign.find("timm:resnet18")


def test_large_crops_come_in_smaller_batches():
    assert default_batch("cpu", 32) == default_batch("cpu", 96) == 256  # as before
    for kind in ("cpu", "cuda"):
        assert default_batch(kind, 224) * 224**2 <= default_batch(kind, 96) * 96**2
    assert default_batch("cpu", 4096) == 1


# ---- measured as a run is


@pytest.fixture
def images() -> tuple[Images, Images]:
    return tuple(subset(load("synthetic", split), count) for split, count in (("train", 200), ("test", 60)))


HOW = {"probes": ["linear", "knn"], "progress": False}


def test_an_encoder_of_ours_from_a_file_measures_as_its_run(folder, images, monkeypatch):
    run = pretrain(PretrainConfig(width=8, size=8, batch_size=32, views=2, epochs=0.5), images[0], progress=False)
    weights = run.path / "weights.safetensors"
    found = foreign.find(f"{weights},arch=bagssl:resnet10,width=8,size=8")
    patches = torch.rand(4, 3, 8, 8)
    assert torch.equal(found.network(patches), load_encoder(run)(patches))
    assert "left over: projector.*" in repr(found)
    rows = [evaluation.over_scales(each, *images, [0, 2], [0.25], **HOW) for each in (run, found)]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    for word in (run.key, run.path.name[:20], os.path.relpath(run.path), str(run.path)):
        assert foreign.find(word).path.samefile(run.path)
    with pytest.raises(InputError, match="size is for encoders that others trained"):
        foreign.find(run.key, size=8)
    # its folder is no run, and holds what was measured
    assert runs.list_runs() == [run] and found.path.parent == run.path.parent
    assert runs.read_json(found.path / "encoder.json") == found.record
    table = comparison.measure_all([run, found], *images, [2], scale=0.25, **HOW)
    assert list(table["training"]) == ["patch-based"] * 2 + ["foreign"] * 2
    comparison.provenance(folder / "out", [run, found], {"train": images[0]})
    assert (folder / "out/runs" / found.path.name / "encoder.json").exists()


def test_the_same_network_untrained_is_another_encoder_asked_in_the_same_way(folder):
    torch.save(net().state_dict(), "a.pth")
    trained = foreign.load(f"a.pth,{ASKED}")
    one, again, other = (foreign.load(f"a.pth,{ASKED}", untrained=seed) for seed in (0, 0, 1))
    assert one.digest == again.digest and len({trained.digest, one.digest, other.digest}) == 3
    assert one.name == "a-untrained-seed0" and (one.size, one.crop) == (trained.size, trained.crop)


def test_there_is_no_z_without_a_projector(folder, images):
    torch.save(net().state_dict(), "a.pth")
    with pytest.raises(InputError, match="a is an encoder without a projector: it has h, and no z"):
        evaluation.evaluate(foreign.find(f"a.pth,{ASKED}"), *images, [0], features=["h", "z"], scale=1)


def test_each_crop_is_shown_in_its_own_pixels_or_enlarged(folder, images):
    sides = []

    class Sides(nn.Module):
        def forward(self, x):
            sides.append(x.shape[-1])
            return x.mean(dim=(2, 3))

    pixels = images[1].pixels
    height = pixels.shape[-1]
    for size, seen in ((12, {12}), (None, {height, height // 2})):
        sides.clear()
        embed_bags(Sides(), pixels, [0, 2], scale=0.25, size=size)
        assert set(sides) == seen
    torch.save(large().state_dict(), "l.pth")
    found = foreign.find("l.pth,arch=nets:large,normalise=none,size=native")
    with pytest.raises(InputError, match="takes no patches of 6 px"):
        evaluation.evaluate(found, *images, [1], scale=(6 / height) ** 2, progress=False)
    assert not found.path.exists()


def evaluate(words: str, capsys) -> tuple[list[str], str]:
    """The lines of the table, and what is said beside it."""
    start = f"evaluate a.pth,{ASKED} --dataset synthetic --train-images 200 --test-images 60"
    assert cli.main([*start.split(), *words.split()]) == 0
    out, err = capsys.readouterr()
    return out.splitlines(), err


def test_the_command_prints_a_table_and_measures_nothing_twice(folder, capsys, monkeypatch):
    torch.save(net().state_dict(), "a.pth")
    crops, forward = [], architectures.PatchEncoder.forward

    def counted(self, patches):
        crops.append(len(patches))
        return forward(self, patches)

    monkeypatch.setattr(architectures.PatchEncoder, "forward", counted)
    monkeypatch.setattr(evaluation, "_recent", {})
    (head, *first), said = evaluate("--ks 0,1,2 --scales 0.25 --csv out.csv", capsys)
    assert head.split() == ["SHOWN", "K", "PROBE", "ACCURACY", "FROM", "TO", "GAIN", "FROM", "TO"]
    assert [line.split()[:3] for line in first[:2]] == [["centre", "crop", "0"]] * 2 and len(first) == 6
    assert "8 of 8 tensors" in said and sum(crops) > 3 * 260
    crops.clear(), monkeypatch.setattr(evaluation, "_recent", {})
    (_, *second), _ = evaluate("--ks 0,1,2 --scales 0.25", capsys)
    assert second == first and sum(crops) == 2  # the two by which its dimensions are known
    crops.clear()
    (_, *third), _ = evaluate("--ks 0,1,2 --scales 0.25,0.5", capsys)
    assert third[:6] == first and len(third) == 10 and 2 * 260 < sum(crops) < 2 * 260 + 20
    assert len({line.split()[-6] for line in third}) > 4
    with open("out.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["scale"] for row in rows] == ["", "", *["0.25"] * 4] and rows[0]["gain"] == ""
    for row, line in zip(rows, first, strict=True):
        assert f"{float(row['accuracy']):.2f}" in line and float(row["low"]) <= float(row["accuracy"])
    gain = float(rows[2]["accuracy"]) - float(rows[0 if rows[0]["probe"] == rows[2]["probe"] else 1]["accuracy"])
    assert float(rows[2]["gain"]) == pytest.approx(gain) and "top5" not in rows[0]
    monkeypatch.setattr(evaluation, "TOP5_FROM", 10)  # as of a dataset of a hundred classes
    (head, *lines), _ = evaluate("--ks 0,1 --scales 0.25 --csv out.csv", capsys)
    with open("out.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert head.split()[6] == "TOP-5" and [line.split()[-4] for line in lines[2:]] == [
        f"{float(row['top5']):.2f}" for row in rows[2:]]  # fmt: skip
    assert all(float(row["accuracy"]) < float(row["top5"]) <= float(row["top5_high"]) for row in rows)


@pytest.mark.parametrize("words, answer", [
    ("--ks 0,-1", "must be whole numbers of at least 0"), ("--ks one", "--ks must be list[int]"),
    ("--scales 2", "--scales = 2 must lie in (0, 1]"), ("--probes svm", "unknown probe 'svm'"),
    ("--train-images 5000000", "--train-images = 5000000"), ("--test-images -1", "not a whole number"),
    ("--csv .", "--csv . is a folder"), ("--dataset nowhere", "nowhere"),
])  # fmt: skip
def test_a_wrong_question_is_one_line_and_nothing_is_written(words, answer, folder, capsys):
    torch.save(net().state_dict(), "a.pth")
    before = sorted(folder.rglob("*"))
    start = f"evaluate a.pth,{ASKED} --dataset synthetic"
    assert cli.main([*start.split(), *words.split()]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and answer in err and not out and sorted(folder.rglob("*")) == before


# ---- in notebooks


def test_a_word_means_what_it_does_where_the_command_is_given(folder, monkeypatch):
    torch.save(net().state_dict(), "a.pth")
    (folder / "notebooks").mkdir()
    cells = ["from bagssl import foreign", f"foreign.find('a.pth,{ASKED}')"]
    write_notebook(folder / "notebooks/n.ipynb", cells)
    assert kernels.Kernels().run(folder / "notebooks/n.ipynb", folder / "out.ipynb", {}, {}) == {}
    monkeypatch.chdir(folder / "notebooks")  # negative control
    with pytest.raises(InputError, match="a.pth is not there"):
        foreign.find(f"a.pth,{ASKED}")


@pytest.fixture
def notebook(folder, monkeypatch) -> Callable[..., Path]:
    """Execute a notebook's cells with encoders of others, on few images of noise, training nothing; where it wrote."""
    for name, split in WORLDS.items():
        monkeypatch.setitem(data.EMBEDDED, name, split)

    def trains(*_, **__):
        raise Began

    def run(number: str, encoders: list[str], train: Callable = trains, **changes) -> Path:
        monkeypatch.setattr(comparison, "pretrain", train)
        monkeypatch.setenv("BAGSSL_OUTPUT", str(folder / "out"))
        ours = {"objectives": []} if number == "06" else {"objective": ""}
        asked = {**RECIPE, "dataset": "few", **LEAST[number], **ours, "encoders": encoders, **changes}
        with plt.rc_context():
            run_cells(NOTEBOOKS[number], asked)
        return folder / "out"

    return run


IN_NOTEBOOKS = {"04": {"images": 30}, "05": {"images": 30, "count": 8}, "07": {}}


@pytest.mark.parametrize("number", IN_NOTEBOOKS)
def test_a_notebook_asks_them_without_training_anything_in_batches_that_memory_holds(number, notebook, monkeypatch):
    torch.save(net().state_dict(), "a.pth")
    crops, forward = [], architectures.PatchEncoder.forward

    def counted(self, patches):
        crops.append(patches.shape)
        return forward(self, patches)

    monkeypatch.setattr(architectures.PatchEncoder, "forward", counted)
    out = notebook(number, ["a.pth,arch=nets:net,normalise=none,size=112"], **IN_NOTEBOOKS[number])
    assert {shape[-1] for shape in crops} == {112}
    assert default_batch("cpu", 112) // 2 < max(shape[0] for shape in crops) <= default_batch("cpu", 112) < 200
    records = [runs.read_json(path) for path in sorted(out.glob("runs/*/encoder.json"))]
    assert [each["name"] for each in records] == ["a", "a-untrained-seed0"]
    if number == "07":
        assert list(pd.read_csv(out / "tables/accuracy.csv")["training"]) == ["a", "a, untrained"]
        return
    (claim,) = out.glob("tables/claim_*.csv")  # of 05 no C6, which compares h with a z
    table = pd.read_csv(claim)
    assert claim.stem == {"04": "claim_c4", "05": "claim_c5"}[number] and set(table["encoder"]) == {"a"}
    if number == "04":
        assert list(table["scale"].unique()) == [0.1, 0.25, 0.5, 0.75] and len(table) == (3 + 2) * 4
    control = table[table["weights"] == "random"]
    assert set(control["setting"].str.partition(", K")[0]) == {"a, untrained"}
    assert len(control) == {"04": 2 * 4, "05": 3}[number]


def test_notebook_06_asks_them_without_one_of_ours(notebook, monkeypatch):
    torch.save(net().state_dict(), "a.pth")
    monkeypatch.setattr(evaluation, "_recent", {})
    table = pd.read_csv(notebook("06", ["a.pth,arch=nets:net,normalise=none,size=8"]) / "tables/claim_c7.csv")
    assert set(table["encoder"]) == {"a"} and list(table["weights"].fillna("")) == ["", "", "random", "random"]


@pytest.mark.parametrize("number", [pytest.param(each, marks=pytest.mark.nightly) for each in IN_NOTEBOOKS])
def test_beside_ours_they_have_rows_of_their_own(number, notebook):
    torch.save(net().state_dict(), "a.pth")
    word = "a.pth,arch=nets:net,normalise=none,size=native"
    out = notebook(number, [word], lambda *each, **_: pretrain(*each, progress=False), objective="simclr")
    for path in out.glob("tables/claim_*.csv"):
        found = claims.checked(path.stem[-2:].upper(), pd.read_csv(path, keep_default_na=False), path.name)
        assert set(found["encoder"]) == ({""} if path.stem == "claim_c6" else {"", "a"})
        trained = found[found["weights"] == ""]
        assert (trained["setting"].str.startswith("simclr") == (trained["encoder"] == "")).all()
    if number == "07":
        assert set(pd.read_csv(out / "tables/accuracy.csv")["objective"]) == {"simclr", "none", "a", "a, untrained"}


@pytest.mark.parametrize("number", IN_NOTEBOOKS)
@pytest.mark.parametrize(("encoders", "answer"), [
    (["nowhere"], "'nowhere' is no encoder"), (["b.pth,arch=nets:net"], "b.pth is not there"),
    (["a.pth,arch=nets:net,size=8"], "normalise is needed"), (["a.pth,arch=nets:net,size=8,z=1"], "unknown option"),
    (["l.pth,arch=nets:large,normalise=none,size=native"], "encoders and (scales|patch_scale): l takes no patches of "),
    ([f"a.pth,{ASKED}", f"a.pth,{ASKED}".replace("8", "9")], "two networks would be called 'a' in tables"),
    ([], "objective"),
])  # fmt: skip
def test_a_notebook_refuses_wrong_words_before_any_work(number, encoders, answer, notebook, monkeypatch):
    torch.save(net().state_dict(), "a.pth"), torch.save(large().state_dict(), "l.pth")
    monkeypatch.setattr("bagssl.bags._prepare", lambda *_: pytest.fail("something was embedded"))
    with pytest.raises(InputError, match=answer) as refused:
        notebook(number, encoders, objective="simclr" if encoders else "")  # before ours is trained, too
    assert "\n" not in str(refused.value) and not Path("out").exists()


def test_the_files_that_a_word_names_are_part_of_the_key(folder):
    write_notebook(folder / "e.ipynb", ["1"], f'encoders: list[str] = ["a.pth,{ASKED}"]\n')
    entry = {"artefact": "x", "notebook": "e.ipynb", "profiles": {"smoke": {"cost": "1 s", "parameters": {}}}}
    (folder / "experiments.yaml").write_text(yaml.safe_dump({"e": entry}))
    experiment = load_experiments(folder)["e"]
    with pytest.raises(InputError, match=r"e \(e.ipynb\): .*a.pth is not there"):
        stages.plan(experiment, "smoke")
    absent = stages.plan(experiment, "smoke", fetch=False).key
    keys = {absent}
    for change in (lambda: torch.save(net().state_dict(), "a.pth"), lambda: torch.save(net().state_dict(), "a.pth"),
                   lambda: (folder / "nets.py").write_text(NETS + "#")):  # fmt: skip
        change()
        keys.add(stages.plan(experiment, "smoke").key)
        assert stages.plan(experiment, "smoke").key in keys
    assert len(keys) == 4
    given = stages.plan(experiment, "smoke", {"encoders": f"a.pth,{ASKED}"})  # --set, which reads a list
    assert foreign.find_all(given.parameters["encoders"])[0].name == "a" and f"a.pth,{ASKED}" in given.data
