"""Choose PyTorch's kernels on the CPU: those with the same bits on every x86-64 CPU, or the fastest ones.

By default, PyTorch and its libraries choose kernels by the instruction set and the maker of the CPU. The last bits of
their results differ.
"""

import os
import platform
import sys

import torch

from pipeline.core.errors import UserError
from pipeline.params import CpuKernels, TrainParams

# with these environment variables, PyTorch and its libraries compute the same bits on every x86-64 CPU with AVX2;
# MKL_CBWR=AVX2 would not be enough, as MKL then computes in another way on CPUs of AMD
PORTABLE = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}


def use_cpu_kernels(choice: CpuKernels, *, field: str) -> None:
    """Choose the kernels on the CPU; must be called before PyTorch's first operation in this process.

    Prints a warning to stderr where the choice is `portable` and this CPU has no AVX2. Raises UserError naming `field`
    where the choice is `portable` and PyTorch already computes with other kernels; this can be detected only on CPUs
    that have more than AVX2.
    """
    if choice == "native":
        return
    if not torch.cpu._is_avx2_supported():  # get_capabilities is public, but newer than PyTorch 2.11
        print(
            f"warning: {field} is portable, but this CPU ({platform.machine()}) has no AVX2: the last bits will differ "
            "from those that other CPUs compute; native, which is the same here, gives no warning",
            file=sys.stderr,
            flush=True,
        )
        return
    os.environ |= PORTABLE  # read at the first operation
    found = torch.backends.cpu.get_cpu_capability()
    if found != "AVX2":
        variables = " ".join(f"{name}={value}" for name, value in PORTABLE.items())
        raise UserError(
            f"{field} is portable, but PyTorch already computes with {found} in this process; allowed: AVX2, chosen "
            f"before PyTorch's first operation. Start Python again and do this first, or start it with {variables}"
        )


def cpu_kernels_in_use(params: TrainParams) -> str:
    """Return a text for the records: which kernels compute on the CPU, and whether the bits depend on the CPU."""
    if params.cpu_kernels == "portable" and not params.compile and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return "portable"
    reason = "train.compile" if params.compile else "no AVX2" if params.cpu_kernels == "portable" else "as chosen"
    return f"native ({reason}): another kind of CPU computes other bits"
