"""Runs on the hub: what is pushed to a stand-in of its API on this machine is pulled from there as it was."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import torch

import bagssl
from bagssl import cli, evaluation, runs
from bagssl.config import PretrainConfig
from bagssl.data import load
from bagssl.errors import InputError
from bagssl.evaluation import evaluate
from bagssl.hub import FILES, pull, push
from bagssl.pretraining import load_encoder, pretrain
from bagssl.runs import HALF, WEIGHTS

hub = pytest.importorskip("huggingface_hub")
CONFIG = PretrainConfig(width=8, size=8, batch_size=16, views=2, projector_hidden=16, projector_dim=8, epochs=1)


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Hub(ThreadingHTTPServer):
    """The part of the hub's API that pushing and pulling a model ask for, over memory."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.denied = False

    def revision(self, repo: str) -> str:
        content = [(name, hashlib.sha256(data).hexdigest()) for name, data in sorted(self.repos[repo].items())]
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content=b"", code=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self):
        hub, path, body = self.server, unquote(urlsplit(self.path).path), self.body()
        if hub.denied:
            return self.answer({"error": "401 Unauthorized: no token"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = asked["name"] if not asked.get("organization") else f"{asked['organization']}/{asked['name']}"
            if name in hub.repos:
                return self.answer({"error": "You already created it", "url": f"{hub.address}/{name}"}, 409)
            hub.repos[name] = {".gitattributes": b""}
            hub.private |= {name} if asked.get("private") or asked.get("visibility") == "private" else set()
            return self.answer({"url": f"{hub.address}/{name}", "id": name, "name": name})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/objects/batch"):
            objects = [{"oid": each["oid"], "size": each["size"], "actions": {"upload": {
                "href": f"{hub.address}/blobs/{each['oid']}", "header": {}}}} for each in json.loads(body)["objects"]]
            return self.answer({"transfer": "basic", "objects": objects},
                               Content_Type="application/vnd.git-lfs+json")
        repo = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            return self.answer({"files": [{"path": each["path"], "shouldIgnore": False, "uploadMode": (
                "lfs" if each["path"].endswith(".safetensors") else "regular")} for each in json.loads(body)["files"]]})
        assert "/commit/" in path
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                hub.repos[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                hub.repos[repo][entry["value"]["path"]] = hub.blobs[entry["value"]["oid"]]
        return self.answer({"commitUrl": f"{hub.address}/{repo}/commit/{hub.revision(repo)}",
                            "commitOid": hub.revision(repo)})

    def do_PUT(self):
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path.split("/")[-1]
        self.server.blobs[self.path.split("/")[-1]] = content
        self.answer()

    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            repo = "/".join(path.split("/")[3:5])
            if repo not in hub.repos:
                return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            if "/tree/" in path:
                return self.answer([{"type": "file", "path": name, "size": len(data), "oid": etag(data)}
                                    for name, data in hub.repos[repo].items()])
            return self.answer({"id": repo, "modelId": repo, "sha": hub.revision(repo), "private": repo in hub.private,
                                "siblings": [{"rfilename": name} for name in hub.repos[repo]], "tags": [],
                                "downloads": 0, "likes": 0})
        repo, _, rest = path.strip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        content = hub.repos.get(repo, {}).get(name)
        if content is None:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound")
        self.answer(content, ETag=f'"{etag(content)}"', X_Repo_Commit=hub.revision(repo))

    do_HEAD = do_GET


@pytest.fixture
def there(monkeypatch, tmp_path):
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {"ENDPOINT": server.address, "HF_HUB_CACHE": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": True,
                        "HUGGINGFACE_CO_URL_TEMPLATE": template}.items():
        monkeypatch.setattr(hub.constants, name, value)
    monkeypatch.setattr(hub.hf_api.api, "endpoint", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run():
    images = load("synthetic", "train").take(torch.arange(0, 3920, 49))
    made = pretrain(CONFIG, images, progress=False)
    evaluate(made, images, images, [0, 2], probes=["knn"], scale=0.25, progress=False)
    evaluation._recent.clear()
    return made


def content(run) -> dict[str, bytes]:
    return {path.relative_to(run.path).as_posix(): path.read_bytes() for path in run.path.rglob("*")
            if path.is_file() and not path.name.startswith(".")}


@pytest.mark.parametrize("weights", [WEIGHTS, HALF])
def test_what_is_pushed_is_pulled_as_it_was(run, there, weights, capsys):
    if weights == HALF:
        runs.write_half(run, run.path / HALF)
        (run.path / WEIGHTS).unlink()
    before, patches = content(run), torch.rand(3, 3, 8, 8)
    expected = load_encoder(run)(patches)
    assert cli.main(["runs", "push", run.key, "ann/patches"]) == 0
    assert capsys.readouterr().out.strip() == f"{there.address}/ann/patches"
    assert set(there.repos["ann/patches"]) > {FILES[weights], "config.json", "README.md", "metrics.json"}
    shutil.rmtree(run.path)
    assert cli.main(["runs", "pull", "ann/patches"]) == 0
    assert content(run) == before and run.finished
    shutil.rmtree(run.path)
    encoder = bagssl.load("hub:ann/patches")
    assert torch.equal(encoder(patches), expected)
    assert content(pull("ann/patches")) == before  # again, over what is there


def test_a_dry_run_writes_the_folder_and_asks_nobody(run, monkeypatch, tmp_path):
    card, folder = hub.ModelCard, tmp_path / "dry"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not even installed
    assert push(run.path.name, "ann/patches", folder=folder) == str(folder)
    text = (folder / "README.md").read_text()
    about = card(text).data  # the hub's own reader
    assert about.library_name == "bagssl" and about.license == "mit" and about.datasets == ["synthetic"]
    (result,) = about.eval_results
    assert result.metric_type == "accuracy" and 0 < result.metric_value < 1
    assert 'bagssl.load("hub:ann/patches")' in text
    assert {"model.safetensors", "config.json", "history.csv", "metrics.json", "provenance.json"} < {
        path.name for path in folder.iterdir()}
    with pytest.raises(InputError, match="is not empty"):
        push(run.path.name, "ann/patches", folder=folder)
    with pytest.raises(InputError, match=r"pip install 'bagssl\[hub\]'"):
        push(run.path.name, "ann/patches")


@pytest.mark.parametrize(("change", "line"), [
    ({"model.safetensors": lambda data: data[:-1] + bytes([data[-1] ^ 1])}, "SHA-256"),
    ({"model.safetensors": None}, "lacks model.safetensors"), ({"metrics.json": None}, "holds no run of bagssl"),
    ({"history.csv": None}, "lacks history.csv"),
    ({"history.csv": lambda data: data.replace(b"1", b"2", 1)}, "damaged"),
    ({"config.json": lambda data: data.replace(b'"seed": 0', b'"seed": 1')}, "damaged"),
])  # fmt: skip
def test_what_was_damaged_there_is_refused_and_nothing_kept(run, there, change, line):
    push(run.key, "ann/patches")
    shutil.rmtree(run.path)
    for name, changed in change.items():
        data = there.repos["ann/patches"].pop(name)
        if changed:
            there.repos["ann/patches"][name] = changed(data)
    with pytest.raises(InputError, match=line) as error:
        pull("ann/patches")
    assert "\n" not in str(error.value) and not any(each.finished for each in runs.list_runs())


def test_what_the_hub_refuses_is_one_line(run, there, capsys):
    assert cli.main(["runs", "pull", "ann/nothing"]) == 2
    assert cli.main(["runs", "push", run.key, "no/such/name"]) == 2
    there.denied = True
    assert cli.main(["runs", "push", run.key, "ann/patches"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("bagssl: hub:") for line in lines) and "HF_TOKEN" in lines[2]
    there.shutdown()
    there.server_close()
    for words in (["pull", "ann/patches"], ["push", run.key, "ann/patches"], ["pull", "nonsense"]):
        assert cli.main(["runs", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_private_repository_is_made_private_and_a_name_of_no_run_is_refused(run, there):
    push(run.key, "ann/hidden", private=True)
    assert there.private == {"ann/hidden"}
    with pytest.raises(InputError, match="no run is called"):
        push("0000", "ann/patches")
    (run.path / WEIGHTS).unlink()
    with pytest.raises(InputError, match="no weights to publish"):
        push(run.key, "ann/patches")
