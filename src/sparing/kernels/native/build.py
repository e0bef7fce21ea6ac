"""Compiles the native kernels into one shared library, if this machine has a C++ compiler.

Run when the package is built (hatch_build.py), or by hand: `python -m sparing.kernels.native.build`. The library has a
plain C interface, so it does not depend on Python's or torch's version. Standard library only.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = HERE / "libsparing_kernels.so"

# Each is an .inc, compiled for every instruction set, and a .cpp with what is called from outside.
_KERNELS = ("ragged_decode", "sparse_prefill")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
# Instruction set → floats in a register, and what the compiler has to be told.
_PORTABLE = {"portable": (4, ())}
_X86 = {
    "avx2": (8, ("-mavx2", "-mfma")),
    "avx512": (16, ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512")),
}


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of c++, g++, clang++ on the path."""
    return next(
        filter(None, (shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None
    )


def build() -> Path:
    """Compile the library beside its sources.

    Raises:
        RuntimeError: no compiler, or it failed; the message is one line.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler (c++, g++ or clang++) was found")
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = (*_FLAGS, "-DSPARING_X86") if is_x86 else _FLAGS
    sets = _PORTABLE | (_X86 if is_x86 else {})
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [
            (*flags, *more, f"-DSPARING_ISA={isa}", f"-DSPARING_WIDTH={width}", "-x", "c++", "-c",
             str(HERE / f"{kernel}.inc"), "-o", f"{scratch}/{kernel}.{isa}.o")
            for kernel in _KERNELS for isa, (width, more) in sets.items()
        ]  # fmt: skip
        jobs += [(*flags, "-c", str(HERE / f"{kernel}.cpp"), "-o", f"{scratch}/{kernel}.o") for kernel in _KERNELS]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda job: _run(cxx, *job), jobs))
        made = Path(scratch) / LIBRARY.name
        _run(cxx, "-shared", "-pthread", *(str(o) for o in sorted(Path(scratch).glob("*.o"))), "-o", str(made))
        # Whole or not at all: another process may be loading the old one.
        beside = LIBRARY.with_suffix(f".{os.getpid()}")
        shutil.copy(made, beside)
        os.replace(beside, LIBRARY)
    return LIBRARY


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
        raise RuntimeError(f"{Path(command[0]).name}: {first.strip()}")


if __name__ == "__main__":
    try:
        print(f"native kernels: {build()}")
    except RuntimeError as error:
        sys.exit(f"native kernels not built: {error}")
