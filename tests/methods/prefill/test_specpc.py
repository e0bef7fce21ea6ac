"""SpecPC and SpecKV-PC: the choice against plain loops, and prompts that are shortened before they are read."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from sparing import SnapKV, SpecKV, SpecKVPC, SpecPC, parse_method, use
from sparing.adapters.lens import ModelLens
from sparing.cli import cli
from sparing.compare.engine import FULL, Engine
from sparing.compare.store import ResultStore
from sparing.core.draft import Draft, Drafted
from sparing.core.prompt import Chosen
from sparing.errors import CacheStateError, InvalidInputError, MethodRefusedError
from sparing.loading import Drafts, LoadedModel, ModelSpec
from sparing.methods.prefill.specpc import Votes, best_neighbourhoods
from sparing.testing import random_prompt, run_check, tiny_model
from sparing.testing.contract import CHECKS
from sparing.testing.inspection import measured_bytes

torch.set_num_threads(1)

SETTINGS = {"max_new_tokens": 5, "do_sample": False}
SMALL = {"window": 8, "kernel_size": 4}


def draft(seed=1, **changes):
    return tiny_model("llama", seed=seed, **changes)


def kept_of(method, ids):
    """What the method keeps of a (1, n) prompt, asked by hand."""
    return method.choose(ModelLens(method.draft.model), ids[0]).kept


def greedy(model, ids, **more):
    """Without a mask, transformers would take tokens 0 for pads."""
    return model.generate(ids, **{"attention_mask": torch.ones_like(ids), **SETTINGS, **more})


# -- the choice ------------------------------------------------------------------------------------------------------


def slow_choice(scores, count, window, kernel_size):
    """The module's rule, one token at a time."""
    tokens = len(scores)
    before, after = (kernel_size - 1) // 2, kernel_size - 1 - (kernel_size - 1) // 2
    pooled = [max(scores[max(j - before, 0) : j + after + 1]) for j in range(tokens)]
    turn = list(range(tokens - 1, max(tokens - window, 0) - 1, -1))
    for best in sorted(range(tokens), key=lambda j: (-pooled[j], -scores[j], j)):
        for distance in range(kernel_size):
            turn += [best - distance] * (distance <= before) + [best + distance] * (0 < distance <= after)
    kept = []
    for j in turn:
        if 0 <= j < tokens and j not in kept and len(kept) < count:
            kept.append(j)
    return sorted(kept)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 8])
