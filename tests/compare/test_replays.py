"""Methods that replay prompts, in a comparison: each pays for its own replay, once per budget, and for no other's."""

import time

import pytest
import torch

from sparing import TOVA, KVzip, SnapKV, SpecKV, use
from sparing.compare.engine import FULL, Engine
from sparing.loading import LoadedModel, ModelSpec
from sparing.methods.kv.kvzip import Reconstruction
from sparing.testing import random_prompt, run_method, tiny_model

torch.set_num_threads(1)
PAUSE = 0.2


@pytest.fixture(name="engine")
def tiny_engine():
    model = tiny_model("llama", torch.float64)
    loaded = LoadedModel(ModelSpec("tiny"), model, None, "tiny", 512)
    with use(model, FULL) as session:
        yield Engine(loaded, session)


def test_every_budget_is_charged_for_the_replay_and_no_other_method_is(engine, monkeypatch):
    calls, replay = [], Reconstruction.replay

    def slow(self, ids, drafted=None):
        calls.append(len(ids))
        time.sleep(PAUSE)
        return replay(self, ids)

    monkeypatch.setattr(Reconstruction, "replay", slow)
    contestants = [SnapKV(0.5), KVzip(0.5), KVzip(0.25), SnapKV(0.25), FULL]
    reading = engine.read(random_prompt(80).ids[0].tolist(), contestants)
    assert reading.seconds < PAUSE
    seconds = [engine.compress(reading, method).seconds - reading.seconds for method in contestants]
    assert calls == [80]
    assert [taken > PAUSE for taken in seconds] == [False, True, True, False, False]
    assert max(seconds) < 2 * PAUSE


def test_a_fork_is_what_a_cache_of_its_own_would_be(engine):
    """Also of a prompt whose reading other scorers watched, and after other methods have replayed theirs."""
    prompt = random_prompt(80)
    methods = [SpecKV(0.5, draft=tiny_model("llama", torch.float64, seed=1), lookahead=5), KVzip(0.4, chunk=30)]
    reading = engine.read(prompt.ids[0].tolist(), [*methods, SnapKV(0.5)])
    forks = [engine.compress(reading, method).cache for method in [SnapKV(0.5), *methods]][1:]
    for fork, method in zip(forks, methods, strict=True):
        alone = run_method(tiny_model("llama", torch.float64), method, prompt)
        assert {share for layer in fork.plan.overlap(alone.cache.plan) for share in layer} == {1.0}


def test_a_method_that_drops_while_decoding_does_so_in_a_likelihood_too(engine):
    """What a token sees is what it would see in generation: the same as fed by hand, one after the other."""
    prompt = random_prompt(80).ids[0].tolist()
    targets = random_prompt(30).ids[0].tolist()
    for method in (TOVA(0.25), SnapKV(0.25)):
        reading = engine.read(prompt, [method])
        compressed = engine.compress(reading, method)
        cache, rows = compressed.cache.clone(), [reading.next_logits]
        for target in targets[:-1]:
            rows.append(engine._forward([target], cache)[-1])
        loss = torch.nn.functional.cross_entropy(torch.stack(rows).float(), torch.tensor(targets)).item()
        # Logits of float64 are rounded to float32 before the loss, which is about 5: a unit in its last place.
        assert engine.mean_loss(compressed, [], targets, reading.next_logits) == pytest.approx(loss, abs=5e-7)


def test_what_another_method_needs_is_not_among_a_methods_bytes(engine):
    """KVzip needs the prompt's tokens, 4 or 8 bytes each; SnapKV and the full cache don't."""
    ids = random_prompt(80).ids[0].tolist()
    alone, together = engine.read(ids, [SnapKV(0.5), FULL]), engine.read(ids, [KVzip(0.5), SnapKV(0.5), FULL])
    for method in (SnapKV(0.5), FULL):
        held = [engine.compress(reading, method).cache.bytes_kept for reading in (alone, together)]
        assert held[0] == held[1]
    assert engine.compress(together, KVzip(0.5)).cache.tape.ids is not None
