"""The Triton decode kernel: what it computes (in a process of its own), and that it compiles for GPUs not at hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install triton --no-deps; it needs no GPU)")


def test_it_is_attention():
    """All of triton_cases.py, on the GPU if there is one, else in Triton's interpreter."""
    mode = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    cases = Path(__file__).with_name("triton_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env=os.environ | mode, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("architecture", "dtype", "dim", "group", "biased"),
    [(80, "bf16", 128, 4, True), (90, "fp16", 80, 1, False), (86, "fp32", 256, 17, True)],
)
def test_it_compiles(architecture, dtype, dim, group, biased, tmp_path, monkeypatch):
    """To machine code, without a GPU: the interpreter takes Python that the compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sparing.kernels import triton_decode as decode

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    padded, size = decode._padded(dim), 4 if dtype == "fp32" else 2
    constants = {
        "GROUP": group, "DIM": dim, "WIDTH": dim, "ROWS": decode._padded(group), "DIM_PAD": padded, "WIDTH_PAD": padded,
        "BLOCK": decode._block(dim * size), "SHORTEST": decode.SHORTEST, "SPLITS": 64,
    }  # fmt: skip
    types = dict.fromkeys(("queries", "keys", "values", "out"), f"*{dtype}")
    types |= dict.fromkeys(("parts", "part_lse", "lse"), "*fp32") | {"scaling": "fp32"}
    types |= dict.fromkeys(("starts", "lengths"), "*i64")
    types["bias"] = "*fp32" if biased else "constexpr"
    for kernel in (decode._attend_pieces, decode._merge_pieces):
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        fixed = {name: constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
        options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
        done = triton.compile(
            ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", architecture, 32), options=options
        )
        assert done.asm["cubin"]
        # What a block may have on the smallest of these GPUs.
        assert done.metadata.shared <= 99 * 1024