@pytest.mark.parametrize("window", [1, 5, 20, 50])
def test_the_choice(kernel_size, window):
    """Ties (scores in eighths) included, and counts on both sides of the window."""
    for count, seed in itertools.product((1, 4, 9, 17, 29, 39), range(3)):
        scores = (torch.rand(40, generator=torch.Generator().manual_seed(seed)) * 8).floor() / 8
        found = best_neighbourhoods(scores, count, window, kernel_size).tolist()
        assert found == slow_choice(scores.tolist(), count, window, kernel_size), (count, seed)
        assert len(found) == count
        assert all(a < b for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(("at", "near"), [(100, range(85, 117)), (3, range(20)), (190, range(175, 207))])
def test_a_planted_token_is_kept_with_its_neighbours(at, near):
    """k = 32 keeps p - 15 .. p + 16, cut at the prompt's ends, and of a tight budget the nearest, left ones first."""
    scores = torch.zeros(300)
    scores[at] = 1.0
    window = range(236, 300)
    assert best_neighbourhoods(scores, 64 + len(near), 64, 32).tolist() == sorted({*near, *window})
    assert best_neighbourhoods(scores, 64 + 4, 64, 32).tolist() == [at - 2, at - 1, at, at + 1, *window]


def test_the_window_comes_first_and_of_it_the_most_recent():
    scores = torch.linspace(1, 0, 50)
    assert best_neighbourhoods(scores, 6, 8, 1).tolist() == [44, 45, 46, 47, 48, 49]
    assert best_neighbourhoods(scores, 10, 8, 1).tolist() == [0, 1, *range(42, 50)]


def slow_votes(maps, tokens, window, first_layer):
    """The most weighted attention to every token, of (Hq, rows, tokens and more) maps per layer."""
    best = [0.0] * tokens
    for rows in maps[first_layer:]:
        for head in rows.tolist():
            for i in range(tokens - window, len(head)):
                weight = min((i - (tokens - window) + 1) / window, 1.0)
                best = [max(best[j], weight * head[i][j]) for j in range(tokens)]
    return torch.tensor(best)


@pytest.mark.parametrize(("name", "first_layer"), [("llama", 0), ("llama", 1), ("gemma3", 0), ("gpt_oss", 0)])
@pytest.mark.parametrize("lookahead", [1, 20])
def test_the_votes(name, first_layer, lookahead):
    """Of whole maps: what every row pays, rows of written tokens included (more of them than a sliding window has)."""
    model, tokens, window = tiny_model(name, torch.float64), 30, 6
    prompt = random_prompt(tokens).ids
    votes = Votes(tokens, window, first_layer)
    with ModelLens(model).hooked(attention=votes):
        written = Draft(model).write(prompt[0].tolist(), lookahead)
    assert len(written) == lookahead
    assert list(written) == greedy(model, prompt, max_new_tokens=lookahead)[0, tokens:].tolist()
    fed = torch.cat([prompt, torch.tensor([written[:-1]], dtype=torch.int64)], dim=1)
    eager = tiny_model(name, torch.float64, attn_implementation="eager")
    maps = [rows[0].detach() for rows in eager(fed, output_attentions=True).attentions]
    # Eager attention takes its softmax in float32, and what that rounds goes through the next layers.
    torch.testing.assert_close(votes.scores, slow_votes(maps, tokens, window, first_layer), atol=1e-5, rtol=0)


def test_the_first_row_of_the_window_counts_and_so_does_a_window_of_one():
    """Of two tokens the first row sees only itself: 1/2 for the older one at least, and of a window of one row all."""
    prompt, model, found = random_prompt(2).ids, draft(), []
    for window in (2, 1):
        votes = Votes(2, window, 0)
        with ModelLens(model).hooked(attention=votes), torch.no_grad():
            model(prompt)
        found.append(votes.scores)
    assert float(found[0][0]) >= 0.5
    assert bool((found[1] > 0).all())
    assert slow_votes([torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])], 2, 2, 0).tolist() == [0.5, 1.0]


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_reads_the_short_prompt_and_returns_the_whole_one():
    """What comes after it is what the untouched model writes after the tokens that stay, at contiguous positions."""
    model, prompt = tiny_model("llama"), random_prompt(70).ids
    method = SpecPC(0.5, draft(), **SMALL)
    kept = kept_of(method, prompt)
    wanted = greedy(tiny_model("llama"), prompt[:, kept])[:, 35:]
    with use(model, method) as session:
        assert greedy(model, prompt).tolist() == torch.cat([prompt, wanted], dim=1).tolist()
        assert model.generate(input_ids=prompt, **SETTINGS)[:, 70:].tolist() == wanted.tolist()
        assert model.generate(inputs=prompt, **SETTINGS)[:, 70:].tolist() == wanted.tolist()
        more = greedy(model, prompt, return_dict_in_generate=True, output_logits=True)
        assert more.sequences.tolist() == torch.cat([prompt, wanted], dim=1).tolist()
        assert len(more.logits) == 5
        report = session.report()
    assert report.prompt.dropped == (35,)
    assert "35 of the prompt's 70 tokens read, chosen by specpc" in str(report)
    assert report.tokens_seen == 35 + 4


@pytest.mark.parametrize("keep", [70, 1000, 1.0, 0.999])
def test_a_budget_that_holds_the_prompt_changes_nothing(keep):
    """Not a bit of the logits, and the draft model is never asked."""
    model, prompt, asked = tiny_model("llama"), random_prompt(70).ids, draft()
    asked.generate = lambda *args, **kwargs: pytest.fail("the draft model was asked")
    more = {"return_dict_in_generate": True, "output_logits": True}
    wanted = greedy(tiny_model("llama"), prompt, **more)
    with use(model, SpecPC(keep, asked, **SMALL)) as session:
        found = greedy(model, prompt, **more)
        cache = session.prefill(prompt)
        assert cache.get_seq_length() == 70
    assert found.sequences.equal(wanted.sequences)
    assert all(a.equal(b) for a, b in zip(found.logits, wanted.logits, strict=True))


