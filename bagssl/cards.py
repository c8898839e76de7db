"""The card of a model, in Markdown as the hub reads it: what it is, how it was made, how good it is, how to load it."""

import contextlib
from typing import Any

import yaml

from bagssl.errors import InputError
from bagssl.objectives import OBJECTIVES
from bagssl.runs import Run, known, machine, read_json

CARD = "README.md"
PAPER = "https://arxiv.org/abs/2206.08954"
NOT_HERE = "Its weights are not in this record; what was measured of it is."


def card(run: Run, source: str | None = None) -> str:
    """The card of a finished run. source: what `bagssl.load` is given, by default its name."""
    config, metrics, record = run.config, run.metrics, run.provenance
    name, best = run.path.name, headline(run)
    trained = config["training"] != "untrained"
    here = run.has_weights or not trained  # random ones follow from their seed
    rows = {
        "network": f"{config['encoder']}, width {config['width']}, {config.get('stem', 'cifar')} stem: patches [n, 3, "
                   f"{config['size']}, {config['size']}] in [0, 1] → h",
        "data": f"{config['dataset']}, {metrics['images']:,} training images, SHA-256 {record['data'][:16]}…",
        "recipe": _recipe(config) if trained else "random weights, drawn from its seed",
        "seed": config["seed"],
        "crops seen": f"{metrics['crops']:,}",
        "accuracy": _accuracy(best) if best else "not measured",
        "machine": f"{machine(record['hardware'])}, {metrics['seconds']:,.0f} s",
        "made by": f"bagssl at commit {known(lambda: record['commit'][:12], 'unknown')}, torch "
                   f"{known(lambda: record['versions']['torch'], 'unknown')}",
        "weights": f"SHA-256 {metrics['weights_sha256'][:16]}…" + (
            ", here rounded to fp16" if run.halved else "" if here else ", not in this record"),
        "licence": "MIT, as the code; the images have terms of their own",
    }  # fmt: skip
    table = "\n".join(f"| {what} | {text} |" for what, text in rows.items())
    return f"""---
{yaml.safe_dump(metadata(run, best), sort_keys=False, allow_unicode=True).strip()}
---

# {name}

An encoder of image patches, of the reproduction of *Bag of Image Patch Embedding Behind the Success of
Self-Supervised Learning* ([arXiv 2206.08954]({PAPER})). An image is described by the mean of h over its patches.

| | |
| --- | --- |
{table}

{_loading(source or name, config["size"]) if here else NOT_HERE}

`history.csv` holds the loss along the training, `evaluations/` what was measured, each with its protocol.
"""


def _loading(source: str, size: int) -> str:
    return f"""```python
import bagssl

encoder = bagssl.load("{source}")
h = encoder(patches)  # float [n, 3, {size}, {size}] in [0, 1]
```"""


def metadata(run: Run, best: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the hub reads of a card: library, licence, data, and the accuracy that stands for the model."""
    config = run.config
    about = {"library_name": "bagssl", "license": "mit", "pipeline_tag": "image-feature-extraction",
             "datasets": [config["dataset"]],
             "tags": ["self-supervised", "patches", "bagssl", "arxiv:2206.08954"]}  # fmt: skip
    if best:
        result = {"task": {"type": "image-classification"},
                  "dataset": {"name": config["dataset"], "type": config["dataset"], "split": "test"},
                  "metrics": [{"type": "accuracy", "name": _protocol(best), "value": round(best["accuracy"] / 100, 6)}]}
        about["model-index"] = [{"name": run.path.name, "results": [result]}]
    return about


def headline(run: Run) -> dict[str, Any] | None:
    """The one row of all that was measured on a run's test images that stands for it: linear before kNN, h before z,
    the largest K, by a probe on all training images if there is one. None when nothing was measured."""
    found = []
    for path in sorted((run.path / "evaluations").glob("*.json")):
        with contextlib.suppress(InputError, KeyError):
            content = read_json(path)
            protocol = content["protocol"]
            if isinstance(protocol["test"], str) and not isinstance(protocol["scale"], list):
                whole = protocol["train"] == run.provenance.get("data")
                found += [((row["probe"] == "linear", row["feature"] == "h", whole, row["k"]), row)
                          for row in content["rows"]]
    return max(found, key=lambda each: each[0])[1] if found else None


def _recipe(config: dict[str, Any]) -> str:
    crops = (f"patches of {config['patch_scale']:g} of the image's area" if config["training"] == "patch-based"
             else f"random resized crops of at least {config['min_scale']:g} of the area")  # fmt: skip
    options = "".join(f", {name} {value:g}" for name, value in config["options"].items())
    ends = f", ended after {config['until']:g}" if config.get("until") else ""
    reference = getattr(OBJECTIVES.get(config["objective"]), "reference", "")
    objective = config["objective"] + f" ({reference})" * bool(reference)
    return (f"{objective}{options} on {config['views']} {crops}, {config['batch_size']} images a step, "
            f"{config['epochs']:g} epochs{ends}; {config['optimiser']} at {config['learning_rate']:g}")  # fmt: skip


def _protocol(row: dict[str, Any]) -> str:
    bag = f"bag of {row['k']} patches" if row["k"] else "centre crop"
    return f"{row['probe']} probe on {row['feature']}, {bag}"


def _accuracy(row: dict[str, Any]) -> str:
    return f"{row['accuracy']:.2f} % (95 %: {row['low']:.2f} to {row['high']:.2f}), {_protocol(row)}"
