"""FlexAttention: one compilation for all lengths, against the gathered path. Takes half a minute to compile."""

import shutil

import pytest
import torch

from sparing.core.pattern import Pattern
from sparing.core.scorer import Softmax
from sparing.kernels.sparse import attend_sparse, flexible
from sparing.kernels.sparse.gather import attend_gathered

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention on a CPU needs a C++ compiler")


def problem(tokens, size=64, heads=2, share=0.4, start=0, dtype=torch.float32, **more):
    g = torch.Generator().manual_seed(tokens)
    blocks = -(-tokens // size)
    on = torch.rand(heads, blocks - start // size, blocks, generator=g) < share
    query, keys, values = (torch.randn(heads, n, 32, generator=g).to(dtype) for n in (tokens - start, tokens, tokens))
    return query, keys, values, Pattern(tokens, start, size, on, **more)


@pytest.mark.slow
def test_lengths_share_one_compilation(monkeypatch):
    monkeypatch.setenv("SPARING_FLEX", "1")
    softmax = Softmax(0.2)
    with torch.no_grad():
        for tokens in (512, 700, 1024, 333):
            given = problem(tokens)
            assert flexible.offers(given[0], given[3], softmax, needs_lse=False)
            got = attend_sparse(*given, softmax, needs_lse=False)
            wanted = attend_gathered(*given, softmax)
            # Two orders of summing a weighted mean of values below 5.
            assert float((got.out - wanted.out).abs().max()) < 200 * torch.finfo(torch.float32).eps
    assert not flexible._failed


def test_what_a_cpu_does_not_get(monkeypatch):
    softmax = Softmax(0.2)
    given = problem(200)
    assert not flexible.offers(given[0], given[3], softmax, needs_lse=False), "not asked for"
    monkeypatch.setenv("SPARING_FLEX", "1")
    assert not flexible.offers(given[0], given[3], softmax, needs_lse=True)
    assert not flexible.offers(given[0], given[3], Softmax(0.2, softcap=3.0), needs_lse=False)
    later = problem(200, start=64)
    assert not flexible.offers(later[0], later[3], softmax, needs_lse=False)
    ruled = problem(200, rule=lambda row, key: row - key < 9)
    assert not flexible.offers(ruled[0], ruled[3], softmax, needs_lse=False)


def test_the_mask_function_says_what_the_table_says():
    """So that an eager fallback, which ignores the table, is right."""
    *_, p = problem(300, columns=torch.rand(2, 1, 300) < 0.1)
    reads, rows, keys = flexible._reads(p), torch.arange(300)[:, None], torch.arange(300)
    for head in range(2):
        said = reads(torch.tensor(0), torch.tensor(head), rows, keys)
        assert torch.equal(said, p.may_read(head, torch.arange(300)))


def test_a_failed_compilation_falls_back_and_says_so(monkeypatch):
    def fail(*args, **kwargs):
        raise flexible.InductorError(RuntimeError("no"), None)

    monkeypatch.setattr(flexible, "_compiled", lambda: fail)
    monkeypatch.setattr(flexible, "_failed", False)
    monkeypatch.setenv("SPARING_FLEX", "1")
    given, softmax = problem(300), Softmax(0.2)
    with pytest.warns(UserWarning, match="gathered instead"):
        got = attend_sparse(*given, softmax, needs_lse=False)
    assert torch.equal(got.out, attend_gathered(*given, softmax).out)
    assert not flexible.offers(given[0], given[3], softmax, needs_lse=False)