@pytest.mark.parametrize("keep", [1, 5, 9, 33, 69, 0.1, 0.25, 0.5, 0.9])
def test_the_budget_is_exact(keep):
    model, prompt = tiny_model("llama"), random_prompt(70).ids
    wanted = keep if type(keep) is int else math.floor(70 * keep + 0.5)
    with use(model, SpecPC(keep, draft(), **SMALL)) as session:
        cache = session.prefill(prompt)
    assert cache.get_seq_length() == (70 if keep == 1 else wanted)  # a budget of 1 is the ratio 1


def test_a_short_prompt_loses_nothing_under_a_ratio():
    model, prompt = tiny_model("llama"), random_prompt(31).ids
    with use(model, SpecPC(0.5, draft(), **SMALL)) as session:
        assert session.prefill(prompt).get_seq_length() == 31
    with use(model, SpecPC(0.5, draft(), min_prompt=0, **SMALL)) as session:
        assert session.prefill(prompt).get_seq_length() == 16


@pytest.mark.parametrize("lengths", [(70, 41), (41, 70, 55), (33, 20)])
def test_a_row_of_a_padded_batch_gives_what_it_gives_alone(lengths):
    """With a row below `min_prompt`, which loses nothing and becomes the longest, among them."""
    model, prompt = tiny_model("llama", torch.float64), random_prompt(*lengths)
    method = SpecPC(0.5, tiny_model("llama", torch.float64, seed=1), **SMALL)
    with use(model, method) as session:
        together = greedy(model, prompt.ids, attention_mask=prompt.mask)
        report = session.report()
        implied = model.generate(prompt.ids, **SETTINGS)
        chunked = session.prefill(prompt.ids, 7, prompt.mask)
        for row in range(len(lengths)):
            alone = prompt.row(row)
            single = greedy(model, alone.ids)
            assert together[row, prompt.length :].tolist() == single[0, alone.length :].tolist()
            assert session.report().prompt.dropped[0] == report.prompt.dropped[row]
    assert together[:, : prompt.length].equal(prompt.ids)
    assert implied.equal(together)
    assert chunked.get_seq_length() == report.prompt.length


@pytest.mark.parametrize(("lengths", "row"), [((70, 41), 1), ((70, 31), 1), ((31, 70), 1)])
def test_a_row_that_is_taken_from_a_batch_goes_on_alone(lengths, row):
    """Whether it is the longest of the short prompts, has lost nothing, or both."""
    model, prompt, turn = tiny_model("llama", torch.float64), random_prompt(*lengths), random_prompt(9, seed=2).ids
    method, rows, single = SpecPC(0.5, tiny_model("llama", torch.float64, seed=1), **SMALL), [row], prompt.row(row)
    with use(model, method) as session:
        cache = session.prefill(prompt.ids, 16, prompt.mask)
        cache.batch_select_indices(torch.tensor(rows))
        ids, mask = torch.cat([prompt.ids[rows], turn], dim=1), torch.cat([prompt.mask[rows], turn * 0 + 1], dim=1)
        found = greedy(model, ids, attention_mask=mask, past_key_values=cache)
        alone = session.prefill(single.ids)
        wanted = greedy(model, torch.cat([single.ids, turn], dim=1), past_key_values=alone)
        assert session.report(cache).prompt.dropped == session.report(alone).prompt.dropped
        assert cache.get_seq_length() == cache.shortening.length + 9 + 4
    assert found[:, prompt.length + 9 :].equal(wanted[:, single.length + 9 :])


def test_beams_and_several_answers():
    model, prompt = tiny_model("llama"), random_prompt(70).ids
    method = SpecPC(30, draft(), **SMALL)
    kept = kept_of(method, prompt)
    for more in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        wanted = greedy(tiny_model("llama"), prompt[:, kept], **more)[:, 30:]
        for given in (method, SnapKV(10_000, prompt=method)):
            with use(model, given):
                found = greedy(model, prompt, **more)
            assert found[:, 70:].equal(wanted)
            assert found[:, :70].equal(prompt.expand(len(wanted), -1))


