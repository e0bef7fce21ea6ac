"""`bits` as a field of every method: how it is written, what it refuses, and what it saves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from click.testing import CliRunner

from sparing import H2O, AdaKV, Evict, SnapKV, use
from sparing.cli import cli
from sparing.compare.environment import environment
from sparing.core.method import Method, Parts
from sparing.core.parsing import parse_method
from sparing.core.reader import Reader
from sparing.errors import CacheStateError, InvalidInputError, MethodRefusedError
from sparing.kernels import compact, native
from sparing.kernels.compact import CompactStore
from sparing.kernels.ragged import MIN_SLACK
from sparing.methods.kv.streaming_llm import Recency
from sparing.testing import CHECKS, Driver, random_prompt, run_check, tiny_model


def test_it_is_written_like_any_field():
    assert parse_method("snapkv(bits=4)", 0.3) == SnapKV(0.3, bits=4)
    assert parse_method("adakv(bits=8)").bits == 8
    evict = parse_method("snapkv(bits=4,min_prompt=7)+adaptive")
    assert (evict.bits, evict.min_prompt) == (4, 7)
    assert SnapKV(0.3, bits=16).code_bits is None


@pytest.mark.parametrize("bits", [3, 0, 32, -8, True, 4.0])
def test_other_precisions_are_refused(bits):
    with pytest.raises(InvalidInputError, match="bits"):
        SnapKV(0.3, bits=bits)


def test_text_that_is_no_number_is_refused():
    with pytest.raises(InvalidInputError, match="bits"):
        parse_method("snapkv(bits=four)")


class ReadsAll(Reader):
    pass


@dataclass(frozen=True)
class Reads(Method):
    def parts(self):
        from sparing.core.allocate import Uniform

        return Parts(Recency(), Uniform(), reader=ReadsAll())


def test_readers_refuse_codes_by_name():
    with pytest.raises(MethodRefusedError, match="codes"):
        Reads(0.5, bits=8)


def held(method, tokens: int = 320):
    model = tiny_model("llama", head_dim=64)
    with use(model, method) as session:
        cache = session.new_cache()
        Driver(model, cache).read(random_prompt(tokens))
        return session.report()


def test_fewer_bits_take_fewer_bytes():
    """Beside a window of 32 of 160 tokens: 2 pages of 64 a head, scales included, to the byte."""
    reports = {bits: held(SnapKV(0.5, bits=bits)) for bits in (None, 8, 4)}
    lanes, dim, positions, counts = 2 * 2, 64, 4, 8
    window = (compact.RECENT + MIN_SLACK) * (2 * dim * 4 + positions)
    window += 3 * 8  # where the lane starts, its length and its capacity
    for bits in (8, 4):
        page = 64 * (2 * dim * bits // 8 + 2 * 4 + positions) + 2 * dim * 4 + counts + 8
        # And the first page of each lane, one more per layer; and the tokens that each may hold.
        expected = lanes * (2 * page + window) + 2 * 8 * 3 + 8 * lanes
        assert reports[bits].bytes_kept == expected
    plans = [report.plan.tokens_kept for report in reports.values()]
    assert plans.count(plans[0]) == 3
    assert reports[4].bytes_kept < reports[8].bytes_kept < reports[None].bytes_kept


def test_everything_can_be_kept_as_codes():
    report = held(SnapKV(1.0, bits=4))
    assert report.plan.tokens_kept == 320 * 4
    assert report.share < 0.5


def test_cropping_into_codes_is_refused_and_leaves_all_layers_whole(monkeypatch):
    monkeypatch.setattr(compact, "PAGE", 4)
    monkeypatch.setattr(compact, "RECENT", 3)
    model, prompt = tiny_model("llama"), random_prompt(40, steps=12)
    with use(model, AdaKV(0.5, bits=8)) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        driver.read(prompt)
        session.report()
        driver.decode(prompt)
        before = [layer.store.lengths.clone() for layer in cache.evicting]
        with pytest.raises(CacheStateError, match="not coded yet"):
            cache.crop(-10)
        assert all(torch.equal(a, layer.store.lengths) for a, layer in zip(before, cache.evicting, strict=True))
        cache.crop(-2)
        assert all(torch.equal(a - 2, layer.store.lengths) for a, layer in zip(before, cache.evicting, strict=True))


def test_a_step_scorer_keeps_its_size_and_its_memory(monkeypatch):
    """100 tokens through a cache of 24 as codes: pages thin out, are made anew, and the bytes stay bounded."""
    monkeypatch.setattr(compact, "PAGE", 4)
    monkeypatch.setattr(compact, "RECENT", 3)
    model, prompt = tiny_model("llama"), random_prompt(40, steps=100)
    with use(model, H2O(24, bits=8)) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        driver.read(prompt)
        session.report()
        most = []
        for token in prompt.forced.split(1, dim=1):
            driver.feed(token)
            most.append(cache.bytes_kept)
            for layer in cache.evicting:
                assert layer.store.lengths.tolist() == [24, 24]
                # No lane's pages are less than half full for longer than it takes to fill one.
                held, pages = sum(layer.store._held), len(layer.store.pages.lanes)
                assert pages * 4 <= 2 * held + 2 * (4 + 4)
    assert max(most[50:]) <= 1.3 * max(most[:20])


def test_generation_with_beams_and_a_drafter_works_on_codes(monkeypatch):
    monkeypatch.setattr(compact, "PAGE", 4)
    monkeypatch.setattr(compact, "RECENT", 6)
    model, prompt = tiny_model("llama", torch.float64), random_prompt(50)
    with use(model, SnapKV(0.6, window=8, bits=8)):
        plain = model.generate(prompt.ids, max_new_tokens=12, do_sample=False)
        drafted = model.generate(prompt.ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=2)
        beams = model.generate(prompt.ids, max_new_tokens=12, do_sample=False, num_beams=3)
    assert plain.shape == beams.shape == drafted.shape
    assert plain.shape[1] == 62


def test_the_recipe_with_another_allocator_keeps_it():
    assert isinstance(parse_method("snapkv(bits=8)+global"), Evict)
    assert parse_method("snapkv(bits=8)+global").code_bits == 8


def test_attention_that_forgets_the_codes_is_noticed(monkeypatch):
    monkeypatch.setattr(compact, "PAGE", 8)
    monkeypatch.setattr(compact, "RECENT", 2)
    run_check(CHECKS["output_is_faithful"], partial(SnapKV, bits=8))
    monkeypatch.setattr(CompactStore, "lane", lambda store, index: store.window.lane(index))
    with pytest.raises(AssertionError):
        run_check(CHECKS["output_is_faithful"], partial(SnapKV, bits=8))


def test_the_environment_says_which_kernel_decodes():
    assert environment()["kernel"] == native.status()
    listed = CliRunner().invoke(cli, ["methods"])
    assert native.status() in listed.output
    assert "bits=4" in listed.output
