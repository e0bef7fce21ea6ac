"""SpAtten against a llama written out by hand, one token, head and key at a time, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

import sparing
from sparing import SpAtten
from sparing.adapters import cascade_hooks
from sparing.compare.engine import FULL
from sparing.core.cascade import falling
from sparing.core.scorer import KeyValues, Queries, Softmax
from sparing.errors import CacheStateError, InvalidInputError, MethodRefusedError, UnsupportedModelError
from sparing.measures.attention import column_mass
from sparing.methods.prefill.spatten import top_values
from sparing.testing.checks import traces
from sparing.testing.driving import Driver, random_prompt, run_method, run_untouched
from sparing.testing.inspection import held_positions, measured_bytes
from sparing.testing.models import TINY_MODELS, tiny_model
from tests.oracles import dense_attention, random_case

DEEP = {"num_hidden_layers": 6}


# -- the oracle -----------------------------------------------------------------------------------------------------


class HandLlama:
    """A llama that holds, per layer, the keys and values of whatever positions it was given.

    A cut is [layer] → how many tokens (heads) may enter; None for all.
    """

    def __init__(self, model):
        self.w = {name: t.double() for name, t in model.state_dict().items()}
        self.c = model.config
        self.layers, self.heads = self.c.num_hidden_layers, self.c.num_attention_heads
        self.group, self.dim = self.heads // self.c.num_key_value_heads, self.c.head_dim
        self.held = [{} for _ in range(self.layers)]  # position → (keys, values), each (KV heads, D)
        self.off = [set() for _ in range(self.layers)]  # heads that are not used
        self.gaps = []  # by how much the last survivor was better than the first who was not

    def norm(self, x, name):
        return x / (x.pow(2).mean() + self.c.rms_norm_eps).sqrt() * self.w[name]

    def rope(self, x, position):
        half = self.dim // 2
        angle = position * self.c.rope_parameters["rope_theta"] ** (-torch.arange(half).double() / half)
        a, b = x[:half], x[half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    def attention(self, layer, x, position, mass, loudness):
        """The output of one row; what it gives to others is added to `mass`, its heads' norms to `loudness`."""
        outs = []
        query = (self.w[f"model.layers.{layer}.self_attn.q_proj.weight"] @ x).view(self.heads, self.dim)
        for h in range(self.heads):
            q = self.rope(query[h], position)
            seen = [j for j in self.held[layer] if j <= position]
            logits = torch.stack([q @ self.held[layer][j][0][h // self.group] for j in seen]) / self.dim**0.5
            p = logits.softmax(0)
            for j, share in zip(seen, p.tolist(), strict=True):
                mass[j] = mass.get(j, 0.0) + share
            out = sum(share * self.held[layer][j][1][h // self.group] for j, share in zip(seen, p, strict=True))
            outs.append(torch.zeros_like(out) if h in self.off[layer] else out)
            loudness[h] += float(outs[-1].abs().sum())
        return self.w[f"model.layers.{layer}.self_attn.o_proj.weight"] @ torch.cat(outs)

    def block(self, layer, states, mass, loudness):
        name = f"model.layers.{layer}"
        normed = {at: self.norm(x, f"{name}.input_layernorm.weight") for at, x in states.items()}
        for at, x in normed.items():
            k = (self.w[f"{name}.self_attn.k_proj.weight"] @ x).view(-1, self.dim)
            v = (self.w[f"{name}.self_attn.v_proj.weight"] @ x).view(-1, self.dim)
            self.held[layer][at] = (torch.stack([self.rope(head, at) for head in k]), v)
        after = {}
        for at, x in states.items():
            x = x + self.attention(layer, normed[at], at, mass, loudness)
            y = self.norm(x, f"{name}.post_attention_layernorm.weight")
            gate, up = (self.w[f"{name}.mlp.{which}_proj.weight"] @ y for which in ("gate", "up"))
            after[at] = x + self.w[f"{name}.mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)
        return after

    def best(self, values, count, always=()):
        order = sorted(values, key=lambda unit: (unit not in always, -values[unit]))
        if count < len(order):
            self.gaps.append(values[order[count - 1]] - values[order[count]])
        return order[:count]

    def read(self, ids, start=0, tokens=None, heads=None):
        """The logits of every token; those that leave early say what they knew then."""
        states = {start + i: self.w["model.embed_tokens.weight"][token] for i, token in enumerate(ids)}
        last, mass, loudness, final = max(states), {}, dict.fromkeys(range(self.heads), 0.0), {}
        for layer in range(self.layers):
            if tokens is not None:
                values = {at: mass.get(at, 0.0) for at in states}
                stay = self.best(values, tokens[layer], {last})
                final |= states
                states = {at: states[at] for at in sorted(stay)}
            if heads is not None:
                alive = {h: v for h, v in loudness.items() if layer == 0 or h not in self.off[layer - 1]}
                self.off[layer] = set(range(self.heads)) - set(self.best(alive, heads[layer]))
            states = self.block(layer, states, mass, loudness)
        final |= states
        rows = [self.w["lm_head.weight"] @ self.norm(final[at], "model.norm.weight") for at in sorted(final)]
        return torch.stack(rows)


def compare_with_hand(method, tokens, heads=None, turn=0):
    """A prompt, some decoded tokens and maybe a second turn, through the model and by hand."""
    model, prompt = tiny_model("llama", torch.float64, **DEEP), random_prompt(40, steps=3)
    hand = HandLlama(model)
    # Norms and angles are in float32 in the model: what that does to a prompt that is read whole, and some more.
    lost = (HandLlama(model).read(prompt.ids[0]) - run_untouched(model, prompt)[0][0]).abs().max()
    exact = {"atol": 4 * float(lost), "rtol": 0.0}
    assert lost < 1e-4
    with sparing.use(model, method) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        torch.testing.assert_close(driver.read(prompt)[0], hand.read(prompt.ids[0], 0, tokens, heads), **exact)
        for step in range(3):
            said = driver.feed(prompt.forced[:, [step]])[0]
            torch.testing.assert_close(said, hand.read(prompt.forced[0, [step]], 40 + step), **exact)
        if turn:
            more, later = random_prompt(turn, seed=3), method.tokens(turn, 6, 1)
            cache.expect_prompt(43 + turn)
            torch.testing.assert_close(driver.feed(more.ids)[0], hand.read(more.ids[0], 43, later), **exact)
            said = driver.feed(more.forced[:, :1])[0]
            torch.testing.assert_close(said, hand.read(more.forced[0, :1], 43 + turn), **exact)
    for (_, [held]), mine in zip(sorted(held_positions(cache).items()), hand.held, strict=True):
        for head in held:
            assert head.tolist() == sorted(mine)
    assert min(hand.gaps) > 1e-4  # no choice hangs on float32


# -- how many -------------------------------------------------------------------------------------------------------


def test_counts_by_hand():
    # 6 layers of 32 tokens on average, 192; the first has 64. 128 are left for 5 layers, 0.4 of 64 each on average:
    # 0.6, 0.5, 0.4, 0.3, 0.2 of them, 38.4, 32, 25.6, 19.2, 12.8; the largest remainders are those of 12.8 and 25.6.
    assert SpAtten(keep=0.5).tokens(64, 6, 1) == [64, 38, 32, 26, 19, 13]
    assert SpAtten(keep=32).tokens(64, 6, 1) == [64, 38, 32, 26, 19, 13]
    assert SpAtten(keep=f"{32 * 120}B").tokens(64, 6, 120) == [64, 38, 32, 26, 19, 13]
    assert SpAtten(keep=0.5, slope=0.0).tokens(64, 6, 1) == [64, 26, 26, 26, 25, 25]
    assert SpAtten(keep=0.5, front=0.34).tokens(64, 6, 1) == [64, 64, 64, 1, 1, 1]  # 2.04 layers are 3
    assert SpAtten(keep=0.1).tokens(64, 6, 1) == [64, 1, 1, 1, 1, 1]  # the front alone exceeds it
    assert SpAtten(keep=0.1).tokens(31, 6, 1) == [31] * 6  # shorter than min_prompt
    assert SpAtten(keep_heads=0.75).heads(8, 4) == [8, 8, 6, 2]  # 24 in all, 16 of them in 2 layers in front


def test_counts_never_rise_and_sum_to_the_budget():
    for most in (1, 7, 64, 129):
        for layers in (2, 5, 12, 32):
            for keep in (0.05, 0.3, 0.61, 0.97, 1.0):
                for slope in (0.0, 0.5, 1.0):
                    total = int(keep * most * layers)
                    counts = falling(total, most, layers, 1, slope)
                    assert counts[0] == most
                    assert min(counts) >= 1
                    assert sorted(counts, reverse=True) == counts
                    assert sum(counts) == max(total, most + layers - 1)


# -- what is computed -----------------------------------------------------------------------------------------------


def test_equals_the_model_by_hand():
    compare_with_hand(SpAtten(keep=0.5), [40, 24, 20, 16, 12, 8])


def test_heads_equal_the_model_by_hand():
    method = SpAtten(keep=0.6, keep_heads=0.7)
    compare_with_hand(method, method.tokens(40, 6, 1), method.heads(4, 6))


def test_later_turns_equal_the_model_by_hand():
    compare_with_hand(SpAtten(keep=0.5), [40, 24, 20, 16, 12, 8], turn=34)


class LastRow(SpAtten):
    """Broken on purpose: importance by the last row alone."""

    def importance(self, queries, stored):
        last = replace(queries, valid=queries.valid & (queries.positions == queries.positions.max()))
        return column_mass(last, stored).sum(1)


def test_another_importance_is_noticed():
    with pytest.raises(AssertionError):
        compare_with_hand(LastRow(keep=0.5), [40, 24, 20, 16, 12, 8])


def test_importance_is_attention_received():
    case = random_case()
    queries = replace(case.queries, positions=torch.arange(13))
    wanted = torch.zeros(3, 13, dtype=torch.float64)
    for b, heads in enumerate(dense_attention(queries, case.stored)):
        for rows in heads:
            for i, row in enumerate(rows):
                if queries.valid[b, i]:
                    wanted[b] += torch.tensor(row, dtype=torch.float64)
    got = SpAtten().importance(queries, case.stored)
    torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=0)


def test_a_planted_token_stays_to_the_end():
    """Every query points at key 5, so 5 is paid by all; of the others, 0 is paid by the most rows."""
    keys = torch.zeros(1, 1, 8, 2)
    keys[0, 0, 5] = torch.tensor([6.0, 0.0])
    query = torch.tensor([1.0, 0.0]).expand(1, 2, 8, 2)
    valid, slots = torch.ones(1, 8, dtype=torch.bool), torch.arange(8)
    stored = KeyValues(keys, keys, valid[:, None], slots.expand(1, 1, 8), torch.zeros(1).long(), 0, 2, None)
    got = SpAtten().importance(Queries(query, slots, valid, Softmax(1.0)), stored)[0]
    # Rows 0-4 share evenly among all that they see: token 0 has 1 + 1/2 + 1/3 + 1/4 + 1/5 = 2.28 in each of 2 heads.
    # Rows 5-7 give e^6 of e^6 + 5, + 6, + 7 to token 5: 2.96.
    assert got.argsort(descending=True)[:2].tolist() == [5, 0]
    assert float(got[5]) == pytest.approx(2 * sum(403.4288 / (403.4288 + n) for n in (5, 6, 7)), abs=1e-3)
    assert float(got[0]) == pytest.approx(2 * (137 / 60 + sum(1 / (403.4288 + n) for n in (5, 6, 7))), abs=1e-3)


# -- values ---------------------------------------------------------------------------------------------------------


def test_all_values_are_dense_attention():
    case = random_case()
    got = top_values(case.queries, case.stored, torch.ones(3).double())
    for b, heads in enumerate(dense_attention(case.queries, case.stored)):
        for h, rows in enumerate(heads):
            wanted = torch.tensor(rows).float() @ case.stored.values[b, h // 2]
            torch.testing.assert_close(got[b, h], wanted, atol=1e-4, rtol=0)


def test_top_values_by_hand_and_within_their_bound():
    case = random_case()
    got = top_values(case.queries, case.stored, torch.full((3,), 0.4, dtype=torch.float64))
    longest = case.stored.values.double().norm(dim=-1).max()
    for b, heads in enumerate(dense_attention(case.queries, case.stored)):
        for h, rows in enumerate(heads):
            for i, row in enumerate(rows):
                row = torch.tensor(row, dtype=torch.float64)
                used = row.sort(descending=True).indices[: -(-2 * int((row > 0).sum()) // 5)]
                wanted = row[used] @ case.stored.values[b, h // 2].double()[used]
                torch.testing.assert_close(got[b, h, i].double(), wanted, atol=1e-4, rtol=0)
                error = (got[b, h, i].double() - row @ case.stored.values[b, h // 2].double()).norm()
                assert error <= (row.sum() - row[used].sum()) * longest + 1e-4


def test_values_alone_drop_nothing():
    model, prompt = tiny_model("llama", **DEEP), random_prompt(48)
    run = run_method(model, SpAtten(keep=1.0, value_keep=0.3), prompt)
    assert run.cache.plan.share == 1.0
    assert not torch.allclose(run.logits[0], run_untouched(model, prompt)[0], atol=1e-2)


# -- what is held ---------------------------------------------------------------------------------------------------


def test_survivors_are_nested_and_the_rest_is_gone():
    run = run_method(tiny_model("llama", **DEEP), SpAtten(keep=0.5), random_prompt(64))
    before = set(range(64))
    for layer, plan, count in zip(run.cache.evicting, run.cache.plan.layers, [64, 38, 32, 26, 19, 13], strict=True):
        kept = set(plan.kept[0][0].tolist())
        assert len(kept) == count
        assert kept <= before
        assert 63 in kept
        assert layer.keys.shape == (1, 2, count + 4, 8)  # real tensors, with what was decoded
        assert layer.get_seq_length() == 68
        before = kept
    assert run.cache.plan.share == 0.5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3", "deepseek_v3"])
def test_bytes_are_freed(name):
    deep = {"gpt2": {"n_layer": 4}, "gemma3": {}}.get(name, DEEP)
    model, prompt = tiny_model(name, **deep), random_prompt(300, steps=1)
    run = run_method(model, SpAtten(keep=0.6), prompt)
    full = run_method(model, SpAtten(keep=1.0), prompt).cache
    report = run.cache.report()
    assert report.bytes_kept == pytest.approx(measured_bytes(run.cache), rel=0.01)
    assert report.bytes_full == pytest.approx(measured_bytes(full), rel=0.01)
    # Positions and validity: 9 bytes a token and layer, beside 128 to 320 for a key and a value.
    evicting = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.evicting)
    assert (
        report.bytes_full - report.bytes_kept
        >= (1 - 0.6) * evicting - 9 * 0.6 * 300 * len(full.evicting) - evicting / 50
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3", "deepseek_v3", "phi3"])
def test_padded_rows_equal_single_rows(name):
    deep = {
        "gpt2": {"n_layer": 4},
        "gemma3": {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] + 3 * ["full_attention"]},
    }
    model = tiny_model(name, torch.float64, **deep.get(name, DEEP))
    prompt, method = random_prompt(64, 40, 20), SpAtten(keep=0.6, keep_heads=0.8)
    assert_rows_are_alone(model, method, prompt, TINY_MODELS[name].tolerance)


def test_padded_rows_equal_single_rows_with_pruned_values():
    # These are summed in float32: what that does to the untouched model's logits bounds it.
    prompt, model = random_prompt(64, 40, 20), tiny_model("llama", torch.float64, **DEEP)
    half = run_untouched(tiny_model("llama", **DEEP), prompt)[0].double() - run_untouched(model, prompt)[0]
    assert_rows_are_alone(model, SpAtten(keep=0.6, value_keep=0.9), prompt, 4 * float(half.abs().max()))


def assert_rows_are_alone(model, method, prompt, tolerance):
    together = run_method(model, method, prompt)
    for row, pad in enumerate(prompt.pads):
        alone = run_method(model, method, prompt.row(row))
        for mine, theirs in zip(together.cache.plan.layers, alone.cache.plan.layers, strict=True):
            assert (mine.kept[row][0] - pad).tolist() == theirs.kept[0][0].tolist()
        assert (together.logits[0][row, pad:] - alone.logits[0][0]).abs().max() < tolerance
        for a, b in zip(together.logits[1:], alone.logits[1:], strict=True):
            assert (a[row] - b[0]).abs().max() < tolerance


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral", "jamba"])
def test_keeping_all_changes_no_bit(name):
    model, prompt = tiny_model(name), random_prompt(50, 31)
    for mine, theirs in zip(
        run_method(model, SpAtten(keep=1.0), prompt).logits, run_untouched(model, prompt), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_eager_attention_says_the_same():
    prompt, said = random_prompt(64, 40), []
    for base in ("sdpa", "eager"):
        model = tiny_model("llama", **DEEP)
        model.set_attn_implementation(base)
        said.append(run_method(model, SpAtten(keep=0.5), prompt).logits[-1])
    assert (said[0] - said[1]).abs().max() < 1e-4


# -- through generate and comparisons -------------------------------------------------------------------------------


def greedy(model, method, prompt):
    run = run_method(model, method, replace(prompt, forced=prompt.forced[:, :0]))
    said, token = [], run.logits[0][:, -1:].argmax(-1)
    with sparing.use(model, method):
        driver = Driver(model, run.cache)
        driver.mask = prompt.mask
        for _ in range(6):
            said.append(token)
            token = driver.feed(token)[:, -1:].argmax(-1)
    return torch.cat(said, dim=1)


@pytest.mark.parametrize("more", [{}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 3}])
def test_generate(more):
    model, method = tiny_model("llama", **DEEP), SpAtten(keep=0.5, keep_heads=0.8)
    prompt = random_prompt(64) if more else random_prompt(64, 40)
    with sparing.use(model, method) as session:
        said = model.generate(prompt.ids, attention_mask=prompt.mask, max_new_tokens=6, do_sample=False, **more)
        assert session.cache.plan.share == pytest.approx(0.5, abs=0.02)
    if "num_beams" not in more:
        assert said[:, 64:].tolist() == greedy(model, method, prompt).tolist()


def test_drafts_behind_the_prompt_change_nothing():
    model, prompt, method = tiny_model("llama", torch.float64, **DEEP), random_prompt(64), SpAtten(keep=0.5)
    one = run_method(model, method, prompt)
    with sparing.use(model, method) as session:
        cache = session.new_cache()
        cache.expect_prompt(64)
        driver = Driver(model, cache)
        said = driver.feed(torch.cat([prompt.ids, prompt.forced], dim=1))
        assert (said[:, :64] - one.logits[0]).abs().max() < 1e-9
        for step in range(4):
            assert (said[:, 64 + step] - one.logits[1 + step]).abs().max() < 1e-9
        cache.crop(-3)
        driver.mask = driver.mask[:, :-3]
        assert (driver.feed(prompt.forced[:, 1:2])[:, -1] - one.logits[2]).abs().max() < 1e-9


def test_forks_and_clones_equal_a_run_of_its_own():
    model, prompt, method = tiny_model("llama", **DEEP), random_prompt(64), SpAtten(keep=0.5, keep_heads=0.8)
    alone = run_method(model, method, prompt)
    with sparing.use(model, FULL) as session:
        watching = session.watching_cache([method])
        driver = Driver(model, watching)
        assert torch.equal(driver.read(prompt), alone.logits[0])
        child = watching.fork(method)
        assert child.report().prefill.density == pytest.approx(alone.cache.report().prefill.density)
        for cache in (child.clone(), child):
            copy = Driver(model, cache)
            copy.mask = driver.mask
            for mine, theirs in zip(copy.decode(prompt), alone.logits[1:], strict=True):
                assert torch.equal(mine, theirs)
        with pytest.raises(CacheStateError, match="not read as"):
            watching.fork(SpAtten(keep=0.25))


def test_density_is_counted():
    run = run_method(tiny_model("llama", **DEEP), SpAtten(keep=0.5), random_prompt(64))
    pairs = [n * (n + 1) / 2 for n in (64, 38, 32, 26, 19, 13)]
    assert run.cache.report().prefill.density == pytest.approx(sum(pairs) / (6 * 64 * 65 / 2))


def test_reset_begins_anew():
    model, prompt, method = tiny_model("llama", **DEEP), random_prompt(64), SpAtten(keep=0.5, keep_heads=0.8)
    with sparing.use(model, method) as session:
        cache = session.new_cache()
        said = [Driver(model, cache).read(prompt), (cache.reset(), Driver(model, cache).read(prompt))[1]]
    assert torch.equal(*said)


@pytest.mark.parametrize(
    "check",
    [
        traces.check_leaves_no_trace,
        traces.check_leaves_no_trace_after_an_exception,
        traces.check_nested_use_is_refused,
        traces.check_caches_do_not_meet,
        traces.check_clones_are_independent,
    ],
)
def test_contract(check):
    check(SpAtten, "llama")


def test_hooks_that_stay_are_noticed(monkeypatch):
    monkeypatch.setattr(cascade_hooks.CascadeHooks, "remove", lambda self: None)
    with pytest.raises(AssertionError, match="left behind"):
        traces.check_leaves_no_trace(SpAtten, "llama")


# -- what is refused ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong:
    """Fields that are refused."""

    fields: dict
    error: type[Exception] = InvalidInputError


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong({"front": 1.0}),
        Wrong({"front": float("nan")}),
        Wrong({"slope": 1.1}),
        Wrong({"keep_heads": 0.0}),
        Wrong({"front_heads": -0.1}),
        Wrong({"value_keep": 1.5}),
        Wrong({"keep": 0.0}),
        Wrong({"bits": 8}, MethodRefusedError),
        Wrong({"prefill": sparing.BlockTopK(0.5)}, MethodRefusedError),
    ],
)
def test_wrong_fields(wrong):
    with pytest.raises(wrong.error):
        SpAtten(**wrong.fields)


def test_models_with_layers_that_need_every_token():
    late = tiny_model("gemma3", layer_types=["full_attention", "full_attention", "sliding_attention"])
    for model, what in ((late, "layer 2"), (tiny_model("jamba"), "has 1 with"), (tiny_model("gpt_oss"), "has 1 with")):
        with sparing.use(model, SpAtten()) as session, pytest.raises(MethodRefusedError, match=what):
            session.new_cache()


def test_chunks():
    model, prompt = tiny_model("llama", **DEEP), random_prompt(64)
    with sparing.use(model, SpAtten()) as session:
        with pytest.raises(MethodRefusedError, match="chunks"):
            session.prefill(prompt.ids, chunk_size=40)
        with pytest.raises(MethodRefusedError, match="chunks"):
            model.generate(prompt.ids, max_new_tokens=2, prefill_chunk_size=16)
        assert session.prefill(prompt.ids).plan.share == 0.5


def test_combinations():
    with pytest.raises(MethodRefusedError):
        sparing.parse_method("spatten+adaptive")
    with pytest.raises(MethodRefusedError):
        sparing.parse_method("spatten & snapkv")
    model = tiny_model("llama", **DEEP)
    with sparing.use(model, sparing.SnapKV(prefill=SpAtten())) as session, pytest.raises(MethodRefusedError):
        session.new_cache()
    assert sparing.parse_method("spatten(keep_heads=0.9)", 0.4) == SpAtten(keep=0.4, keep_heads=0.9)


def test_outside_a_session():
    model = tiny_model("llama", **DEEP)
    with sparing.use(model, SpAtten()) as session:
        cache = session.new_cache()
    with pytest.raises(CacheStateError, match="hooks"):
        model(random_prompt(64).ids, past_key_values=cache)


def test_models_that_hand_their_blocks_more_than_is_known():
    model = tiny_model("llama", **DEEP)
    block = model.model.layers[1]
    forward = block.forward
    block.forward = lambda *args, per_token=None, **kwargs: forward(*args, **kwargs)
    model.model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "per_token": torch.zeros(1, 64)}), with_kwargs=True
    )
    with sparing.use(model, SpAtten()), pytest.raises(UnsupportedModelError, match="per_token"):
        model(random_prompt(64).ids)


def test_short_prompts_lose_nothing():
    model, prompt = tiny_model("llama", **DEEP), random_prompt(31)
    run = run_method(model, SpAtten(keep=0.5, keep_heads=0.5, value_keep=0.5), prompt)
    assert "min_prompt" in run.cache.report().notes[0]
    for mine, theirs in zip(run.logits, run_untouched(model, prompt), strict=True):
        assert torch.equal(mine, theirs)