def test_lengths_are_those_of_the_whole_prompt():
    model, prompt = tiny_model("llama"), random_prompt(70).ids
    config = GenerationConfig(max_length=77, do_sample=False)
    with use(model, SpecPC(30, draft(), **SMALL)):
        assert model.generate(prompt, max_length=77, do_sample=False).shape == (1, 77)
        assert model.generate(prompt, generation_config=config).shape == (1, 77)
        assert model.generate(prompt, max_length=77, min_length=75, do_sample=False).shape == (1, 77)
        with pytest.warns(UserWarning, match="default `max_length`"):
            assert model.generate(prompt, do_sample=False).shape == (1, 90)  # 20 new ones
    assert config.max_length == 77


def test_a_streamer_sees_the_whole_prompt():
    class Streamer:
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, prompt, streamer = tiny_model("llama"), random_prompt(70).ids, Streamer()
    with use(model, SpecPC(30, draft(), **SMALL)):
        out = greedy(model, prompt, streamer=streamer)
    assert streamer.seen == out[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("way", ["generate", "prefill"])
def test_later_turns_are_read_whole(way):
    """Behind the short prompt; the caller passes everything so far, as ever."""
    plain, model, prompt = tiny_model("llama"), tiny_model("llama"), random_prompt(70).ids
    method = SpecPC(30, draft(), **SMALL)
    turns = [random_prompt(n, seed=n).ids for n in (9, 40)]
    short = prompt[:, kept_of(method, prompt)]
    with use(model, method) as session:
        cache = session.new_cache()
        if way == "generate":
            so_far, short = greedy(model, prompt, past_key_values=cache), greedy(plain, short)
        else:
            so_far = prompt
            assert session.prefill(prompt, 16, cache=cache) is cache
        for turn in turns:
            so_far, short = torch.cat([so_far, turn], dim=1), torch.cat([short, turn], dim=1)
            if way == "prefill":
                session.prefill(so_far[:, :-1], 7, cache=cache)
            so_far, short = greedy(model, so_far, past_key_values=cache), greedy(plain, short)
            assert so_far[:, 70:].equal(short[:, 30:])
        assert cache.get_seq_length() == short.shape[1] - 1


def test_plain_forwards_read_all_and_the_report_says_so():
    model, prompt = tiny_model("llama"), random_prompt(70).ids
    with use(model, SpecPC(30, draft(), **SMALL)) as session:
        model(prompt)
        assert any("read whole" in note for note in session.report().notes)
        assert session.report().prompt is None


# -- together with other methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.25, 20])
def test_what_is_stored_stays_a_share_of_the_whole_prompt(keep):
    model, prompt = tiny_model("llama"), random_prompt(80).ids
    with use(model, SnapKV(keep, window=4, prompt=SpecPC(0.5, draft(), **SMALL))) as session:
        cache = session.prefill(prompt)
    heads = [len(head) for layer in cache.plan.layers for head in layer.kept[0]]
    assert heads == [20] * 4
    assert cache.get_seq_length() == 40
    full = DynamicCache(config=model.config)
    tiny_model("llama")(prompt, past_key_values=full)
    assert cache.report().bytes_full == measured_bytes(full)
    assert cache.report().bytes_kept == pytest.approx(measured_bytes(cache), rel=0.05)


def test_more_than_is_read_cannot_be_stored():
    model, prompt = tiny_model("llama"), random_prompt(80).ids
    with use(model, SnapKV(0.75, prompt=SpecPC(0.5, draft(), **SMALL))) as session:
        cache = session.prefill(prompt)
    assert {len(head) for layer in cache.plan.layers for head in layer.kept[0]} == {40}


def test_bytes_are_those_of_the_short_prompt():
    model, prompt = tiny_model("llama"), random_prompt(80).ids
    with use(model, SpecPC(0.25, draft(), **SMALL)) as session:
        short, whole = session.prefill(prompt), measured_bytes
        report = session.report(short)
    full = DynamicCache(config=model.config)
    tiny_model("llama")(prompt, past_key_values=full)
    assert report.bytes_full == measured_bytes(full)
    assert report.bytes_kept == pytest.approx(whole(full) / 4 + 20 * 8, rel=0.01)  # and which 20 columns were read
    assert short.density == pytest.approx(20 * 21 / (80 * 81))


def test_speckv_pc_is_both_with_one_draft():
    """The draft model writes once, after the whole prompt; SpecKV replays that behind the short one."""
    model, prompt, small = tiny_model("llama"), random_prompt(90).ids, draft()
    calls, write = [], small.generate

    def counted(*args, **kwargs):
        calls.append(args[0].shape[1])
        return write(*args, **kwargs)

    small.generate = counted
    both = SpecKVPC(16, small, 6, 4, 3, prompt_keep=45, prompt_window=8, prompt_kernel_size=4)
    parts = SpecKV(16, small, 6, 4, 3, prompt=SpecPC(45, small, 6, 8, 4))
    plans = []
    for method in (both, parts):
        with use(model, method) as session:
            said = greedy(model, prompt)
            plans.append(session.report().plan)
            assert said.shape == (1, 95)
            assert session.cache.shortening.length == 45
    assert calls == [90, 90]
    for mine, theirs in zip(plans[0].layers, plans[1].layers, strict=True):
        for a, b in zip(mine.kept[0], theirs.kept[0], strict=True):
            assert a.tolist() == b.tolist()
            assert len(a) == 16
    with use(model, parts) as session:  # by hand: SpecKV on the short prompt, told what was drafted after the whole
        cache, drafted = session.prefill(prompt), session.cache.shortening.drafted
    (replay,) = parts.parts().scorer.replay([1, 2], drafted)
    assert replay.ids == tuple(write(prompt, max_new_tokens=6, do_sample=False)[0, 90:].tolist())
    assert cache.shortening.in_whole(torch.arange(45)).tolist() == kept_of(parts.prompt, prompt).tolist()
    assert cache.shortening.in_whole(torch.tensor([45, 50])).tolist() == [90, 95]


def test_a_draft_of_another_model_is_not_replayed():
    mine, other = Draft(draft()), Draft(draft(seed=2))
    scorer = SpecKV(draft=mine, lookahead=3).parts().scorer
    ids = random_prompt(20).ids[0].tolist()
    own = mine.write(ids, 3)
    for drafted in (None, Drafted(other, 3, (1, 1, 1)), Drafted(mine, 2, (1, 1))):
        assert scorer.replay(ids, drafted)[0].ids == own
    assert scorer.replay(ids, Drafted(mine, 3, (5, 6, 7)))[0].ids == (5, 6, 7)


@pytest.mark.parametrize(
    "check",
    ["fields_are_stored_unchanged", "keeping_all_is_exact", "kept_counts_match_the_budget", "leaves_no_trace"],
)
def test_speckv_pc_keeps_promises_of_kv_methods(check):
    run_check(CHECKS[check], functools.partial(SpecKVPC, draft=draft(), lookahead=6))


def test_no_trace_in_the_draft_model():
    model, small = tiny_model("llama"), draft()
    before, config = dict(vars(small)), small.config.to_dict()
    with use(model, SpecPC(30, small, **SMALL)):
        greedy(model, random_prompt(70).ids)
    assert vars(small) == before
    assert small.config.to_dict() == config
    assert small.config._attn_implementation == "sdpa"


# -- text, names and refusals ------------------------------------------------------------------------------------------


def test_as_text():
    small = draft()
    given = functools.partial(parse_method, keep=0.25, load_draft={"tiny": small}.__getitem__)
    assert given("specpc(draft=tiny,window=8)") == SpecPC(0.25, small, window=8)
    assert given("specpc(draft=tiny,keep=0.5) & snapkv") == SnapKV(0.25, prompt=SpecPC(0.5, small))
    three = given("specpc(draft=tiny,keep=512) & block_top_k(keep=0.5) & snapkv")
    assert three.prompt == SpecPC(512, small)
    assert three.prefill == parse_method("block_top_k", 0.5)
    assert three.keep == 0.25
    assert given("specpc(draft=tiny) & block_top_k").shortening == SpecPC(draft=small)
    assert given("speckv_pc(draft=tiny)+adaptive").shortening == SpecPC(2048, small, 64)
    for wrong in ("snapkv & specpc(draft=tiny)", "specpc(draft=tiny) & specpc(draft=tiny)", "snapkv & snapkv",
                  "specpc(draft=tiny) & speckv_pc(draft=tiny)"):  # fmt: skip
        with pytest.raises(MethodRefusedError, match="prompt method & prefill method & KV method"):
            given(wrong)
    with pytest.raises(MethodRefusedError, match="use specpc alone"):
        given("specpc(draft=tiny)+adaptive")
    with pytest.raises(InvalidInputError, match="draft"):
        parse_method("specpc(draft=tiny)")


@pytest.mark.parametrize("recipe", [SpecPC, SpecKV, SpecKVPC])
def test_two_drafts_are_two_methods(recipe):
    first, second = draft(1), draft(2)
    assert repr(recipe(draft=first)) == repr(recipe(draft=draft(1)))
    assert repr(recipe(draft=first)) != repr(recipe(draft=second))
    assert recipe(draft=first) != recipe(draft=second)
    assert recipe(draft=first) == recipe(draft=Draft(first))


def test_refusals_when_it_is_built():
    small = draft()
    for wrong in ({"window": 0}, {"kernel_size": 0}, {"lookahead": 0}, {"first_layer": -1}, {"keep": 0}):
        with pytest.raises(InvalidInputError, match=next(iter(wrong))):
            SpecPC(**{"draft": small, **wrong})
    for nothing in (None, "bundled", 3):
        with pytest.raises(InvalidInputError, match=r"specpc\(draft=NAME\)"):
            SpecPC(draft=nothing)
    with pytest.raises(MethodRefusedError, match="share in"):
        SpecPC("1MiB", small)
    with pytest.raises(MethodRefusedError, match="prompt=this"):
        SpecPC(draft=small, bits=8)
    with pytest.raises(InvalidInputError, match="drops prompt tokens"):
        SnapKV(prompt=SnapKV())
    for wrong in ({"prompt_keep": 0}, {"lookahead": 0}, {"first_layer": -1}):
        with pytest.raises(InvalidInputError):
            SpecKVPC(draft=small, **wrong)
    with pytest.raises(MethodRefusedError, match="by itself"):
        SpecKVPC(draft=small, prompt=SpecPC(draft=small))


def test_a_draft_model_that_does_not_fit_is_refused_before_anything_runs():
    model = tiny_model("llama")
    with pytest.raises(MethodRefusedError, match="very model"):
        use(model, SpecPC(draft=model))
    with pytest.raises(MethodRefusedError, match="of 65 tokens, this one of 64"):
        use(model, SpecPC(draft=draft(vocab_size=65)))
    with (
        pytest.raises(MethodRefusedError, match="first_layer is 2"),
        use(model, SpecPC(0.5, draft(), first_layer=2)) as session,
    ):
        session.prefill(random_prompt(70).ids)
    with (
        pytest.raises(MethodRefusedError, match="made for 69 tokens"),
        use(model, SpecPC(0.5, draft(max_position_embeddings=69))) as session,
    ):
        session.prefill(random_prompt(70).ids)


def test_prompts_that_cannot_be_shortened_are_refused():
    model, prompt = tiny_model("llama"), random_prompt(70, 40)
    with use(model, SpecPC(30, draft(), **SMALL)) as session:
        with pytest.raises(CacheStateError, match="pads must be on the left"):
            greedy(model, prompt.ids, attention_mask=prompt.mask.flip(1))
        with pytest.raises(InvalidInputError, match="token ids"):
            model.generate(inputs_embeds=model.get_input_embeddings()(prompt.ids[:1]), **SETTINGS)
        with pytest.raises(InvalidInputError, match="token_type_ids"):
            greedy(model, prompt.ids, attention_mask=prompt.mask, token_type_ids=prompt.mask)
        cache = session.prefill(prompt.ids[:1])
        with pytest.raises(InvalidInputError, match="the 70 of the prompt"):
            greedy(model, prompt.ids[:1, :40], past_key_values=cache)
        with pytest.raises(CacheStateError, match="not shortened as snapkv"):
            session.watching_cache([session.method]).fork(SnapKV())
        with pytest.raises(InvalidInputError, match="read the prompt alike"):
            session.watching_cache([session.method, SnapKV()])


def test_a_method_that_returns_too_much_is_caught():
    class Greedy(SpecPC):
        def choose(self, lens, ids):
            return Chosen(torch.arange(len(ids)))

    model = tiny_model("llama")
    with use(model, Greedy(30, draft())) as session, pytest.raises(AssertionError):
        session.prefill(random_prompt(70).ids)


# -- compare -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    return ModelSpec("bundled", "float32", "cpu").load()


def test_the_engine_reads_the_short_prompt(loaded):
    small = Drafts(ModelSpec(dtype="float32", device="cpu"))("bundled")
    ids = torch.randint(3, 2000, (300,), generator=torch.Generator().manual_seed(0))
    method = SpecPC(100, small)
    with use(loaded.model, FULL) as session:
        engine = Engine(loaded, session)
        reading = engine.read(ids.tolist(), [method])
        compressed = engine.compress(reading, method)
        loss = engine.mean_loss(compressed, [5, 6], [7, 8, 9])
    short = torch.cat([ids[kept_of(method, ids[None])], torch.tensor([5, 6, 7, 8, 9])])
    with torch.no_grad():
        logits = loaded.model(short[None]).logits[0]
    assert reading.next_logits.tolist() == pytest.approx(logits[99].tolist(), abs=1e-4)
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits[101:104], short[102:])), abs=1e-4)
    assert compressed.cache.bytes_full == pytest.approx(3 * compressed.cache.bytes_kept, rel=0.01)


