"""Compare the bits of short trainings on this CPU with those on emulated CPUs of another maker and model.

`make check-bits` prints a line for each training, in up to 20 minutes, and then the verdict. It needs `qemu-x86_64`
(Debian's package qemu-user), which emulates AVX2 but not AVX-512.

With `cpu_kernels: portable` all CPUs must agree. The negative control is `native`: if all agree there too, this machine
proves nothing. Exit status: 0 the same bits, 1 other bits, 2 a mistake to fix, 3 this machine proves nothing.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from pipeline.core.errors import UserError, first_line, report_errors
from pipeline.core.processes import num_cores
from pipeline.models.cpu_kernels import PORTABLE
from tests.bits.training import NETWORKS, Bits

HOST = "this CPU"
EMULATED = ("EPYC-Milan", "Haswell")
TRAININGS = tuple((cpu, kernels) for kernels in ("portable", "native") for cpu in (*EMULATED, HOST))
"""The slow ones of each kind come first."""
EXIT_DIFFERS, EXIT_UNKNOWN = 1, 3
COLUMNS = "{:<9} {:<9} {:>7}  {:<11} {:<16} {:<10}  {:<8}  {:<10}"

Result = tuple[str, str, Bits]
"""CPU and kernels, of `TRAININGS`, and what was computed there."""


def run(cpu: str, kernels: str) -> list[Bits]:
    """Train all networks in a process on a CPU of `TRAININGS`; raises UserError where that fails."""
    command = [sys.executable, "-m", "tests.bits.training", kernels, *NETWORKS]
    emulator = [] if cpu == HOST else ["qemu-x86_64", "-cpu", cpu]
    environment = {name: value for name, value in os.environ.items() if name not in PORTABLE}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin while they wait hold up the emulation
    done = subprocess.run([*emulator, *command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the training on {cpu} failed: {first_line(done.stderr.strip().rpartition(chr(10))[2])}")
    return [Bits(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def run_all() -> Iterator[Result]:
    """Run `TRAININGS`, as many at a time as there are cores, and yield each result when it is there."""
    with ThreadPoolExecutor(num_cores()) as pool:
        running = {pool.submit(run, *training): training for training in TRAININGS}
        for done in as_completed(running):
            if done.exception():
                pool.shutdown(wait=False, cancel_futures=True)  # those that run end by themselves
            for bits in done.result():
                yield (*running[done], bits)


def differing(results: Sequence[Result], *, kernels: str) -> list[str]:
    """Name the trainings of which two CPUs have other bits."""
    found: dict[str, set[tuple[str, str]]] = {}
    for _, used, bits in results:
        if used == kernels:
            name = f"{bits.network} with {bits.threads} thread{'s' if bits.threads > 1 else ''}"
            found.setdefault(name, set()).add((bits.weights, bits.evaluation))
    return [name for name, hashes in found.items() if len(hashes) > 1]


def main() -> None:
    """Run and print all trainings, then the verdict."""
    with report_errors():
        if platform.machine() != "x86_64":
            raise UserError(f"found a {platform.machine()} CPU; allowed: x86_64, of which the bits are compared")
        if shutil.which("qemu-x86_64") is None:
            raise UserError("qemu-x86_64: not found; install it, as by `apt-get install qemu-user` on Debian")
        print(COLUMNS.format("kernels", "network", "threads", "run on", "CPU", "capability", "weights", "evaluation"))
        results = []
        for result in run_all():
            results.append(result)
            cpu, kernels, bits = result
            row = (kernels, bits.network, bits.threads, cpu, bits.cpu[:16], bits.capability)
            print(COLUMNS.format(*row, bits.weights[:8], bits.evaluation[:8]), flush=True)
    sys.exit(report(results))


def report(results: Sequence[Result]) -> int:
    """Print the verdict; return the exit status."""
    if {bits.capability for _, kernels, bits in results if kernels == "portable"} != {"AVX2"}:
        print(
            "portable: not all computed with AVX2: nothing is proven; take a CPU with AVX2 and qemu-user 7.2 or newer"
        )
        return EXIT_UNKNOWN
    if different := differing(results, kernels="portable"):
        print(f"portable: other bits on another CPU: {', '.join(different)}")
        return EXIT_DIFFERS
    print("portable: the same bits on all CPUs")
    if control := differing(results, kernels="native"):
        print(f"native, the control: other bits on another CPU, as they should be: {', '.join(control)}")
        return 0
    print("native, the control: the same bits too, so this machine proves nothing; take one with AVX-512")
    return EXIT_UNKNOWN


if __name__ == "__main__":
    main()
