"""Which device trains and embeds, in which precision, and what of it is compiled."""

import os

import torch

from bagssl.errors import InputError, check_choice
from bagssl.paths import cores, quota

COMPILE_FROM = 5_000_000  # crops on CUDA: compiling takes 10 to 30 s there, and spares 2 to 5 microseconds of each
COMPILED = ("none", "colours", "all", "graphs", "all+graphs")


def heed_quota() -> None:
    """No more threads than a container's quota leaves, which torch does not count: the others wait for each other.

    Nothing changes where there is no quota, or where $OMP_NUM_THREADS says how many.
    """
    if not os.environ.get("OMP_NUM_THREADS") and torch.get_num_threads() > quota():
        torch.set_num_threads(cores())


heed_quota()  # once: who imports this trains or embeds


def pick_device(name: str) -> str:
    """'auto' is what $BAGSSL_DEVICE says (cpu, cuda, mps), else CUDA where there is one, else the CPU.

    Raises InputError for a device that is not here.
    """
    if name != "auto":
        return name
    asked = os.environ.get("BAGSSL_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    check_choice("BAGSSL_DEVICE", asked, ("cpu", "cuda", "mps"))
    if asked != "cpu" and not (torch.cuda if asked == "cuda" else torch.backends.mps).is_available():
        raise InputError(f"BAGSSL_DEVICE = {asked}: torch {torch.__version__} finds no such device here")
    return asked


def room(nbytes: int, device: torch.device) -> bool:
    """Whether so many bytes more fit the device, which is asked of a GPU alone; what torch keeps in reserve is free."""
    if device.type != "cuda":
        return True
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return nbytes <= torch.cuda.mem_get_info(device)[0] + kept


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of the convolutions: 'auto' is bf16 where the hardware multiplies it, else fp32."""
    check_choice("precision", name, ("auto", "bf16", "fp32"))
    if name == "auto":
        native = (torch.cuda.is_bf16_supported() if device.type == "cuda" else
                  device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())  # fmt: skip
        name = "bf16" if native else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def pick_compiled(name: str, device: torch.device, crops: int, plain: bool = False) -> str:
    """What is made of a step: 'none'; by `torch.compile` the 'colours' of the crops, or 'all': the networks as well;
    'graphs': the whole step, replayed as one CUDA graph; 'all+graphs': both. 'auto' is what $BAGSSL_COMPILE says, else
    on CUDA graphs, and for a run of many `crops` both, elsewhere none.

    A graph is there at once; compiling takes a quarter of a minute for the colours and more for the networks; `bagssl
    bench compiled` shows what it is worth on a machine. Compiled results differ by rounding.
    plain: with several processes, or where activations are computed again, networks and steps stay as they are: of
    what is asked for the colours alone are compiled.
    """
    if name == "auto":
        on_cuda = "all+graphs" if crops >= COMPILE_FROM else "graphs"
        name = os.environ.get("BAGSSL_COMPILE") or (on_cuda if device.type == "cuda" else "none")
    check_choice("BAGSSL_COMPILE", name, COMPILED)
    if "graphs" in name and device.type != "cuda":
        raise InputError(f"BAGSSL_COMPILE = {name}: CUDA graphs need a GPU; set it to all, or none")
    return name if not plain or name in COMPILED[:2] else "colours" if name.startswith("all") else "none"
