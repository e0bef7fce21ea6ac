"""The native kernels: attention of one new token over ragged lanes, at the speed of memory, and of a prompt by blocks.

Built when the package is installed, where there is a C++ compiler; without it everything works in torch, slower.
`status()` says in one line which it is.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparing.kernels.compact import CompactStore

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
_LIBRARY = Path(__file__).parent / "libsparing_kernels.so"
_TYPES = (torch.float32, torch.bfloat16)


class PrefillJob(ctypes.Structure):
    """What the prefill kernel is given; sparse_prefill.h says what each field is. See `sparse.native_prefill`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "queries", "keys", "values", "blocks", "columns", "column_starts", "out", "lse",
        )),
        *((name, ctypes.c_int32) for name in (
            "query_heads", "heads", "tokens", "start", "dim", "value_dim", "size", "groups", "blocks_per_group",
        )),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )  # fmt: skip


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled library; None if it was not built, or is switched off by SPARING_NATIVE=0."""
    if os.environ.get("SPARING_NATIVE") == "0" or not _LIBRARY.exists():
        return None
    try:
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError:
        return None
    if not hasattr(library, "sparing_sparse_prefill"):  # built from older sources
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.sparing_ragged_decode.argtypes = [
        number, number, number, number, number, number, pointer, pointer, pointer, pointer, pointer, pointer,
        ctypes.c_float, pointer, pointer,
    ]  # fmt: skip
    library.sparing_coded_decode.argtypes = [
        *[number] * 7, *[pointer] * 10, ctypes.c_float, pointer, pointer,
    ]  # fmt: skip
    library.sparing_sparse_prefill.argtypes = [number, number, number, ctypes.POINTER(PrefillJob)]
    library.sparing_sparse_prefill.restype = None
    return library


def status() -> str:
    """One line: which kernel decodes, and why."""
    library = _library()
    if library is not None:
        return f"native kernels: on ({INSTRUCTION_SETS[library.sparing_best_isa()]})"
    if os.environ.get("SPARING_NATIVE") == "0":
        return "native kernels: off (SPARING_NATIVE=0)"
    fix = "python -m sparing.kernels.native.build"
    return f"native kernels: off, torch computes (no C++ compiler when installed; with one, run `{fix}`)"


def is_built() -> bool:
    """True if the native kernels are there and not switched off."""
    return _library() is not None


def can_decode(query: Tensor, keys: Tensor, values: Tensor, group: int) -> bool:
    """True if there is a kernel for these tensors: on the CPU, float32 or bfloat16, a usual head size and group."""
    library = _library()
    return (
        library is not None
        and query.device.type == "cpu"
        and query.dtype == keys.dtype == values.dtype
        and keys.dtype in _TYPES
        and keys.shape[-1] == values.shape[-1]
        and bool(library.sparing_has_kernel(keys.shape[-1], group))
    )


def ragged_decode(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out[l, g] = Σ_t softmax_t(scaling · q[l, g] · k_t + bias_t) v_t over the tokens t of lane l.

    Args:
        queries: (lanes, G, D). keys, values: (capacity, D), contiguous, float32 or bfloat16; see `can_decode`.
        starts, lengths: (lanes,) int64; every lane holds at least one token.
        bias: (capacity,) float32, added to the logits of each stored token.
        instruction_set: one of INSTRUCTION_SETS; by default the best of this machine.

    Returns:
        (lanes, G, D) in the queries' dtype, and (lanes, G) float32 log-sum-exps, by which partial results are merged.
        Computed in float32 on `torch.get_num_threads()` threads.
    """
    library = _library()
    assert library is not None, status()
    lanes, group, dim = queries.shape
    exact = queries.float().contiguous()
    out, lse = torch.empty(lanes, group, dim), torch.empty(lanes, group)
    failed = library.sparing_ragged_decode(
        _isa(instruction_set), torch.get_num_threads(), lanes, group, dim, keys.dtype == torch.bfloat16,
        exact.data_ptr(), keys.data_ptr(), values.data_ptr(), _pointer(bias), starts.data_ptr(), lengths.data_ptr(),
        scaling, out.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    assert not failed, f"no kernel for head size {dim}, group {group}"
    return out.to(queries.dtype), lse


def can_decode_coded(queries: Tensor, store: CompactStore) -> bool:
    """True if there is a kernel for these queries (lanes, G, D) over codes and the window behind them."""
    library, bits, pages = _library(), store.coding.bits, store.pages
    if library is None or bits is None or store.coding.channels is not None:
        return False
    group, page = queries.shape[1], 16 if pages is None else pages.positions.shape[1]
    has_kernel = bool(library.sparing_has_coded_kernel(store.dims[0], group, bits, page))
    return has_kernel and can_decode(queries, store.window.keys, store.window.values, group)


def coded_decode(
    queries: Tensor, store: CompactStore, scaling: float, instruction_set: str | None = None
) -> tuple[Tensor, Tensor]:
    """As `ragged_decode`, over a window and the coded tokens before it.

    A page's key scales are folded into the query once, its zeros add a number to every logit, and a token's value scale
    and zero go into its weight: codes are widened, never decoded.
    """
    library, pages, window = _library(), store.pages, store.window
    assert library is not None, status()
    exact = queries.float().contiguous()
    out, lse = ragged_decode(
        exact, window.keys, window.values, window.starts, window.lengths, scaling, window.bias, instruction_set
    )
    if pages is not None:
        lanes, group, dim = queries.shape
        parts = (pages.keys, pages.key_scales, pages.key_zeros, pages.values, pages.value_scales, pages.value_zeros)
        failed = library.sparing_coded_decode(
            _isa(instruction_set), torch.get_num_threads(), lanes, group, dim, store.coding.bits, pages.keys.shape[1],
            exact.data_ptr(), *map(_pointer, parts), _pointer(pages.bias), pages.counts.data_ptr(),
            store.first_pages.data_ptr(), scaling, out.data_ptr(), lse.data_ptr(),
        )  # fmt: skip
        assert not failed, f"no kernel for head size {dim}, group {group}"
    return out.to(queries.dtype), lse


def sparse_prefill(job: PrefillJob, dtype: torch.dtype, instruction_set: str | None = None) -> None:
    """Run the prefill kernel on `torch.get_num_threads()` threads; what the job points to has to live until then."""
    library = _library()
    assert library is not None, status()
    library.sparing_sparse_prefill(_isa(instruction_set), torch.get_num_threads(), dtype == torch.bfloat16, job)


def _isa(name: str | None) -> int:
    library = _library()
    assert library is not None, status()
    best: int = library.sparing_best_isa()
    return best if name is None else INSTRUCTION_SETS.index(name)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
