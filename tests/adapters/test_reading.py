"""Methods that read a part, in every way in which transformers generates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import sparing
from sparing.adapters.reading import SLACK, Reading, attend_all
from sparing.core.method import Method, Parts
from sparing.core.reader import Choice, Reader
from sparing.core.scorer import KeyValues, Softmax
from sparing.errors import MethodRefusedError
from sparing.methods.kv.actqkv import InformationDensity, ProbeQuery
from sparing.testing import Driver, random_prompt, run_method, tiny_model
from sparing.testing.reading import noted

METHODS = {
    "quest": sparing.Quest(keep=0.4, page=4),
    "refreshkv": sparing.RefreshKV(keep=0.4, stride=3),
    "longheads": sparing.LongHeads(keep=0.4, chunk=4),
    "actqkv": sparing.ActQKV(keep=0.4, block=4, window=6),
}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


@pytest.fixture(name="model")
def double_model() -> Any:
    return tiny_model("llama").double()


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False} | options
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)


@torch.no_grad()
def replay(session: sparing.Session, sequence: Tensor, prompt: int) -> Tensor:
    """(steps, V) logits, the prompt at once and then token by token."""
    driver = Driver(session.model, session.new_cache())  # type: ignore[arg-type]
    session.cache.expect_prompt(prompt)  # type: ignore[union-attr]
    rows = [driver.feed(sequence[None, :prompt])[0, -1]]
    return torch.stack(rows + [driver.feed(token[None, None])[0, -1] for token in sequence[prompt:-1]])


def test_greedy_reads_what_a_replay_reads(model: Any, method: Method) -> None:
    ids = random_prompt().ids
    with sparing.use(model, method) as session:
        output = generate(model, ids)
        wanted = replay(session, output.sequences[0], ids.shape[1])
    torch.testing.assert_close(torch.stack(output.logits)[:, 0], wanted.to(output.logits[0].dtype), atol=1e-6, rtol=0)


def test_beams_carry_what_the_reader_knows(model: Any, method: Method) -> None:
    """The score of every beam is the log-probability of its tokens, read one by one without beams."""
    ids = random_prompt().ids
    with sparing.use(model, method) as session:
        output = generate(model, ids, num_beams=4, num_return_sequences=3, length_penalty=0.0, output_scores=True)
        for sequence, score in zip(output.sequences, output.sequences_scores, strict=True):
            logits = replay(session, sequence, ids.shape[1]).log_softmax(-1)
            chosen = logits.gather(-1, sequence[ids.shape[1] :, None]).sum()
            assert float(chosen) == pytest.approx(float(score), abs=1e-5)


@torch.no_grad()
def greedy_after(session: sparing.Session, ids: Tensor, sequence: Tensor, accepted: int) -> list[int]:
    """The greedy choices along a sequence whose first tokens were drafted, and so read, with the prompt itself."""
    length = ids.shape[1]
    driver = Driver(session.model, session.new_cache())  # type: ignore[arg-type]
    session.cache.expect_prompt(length)  # type: ignore[union-attr]
    rows = list(driver.feed(sequence[None, : length + accepted])[0, length - 1 :])
    rows += [driver.feed(token[None, None])[0, -1] for token in sequence[length + accepted : -1]]
    return [int(row.argmax()) for row in rows]


@pytest.mark.parametrize("name", ["quest", "longheads"])
def test_drafted_tokens_are_read_one_by_one(name: str, model: Any) -> None:
    """Readers that decide by the stored tokens alone say the same with drafts as without."""
    ids = random_prompt().ids
    ids[:, -8:] = ids[:, :8]  # so that there is something to look up
    with sparing.use(model, METHODS[name]) as session:
        sequence = generate(model, ids, prompt_lookup_num_tokens=3, eos_token_id=10_000).sequences[0]
        wanted = [greedy_after(session, ids, sequence, accepted) for accepted in range(4)]
    assert sequence[ids.shape[1] :].tolist() in wanted


def test_tokens_at_once_are_tokens_one_by_one(model: Any, method: Method) -> None:
    prompt = random_prompt(50, 31, steps=7)
    said = []
    for sizes in ([7], [1] * 7, [3, 4]):
        with sparing.use(model, method) as session:
            driver = Driver(model, session.new_cache())
            driver.read(prompt)
            parts = [driver.feed(token) for token in prompt.forced.split(sizes, dim=1)]
            said.append((torch.cat(parts, dim=1), session.report().read_share))
    for logits, share in said[1:]:
        torch.testing.assert_close(logits, said[0][0], atol=1e-12, rtol=0)
        assert share == said[0][1]


def test_a_clone_goes_on_where_it_was(model: Any, method: Method) -> None:
    prompt = random_prompt(50, steps=8)
    with sparing.use(model, method) as session:
        driver = Driver(model, session.new_cache())
        driver.read(prompt)
        for token in prompt.forced[:, :4].split(1, dim=1):
            driver.feed(token)
        twin = Driver(model, driver.cache.clone())  # type: ignore[attr-defined]
        twin.mask = driver.mask
        for token in prompt.forced[:, 4:].split(1, dim=1):
            torch.testing.assert_close(twin.feed(token), driver.feed(token), atol=1e-12, rtol=0)


def test_budgets_move_between_layers_and_keep_their_sum(model: Any) -> None:
    method = noted(sparing.ActQKV(keep=0.4, block=4))
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight *= 20  # sharp scores: little density
    prompt = random_prompt(64, 40, steps=5)
    with sparing.use(model, method) as session:
        driver = Driver(model, session.new_cache())
        driver.read(prompt)
        driver.decode(prompt)
    for number in range(5):
        notes = method.notes[2 * number : 2 * number + 2]
        for row, length in enumerate((65 + number, 41 + number)):
            assert sum(int(note.counts[row].sum()) for note in notes) == method.budget.tokens_per_head(length, 1) * 4
        assert bool((notes[0].counts < notes[1].counts).all())


def test_what_is_reported(model: Any) -> None:
    """Quest reads round(0.4 n) tokens at 51, 52 and 53 of them: 20 + 21 + 21 of 156."""
    prompt = random_prompt(50, steps=3)
    with sparing.use(model, METHODS["quest"]) as session:
        driver = Driver(model, session.new_cache())
        driver.read(prompt)
        assert session.report().read_share is None
        driver.decode(prompt)
        report = session.report()
    assert report.read_share == pytest.approx(62 / 156)
    assert "39.7% of them read by decoded tokens" in str(report)
    assert report.plan is None


@dataclass(frozen=True)
class Newest(Reader):
    """As many of the newest tokens as the budget allows."""

    def choose(self, state: Any, step: Any) -> tuple[Any, Choice]:
        tokens = step.stored.keys.shape[2]
        slots = torch.arange(tokens - 1, -1, -1).expand(*step.counts.shape, -1)
        return None, Choice(slots, torch.arange(tokens) < step.counts[..., None])


@dataclass(frozen=True)
class ReadNewest(Method):
    def parts(self) -> Parts:
        return Parts.reading(Newest())


def test_budgets_of_every_kind() -> None:
    model, prompt = tiny_model("llama"), random_prompt(50, steps=4)
    for keep, wanted in ((0.4, 20), (17, 17), ("8KiB", 32)):
        method = noted(ReadNewest(keep))
        with sparing.use(model, method) as session:
            driver = Driver(model, session.new_cache())
            driver.read(prompt)
            driver.feed(prompt.forced[:, :1])
        assert [note.counts.tolist() for note in method.notes] == [[[wanted] * 2]] * 2, keep


def holding(tokens: int) -> tuple[Reading, KeyValues, Tensor]:
    g = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, tokens, 8, generator=g), torch.randn(2, 2, tokens, 8, generator=g)
    positions = torch.arange(tokens).expand(2, 2, -1)
    pads = torch.tensor([0, 5])
    stored = KeyValues(keys, values, positions >= pads[:, None, None], positions, pads, 0, 1, None)
    return Reading(keys, values, Newest()), stored, torch.randn(2, 4, 300, 8, generator=g)


@pytest.mark.parametrize("softmax", [Softmax(0.3), Softmax(0.3, softcap=2.0), Softmax(0.3, sinks=torch.randn(4))])
def test_attention_over_everything_is_causal_and_tiled(softmax: Softmax) -> None:
    """300 rows over 400 tokens: two tiles, against the whole map."""
    _, stored, query = holding(400)
    logits = query @ stored.keys.repeat_interleave(2, dim=1).mT * softmax.scaling
    if softmax.softcap is not None:
        logits = torch.tanh(logits / softmax.softcap) * softmax.softcap
    sees = torch.ones(300, 400, dtype=torch.bool).tril(100) & stored.valid[:, :1, None]
    logits = logits.masked_fill(~sees, -torch.inf)
    if softmax.sinks is not None:
        logits = torch.cat([logits, softmax.sinks.view(1, 4, 1, 1).expand(2, -1, 300, 1)], dim=-1)
    wanted = logits.softmax(-1)[..., :400] @ stored.values.repeat_interleave(2, dim=1)
    torch.testing.assert_close(attend_all(query, stored, softmax), wanted, atol=1e-5, rtol=0)


def test_buffers_grow_once_in_many_tokens() -> None:
    reading, stored, _ = holding(100)
    copies, before = 0, reading.tokens()[0].data_ptr()
    for _ in range(2 * SLACK):
        reading.append(stored.keys[:, :, :1], stored.values[:, :, :1])
        copies += reading.tokens()[0].data_ptr() != before
        before = reading.tokens()[0].data_ptr()
    assert copies == 2
    assert torch.equal(reading.tokens()[0][:, :, :100], stored.keys)
    assert torch.equal(reading.tokens()[1][:, :, 100:], stored.values[:, :, :1].expand(-1, -1, 2 * SLACK, -1))


@pytest.mark.parametrize("name", ["longheads", "actqkv"])
def test_keys_that_cannot_be_turned_back_are_refused(name: str) -> None:
    method, prompt = METHODS[name], random_prompt(64)
    dynamic = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    for model in (dynamic, tiny_model("deepseek_v3")):
        with pytest.raises(MethodRefusedError):
            run_method(model, method, prompt)
    model = tiny_model("deepseek_v3")
    with sparing.use(model, method) as session, pytest.raises(MethodRefusedError):
        Driver(model, session.watching_cache([method])).read(prompt)
    run_method(tiny_model("gpt2"), method, prompt)  # nothing is rotated, so nothing has to be turned back


def test_the_density_method_is_made_of_its_parts() -> None:
    parts = sparing.ActQKV(block=16, window=8).parts()
    assert parts.reader == ProbeQuery(8, 16)
    assert parts.allocator == InformationDensity(16)
