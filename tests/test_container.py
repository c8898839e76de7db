"""The Dockerfile, where no Docker is: each of its steps in a bare Debian of its release, as its user (nightly)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KNOWN = ("FROM", "RUN", "USER", "WORKDIR", "COPY", "ARG", "EXPOSE", "CMD")


def steps(text: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, comments left out, continued lines joined."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in lines) if word]


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path of the checkout out; the last rule that fits counts."""
    out = False
    for rule in (ROOT / ".dockerignore").read_text().split():
        pattern = re.escape(rule.lstrip("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(f"{pattern}(/.*)?", path):
            out = not rule.startswith("!")
    return out


def test_the_dockerfile_is_of_known_steps_and_leaves_out_what_is_not_its_own():
    said = steps((ROOT / "Dockerfile").read_text())
    assert said[0] == ("FROM", "debian:bookworm-slim") and {word for word, _ in said} <= set(KNOWN)
    users = [rest for word, rest in said if word == "USER"]
    assert users and "root" not in users  # what is run at the end is not root's
    for word, rest in said:
        if word == "COPY":
            for name in rest.split()[1:-1]:
                assert (ROOT / name).exists() and not ignored(name), name
    left = {name: ignored(name) for name in ("data/cifar10.safetensors", "data/README.md", ".venv/bin/python",
                                             "results/runs/a/weights", "results/laptop/claims.md", "bagssl/cli.py",
                                             "bagssl/__pycache__/cli.pyc")}  # fmt: skip
    assert [name for name, out in left.items() if not out] == ["data/README.md", "results/laptop/claims.md",
                                                               "bagssl/cli.py"]  # fmt: skip


@pytest.mark.nightly
@pytest.mark.skipif(not shutil.which("debootstrap") or os.getuid() != 0, reason="needs debootstrap, and root")
def test_every_step_works_in_a_bare_debian_and_the_box_tells_what_it_can_do(tmp_path):
    """The steps as they stand, but for the index of PyTorch, which is the lock's (TORCH=): it may not be reached."""
    box, user, folder = tmp_path / "box", "root", "/"
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", box], check=True, stdout=subprocess.DEVNULL)
    for place in ("etc/resolv.conf", "etc/ssl/certs/ca-certificates.crt"):  # how this machine reaches the network
        if (there := Path("/", place)).exists():
            (box / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(there, box / place)
    network = {name: value for name, value in os.environ.items()
               if name.startswith(("SSL_", "UV_", "PIP_", "HTTP")) and name != "PIP_FIND_LINKS"}  # fmt: skip
    arguments: dict[str, str] = {}

    def run(command: str, **options) -> subprocess.CompletedProcess:
        home = "/root" if user == "root" else f"/home/{user}"
        script = f"cd {shlex.quote(folder)} && {command}"
        return subprocess.run(
            ["chroot", f"--userspec={user}:{user}", box, "/bin/sh", "-c", script], check=True, timeout=1800,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": home, **network, **arguments}, **options)  # fmt: skip

    for word, rest in steps((ROOT / "Dockerfile").read_text()):
        if word == "RUN":
            run(rest)
            if "apt-get" in rest and (there := Path("/etc/ssl/certs/ca-certificates.crt")).exists():
                shutil.copyfile(there, box / there.relative_to("/"))  # the step has written Debian's own
        elif word == "USER":
            user = rest
        elif word == "WORKDIR":
            folder = rest
            (box / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)  # root's, where it is not there yet
        elif word == "ARG":
            arguments[rest.partition("=")[0]] = ""
        elif word == "COPY":
            owner, *names, target = rest.split()
            owner = owner.removeprefix("--chown=")
            copy(names, (box / folder.lstrip("/") / target).resolve())
            names = os.listdir(ROOT) if names == ["."] else names
            inside = [str(Path(folder, target, Path(name).name)) for name in names]
            inside = [each for each in map(os.path.normpath, inside) if (box / each.lstrip("/")).exists()]
            subprocess.run(["chroot", box, "chown", "-R", f"{owner}:{owner}", *inside], check=True)
        elif word == "CMD":
            assert rest == '["make", "reproduce"]'
    said = run("id -un && .venv/bin/bagssl list", capture_output=True, text=True).stdout
    assert said.startswith("reader\n") and "patch-vs-multiscale-cifar10" in said
    said = run("git status --short && .venv/bin/bagssl pretrain --set epochs=0.1", capture_output=True, text=True)
    assert "results/runs/synthetic-" in said.stdout


def copy(names: list[str], target: Path) -> None:
    """What COPY does of files and of the whole folder, of tracked files and git's own."""
    if names == ["."]:
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        names = [name for name in tracked.splitlines() if (ROOT / name).exists() and not ignored(name)]
        shutil.copytree(ROOT / ".git", target / ".git")
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(ROOT / name, target / Path(name).name)
