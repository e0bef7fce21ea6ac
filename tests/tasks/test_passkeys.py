"""Passkey samples: every passkey twice, answers where they are said to be, one order throughout."""

import pytest

from sparing.core.samples import PasskeySample
from sparing.errors import InvalidInputError
from sparing.scoring import MAKERS
from sparing.tasks.passkeys import ORDINALS, WORDS, passkey_samples
from tests.tasks.conftest import LOSSLESS
from tests.tasks.letters import Letters


def occurrences(ids, part):
    """Every place where the part begins."""
    return [i for i in range(len(ids) - len(part) + 1) if tuple(ids[i : i + len(part)]) == tuple(part)]


def cut(sample, span):
    return sample.ids[slice(*span)]


@pytest.mark.parametrize("family", LOSSLESS)
@pytest.mark.parametrize(("needles", "words", "length"), [(3, 8, 1500), (10, 32, 9000), (1, 2, 600)])
def test_each_passkey_stands_where_it_is_said_and_nowhere_else(tokenizers, family, needles, words, length):
    for sample in passkey_samples(tokenizers[family], 2, length, needles=needles, words=words):
        assert len(sample.ids) == length
        assert len(sample.passkeys) == len(sample.answers) == needles
        for passkey, answer in zip(sample.passkeys, sample.answers, strict=True):
            assert cut(sample, passkey) == cut(sample, answer)
            assert occurrences(sample.ids, cut(sample, passkey)) == [passkey[0], answer[0]]
            said = tokenizers[family].decode(list(cut(sample, answer))).split()
            assert len(said) == words
            assert set(said) <= set(WORDS)


@pytest.mark.parametrize("family", LOSSLESS)
def test_needles_and_questions_stand_in_one_order(tokenizers, family):
    """Read from the text alone: the k-th needle and the k-th question both name the k-th ordinal."""
    sample = passkey_samples(tokenizers[family], 1, 4000, needles=5, words=4)[0]
    text = tokenizers[family].decode(list(sample.ids))
    context, questions = text.split("</book>")
    needles = [context.index(f"it's the {ordinal} passkey to the vault:") for ordinal in ORDINALS[:5]]
    asked = [questions.index(f"what is the {ordinal} passkey to the vault?") for ordinal in ORDINALS[:5]]
    assert needles == sorted(needles)
    assert asked == sorted(asked)
    assert list(sample.passkeys) == sorted(sample.passkeys)
    assert list(sample.answers) == sorted(sample.answers)
    assert sample.passkeys[-1][1] < sample.answers[0][0]
    assert sample.answers[-1][1] == len(sample.ids)
    for number, ordinal in enumerate(ORDINALS[:5]):
        words = tokenizers[family].decode(list(cut(sample, sample.passkeys[number]))).strip()
        assert f"it's the {ordinal} passkey to the vault: {words}\n\n" in context
        assert f"what is the {ordinal} passkey to the vault?\nPasskey: {words}" in questions


def test_needles_stand_in_the_middle_at_many_depths():
    """Depths are drawn from 5 % to 95 % of the haystack; a sentence end may be a sentence away."""
    depths = []
    for sample in passkey_samples(Letters(), 40, 8000, needles=2):
        end = sample.answers[0][0]
        depths += [start / end for start, _ in sample.passkeys]
    assert 0.02 < min(depths) < 0.2
    assert 0.8 < max(depths) < 0.99


def test_same_seed_same_samples_and_others_otherwise():
    first, again = (passkey_samples(Letters(), 3, 1200, seed=5) for _ in range(2))
    assert first == again
    assert all(isinstance(sample, PasskeySample) for sample in first)
    assert len({sample.ids for sample in [*first, *passkey_samples(Letters(), 3, 1200, seed=6)]}) == 6
    assert passkey_samples(Letters(), 1, 1200, seed=5) == first[:1]


def test_defaults_fit_the_bundled_model():
    from transformers import AutoTokenizer

    from sparing.models import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve("bundled"))
    samples = MAKERS["passkey"](tokenizer, 2, 512, 0)
    assert [len(sample.ids) for sample in samples] == [512, 512]


def test_the_shortest_sample_is_named_and_works():
    with pytest.raises(InvalidInputError, match=r"at least \d+ tokens for 3 passkeys of 8 words") as error:
        passkey_samples(Letters(), 1, 100)
    least = int(error.value.allowed.split()[2])
    assert len(passkey_samples(Letters(), 1, least)[0].ids) == least
    with pytest.raises(InvalidInputError):
        passkey_samples(Letters(), 1, least - 1)


@pytest.mark.parametrize("bad", [{"needles": 0}, {"needles": 11}, {"words": 1}])
def test_bad_numbers_are_refused(bad):
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        passkey_samples(Letters(), 1, 5000, **bad)
