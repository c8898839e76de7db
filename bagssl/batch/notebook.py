"""One notebook, executed: by papermill in the process that `kernels.Kernels` starts, or bare, as a script."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from bagssl.batch.kernels import KERNEL_KILLED
from bagssl.batch.stages import write_record
from bagssl.errors import shortage
from bagssl.parameters import notebook_cells
from bagssl.paths import write_atomically


def _execute(notebook: Path, target: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """Execute by papermill and write the normalised notebook; the error {ename, evalue, cell}, or {}."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    try:
        with _surroundings():
            executed = papermill.execute_notebook(
                notebook, target, parameters=parameters, cwd=notebook.parent, kernel_name="python3", language="python",
                progress_bar={"file": sys.stdout, "mininterval": 0, "bar_format": "cell {n_fmt}/{total_fmt}\n"},
                stdout_file=sys.stdout, stderr_file=sys.stdout)
    except papermill.PapermillExecutionError as error:
        return {"ename": error.ename, "evalue": error.evalue, "cell": error.exec_count}
    except DeadKernelError:
        return {"ename": KERNEL_KILLED, "evalue": "the kernel died: killed, or out of memory"}
    code = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
    if any(cell.execution_count is None or any(output.output_type == "error" for output in cell.outputs)
           for cell in code):  # papermill passes SystemExit
        return {"ename": "SystemExit", "evalue": "the notebook ended before its last cell"}
    normalise_notebook(target)
    return {}


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """A kernel of this very interpreter, and nothing of what the reader has set for Jupyter, IPython or matplotlib."""
    words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    with tempfile.TemporaryDirectory(prefix="bagssl-") as folder:
        kernel = Path(folder, "kernels", "python3")
        kernel.mkdir(parents=True)
        (kernel / "kernel.json").write_text(json.dumps({"argv": words, "language": "python", "display_name": ""}))
        Path(folder, "matplotlibrc").touch()
        names = ("JUPYTER_PATH", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR",
                 "MATPLOTLIBRC")  # fmt: skip
        with mock.patch.dict(os.environ, dict.fromkeys(names, folder)):
            yield


def normalise_notebook(path: Path) -> None:
    """Rewrite a notebook so that two executions differ only where results do.

    Kernel python3, no versions, times or widget state in the metadata; of a cell's metadata only the tags;
    ids from the source, execution counts in order, a stream in one piece.
    """
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: dict[str, int] = {}
    count = 0
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        name = hashlib.sha256(f"{cell.cell_type}\0{cell.source}".encode()).hexdigest()[:8]
        seen[name] = seen.get(name, 0) + 1
        cell.id = name if seen[name] == 1 else f"{name}-{seen[name]}"
        if cell.cell_type != "code":
            continue
        if cell.execution_count is not None:
            cell.execution_count = count = count + 1
        outputs = []
        for output in cell.outputs:
            if output.output_type == "display_data" and output.data.get("text/plain") == "":
                continue  # what a progress bar leaves
            if "execution_count" in output:
                output.execution_count = cell.execution_count
            if output.output_type == "stream" and outputs and outputs[-1].get("name") == output.name:
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        cell.outputs = outputs
    with write_atomically(path) as temporary:
        nbformat.write(notebook, temporary)


def error_line(error: Mapping[str, Any]) -> str:
    """cell [7]: ValueError: the first line of its message; or what the box lacks."""
    cell, name, message = f"cell [{error['cell']}]: " if error.get("cell") else "", error["ename"], str(error["evalue"])
    return cell + (shortage(name, message) or f"{name}: {(message.strip().splitlines() or [''])[0]}")


def failing_cell(error: BaseException, notebook: Path) -> str:
    """The last cell of a notebook, as `run_cells` names them, that an error went through; empty for none."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return next((frame.filename for frame in frames if frame.filename.startswith(notebook.name)), "")


def run_cells(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Execute the code of a notebook as one script, which needs no Jupyter; what would be shown is not.

    parameters: in the place of the notebook's own. Raises what a cell raises, from a frame that names the cell.
    """
    import matplotlib.pyplot

    matplotlib.use("Agg")

    def nothing(*words: Any, **options: Any) -> None: ...

    shown = types.ModuleType("IPython.display")
    vars(shown).update(dict.fromkeys(("display", "HTML", "Image", "Markdown", "SVG"), nothing))
    names: dict[str, Any] = {"__name__": "__main__", "display": nothing, "In": []}
    usual = sys.modules.get("IPython.display")
    sys.modules["IPython.display"] = shown
    try:
        for number, cell in enumerate((cell for cell in notebook_cells(notebook) if cell["cell_type"] == "code"), 1):
            names["In"].append("".join(cell["source"]))
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell [{number}]", "exec"), names)  # noqa: S102
            if "parameters" in cell["metadata"].get("tags", []):
                names.update(parameters)
    finally:  # this entry alone: what the cells have imported stays, and cannot be imported twice
        sys.modules.pop("IPython.display")
        if usual is not None:
            sys.modules["IPython.display"] = usual
        matplotlib.pyplot.close("all")


def _main() -> int:
    notebook, target = map(Path, sys.argv[1:3])
    parameters = json.loads(sys.stdin.readline())

    def leave_with_parent() -> None:
        sys.stdin.read()  # until the process that started this one is gone; the kernel then ends by itself
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    if error := _execute(notebook, target, parameters):
        write_record(target.with_name("error.json"), error)
    return 1 if error else 0


if __name__ == "__main__":
    sys.exit(_main())
