"""What a reader sees of training in a notebook: messages of a real kernel, as JupyterLab gets them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import pytest
import torch
from jupyter_client.manager import start_new_kernel

from bagssl import runs
from bagssl.config import PretrainConfig
from bagssl.data import load
from bagssl.pretraining import pretrain

TINY = {"width": 8, "size": 8, "batch_size": 16, "views": 2, "projector_hidden": 16, "projector_dim": 8}
SETUP = """
import torch
from pathlib import Path
from bagssl.config import PretrainConfig
from bagssl.data import load
from bagssl.pretraining import pretrain
torch.set_num_threads(1)
images = load("synthetic", "train").take(torch.arange(0, 4000, 50))  # 80 images: 5 steps an epoch
"""
LONG = 1000  # epochs that no test waits for


@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel(kernel_name="python3", startup_timeout=120)
    assert errors(listen(client, SETUP)) == []
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def listen(client, code: str) -> Iterator[dict]:
    """Run a cell; its messages as they come, until it has ended."""
    cell = client.execute(code)
    while True:
        message = client.get_iopub_msg(timeout=300)
        if message["parent_header"].get("msg_id") == cell:
            if message["content"].get("execution_state") == "idle":
                return
            yield message


def of(messages: list[dict], kind: str) -> list[dict]:
    return [message["content"] for message in messages if message["msg_type"] == kind]


def errors(messages) -> list[dict]:
    return of(list(messages), "error")


def text(message: dict) -> str:
    return message["content"].get("data", {}).get("text/plain", "")


def train(root, **settings) -> str:
    return f"run = pretrain(PretrainConfig(**{TINY | settings}), images, Path({str(root)!r}))"


def interrupted(kernel, cell: str, sign: str) -> list[dict]:
    """The messages of a cell that is interrupted once, when it has shown `sign` in an output."""
    manager, client = kernel
    messages, sent = [], False
    for message in listen(client, cell):
        messages.append(message)
        if not sent and re.search(sign, text(message)):
            manager.interrupt_kernel()
            sent = True
    assert sent
    return messages


def checkpoint(root) -> dict:
    (path,) = root.glob("*/checkpoint.pt")
    return torch.load(path, weights_only=True)


def test_training_shows_one_line_that_replaces_itself_and_goes(kernel, tmp_path):
    messages = list(listen(kernel[1], train(tmp_path, epochs=4)))
    (shown,) = of(messages, "display_data")
    updates = of(messages, "update_display_data")
    assert {update["transient"]["display_id"] for update in updates} == {shown["transient"]["display_id"]}
    assert "<progress" in shown["data"]["text/html"]
    assert updates[-1]["data"] == {"text/plain": "", "text/html": ""}
    assert of(messages, "stream") == errors(messages) == []
    (run,) = runs.list_runs(tmp_path)
    assert run.finished


def test_interrupted_it_stops_at_a_checkpoint_says_so_in_one_line_and_goes_on_from_there(kernel, tmp_path):
    cell = train(tmp_path, epochs=LONG)
    first = interrupted(kernel, cell, "loss")
    (error,) = errors(first)
    before = checkpoint(tmp_path)
    assert error["ename"] == "Stopped"
    assert error["evalue"].endswith(f"stopped at step {before['step']} of {5 * LONG}; the next call goes on from there")
    assert error["traceback"] == [f"Stopped: {error['evalue']}"]
    assert of(first, "update_display_data")[-1]["data"]["text/plain"] == ""  # no bar is left to look alive

    second = interrupted(kernel, cell, "loss")
    after = checkpoint(tmp_path)
    assert 0 < before["step"] < after["step"]
    assert f'value="{before["step"] / (5 * LONG):.3f}"' in of(second, "display_data")[0]["data"]["text/html"]
    # with the speeds that the first run measured
    assert after["history"][: len(before["history"])] == before["history"]


def test_a_run_that_is_trained_elsewhere_is_waited_for_and_not_trained_again(kernel, tmp_path):
    config, images = PretrainConfig(**TINY, epochs=2), load("synthetic", "train").take(torch.arange(0, 4000, 50))
    run = runs.open_run(config.to_dict(), images.fingerprint, config.label, tmp_path)
    trained = pretrain(config, images, tmp_path / "elsewhere", device="cpu", progress=False)
    cell = train(tmp_path, epochs=2) + "; print(run.finished)"
    with runs.locked(run):
        stopped = interrupted(kernel, cell, "waiting for it")
        (error,) = errors(stopped)
        assert error["traceback"] == [f"Stopped: {error['evalue']}"]
        assert f"{run.path.name} is still being trained by another process" in error["evalue"]

        messages = listen(kernel[1], cell)
        said = next(message for message in messages if message["msg_type"] == "display_data")
        assert text(said) == f"{run.path.name} is being trained by another process: waiting for it"
        shutil.copytree(trained.path, run.path, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
    rest = list(messages)
    assert [update["data"]["text/plain"] for update in of(rest, "update_display_data")] == [""]
    assert of(rest, "display_data") == errors(rest) == []  # no bar: nothing was trained
    assert [stream["text"] for stream in of(rest, "stream")] == ["True\n"]


def test_wrong_input_is_one_sentence_and_a_bug_keeps_its_traceback(kernel):
    (error,) = errors(listen(kernel[1], "PretrainConfig(epochs=-1)"))
    assert (error["ename"], error["evalue"]) == ("InputError", "epochs = -1.0 is outside 0 to 1e+06")
    assert error["traceback"] == ["InputError: epochs = -1.0 is outside 0 to 1e+06"]
    (error,) = errors(listen(kernel[1], "pretrain(None, images)"))
    assert error["ename"] == "AttributeError" and "pretraining.py" in "".join(error["traceback"])