def test_compare_on_the_bundled_model_with_itself_as_the_draft_model(tmp_path):
    names = "specpc(draft=bundled,window=16),specpc(draft=bundled,keep=0.5) & snapkv," \
            "speckv_pc(draft=bundled,prompt_keep=0.5,lookahead=4),snapkv"  # fmt: skip
    words = ["compare", "--methods", names, "--keep", "0.25", "--samples", "1", "--lengths", "256", "--device", "cpu",
             "--tasks", "needle_single,perplexity", "--mode", "query-aware", "--out", str(tmp_path)]  # fmt: skip
    cli.main(words, standalone_mode=False)
    with ResultStore(tmp_path) as store:
        short = {row["method"]: row["method"].partition("(")[0] + "&" * ("&" in row["method"]) for row in store.rows()}
        rows = {(short[row["method"]], row["task"]): row for row in store.rows()}
    assert len(rows) == 10
    for (name, task), row in rows.items():
        assert row["bytes_full"] == rows["full", task]["bytes_full"]
        if name == "specpc":
            assert row["bytes_kept"] / row["bytes_full"] == pytest.approx(0.25, abs=0.01)
            assert row["density"] == pytest.approx(0.25**2, abs=0.01)
        if name in ("specpc&", "speckv_pc"):
            assert row["bytes_kept"] / row["bytes_full"] == pytest.approx(
                rows["snapkv", task]["bytes_kept"] / row["bytes_full"], abs=0.05
            )
            assert row["density"] == pytest.approx(0.25, abs=0.01)
        if name == "snapkv":
            assert row["density"] is None


def test_a_draft_model_with_another_tokenizer_is_refused(loaded):
    class Tokenizer:
        def get_vocab(self):
            return {"a": 0}

    drafts = Drafts(ModelSpec(dtype="float32", device="cpu"))
    assert drafts("bundled") is drafts("bundled")
    drafts.check(loaded)
    other = LoadedModel(ModelSpec("other"), loaded.model, Tokenizer(), "", None)
    with pytest.raises(MethodRefusedError, match="another tokenizer than other"):
        drafts.check(other)
