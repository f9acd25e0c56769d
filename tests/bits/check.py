"""Compare the results of short trainings, bit for bit, on this CPU and on emulated CPUs of other types.

`make check-bits` prints a line for each training, in up to 20 minutes, and then the result. It needs `qemu-x86_64`
(Debian's package qemu-user), which emulates AVX2 but not AVX-512.

With `cpu_kernels: portable`, all CPUs must give the same bits. The negative control is `native`: if the bits are the
same there too, the comparison on this machine proves nothing. Exit status: 0 the same bits, 1 other bits, 2 an error to
fix, 3 this machine proves nothing.
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
# CPU and kernels; the slow trainings of each kind come first
TRAININGS = tuple((cpu, kernels) for kernels in ("portable", "native") for cpu in (*EMULATED, HOST))
EXIT_DIFFERS, EXIT_UNKNOWN = 1, 3
COLUMNS = "{:<9} {:<9} {:>7}  {:<11} {:<16} {:<10}  {:<8}  {:<10}"

Result = tuple[str, str, Bits]  # CPU and kernels, as in TRAININGS, and the bits


def run(cpu: str, kernels: str) -> list[Bits]:
    """Train all networks in a new process on this CPU or an emulated one; raise UserError where that fails."""
    command = [sys.executable, "-m", "tests.bits.training", kernels, *NETWORKS]
    emulator = [] if cpu == HOST else ["qemu-x86_64", "-cpu", cpu]
    environment = {name: value for name, value in os.environ.items() if name not in PORTABLE}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin while they wait slow down the emulation
    done = subprocess.run([*emulator, *command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last_line = first_line(done.stderr.strip().rpartition("\n")[2])
        raise UserError(f"the training on {cpu} failed: {last_line}; fix that, then run this again")
    return [Bits(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def run_all() -> Iterator[Result]:
    """Run TRAININGS, as many at a time as there are cores, and yield each result as soon as it is complete."""
    with ThreadPoolExecutor(num_cores()) as pool:
        running = {pool.submit(run, *training): training for training in TRAININGS}
        for done in as_completed(running):
            if done.exception():
                pool.shutdown(wait=False, cancel_futures=True)  # running trainings end by themselves
            for bits in done.result():
                yield (*running[done], bits)


def differing(results: Sequence[Result], *, kernels: str) -> list[str]:
    """Return the names of the trainings whose bits differ between CPUs."""
    hashes: dict[str, set[tuple[str, str]]] = {}
    for _, used, bits in results:
        if used == kernels:
            name = f"{bits.network} with {bits.threads} thread{'s' if bits.threads > 1 else ''}"
            hashes.setdefault(name, set()).add((bits.weights, bits.evaluation))
    return [name for name, different in hashes.items() if len(different) > 1]


def main() -> None:
    """Run all trainings, print a line for each, then the result."""
    with report_errors():
        if platform.machine() != "x86_64":
            raise UserError(f"found a {platform.machine()} CPU; allowed: x86_64; run this on such a machine")
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
    """Print the result of the comparison; return the exit status."""
    if {bits.capability for _, kernels, bits in results if kernels == "portable"} != {"AVX2"}:
        print(
            "portable: not all CPUs computed with AVX2, so this proves nothing; use a CPU with AVX2 and qemu-user 7.2 "
            "or newer"
        )
        return EXIT_UNKNOWN
    if different := differing(results, kernels="portable"):
        print(f"portable: other bits on another CPU: {', '.join(different)}")
        return EXIT_DIFFERS
    print("portable: the same bits on all CPUs")
    if control := differing(results, kernels="native"):
        print(f"native, the control: other bits on another CPU, as they should be: {', '.join(control)}")
        return 0
    print("native, the control: the same bits too, so this machine proves nothing; use one with AVX-512")
    return EXIT_UNKNOWN


if __name__ == "__main__":
    main()
