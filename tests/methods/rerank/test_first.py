"""FIRST against the logits of a plain forward, and its windows against a slow simulation."""

from __future__ import annotations

import random

import pytest
import torch

from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.methods.rerank.first import FIRST
from sparing.reranking import TokenizedText, rerank
from sparing.testing import tiny_model
from tests.methods.rerank.characters import Characters

DOCUMENTS = ("the old river", "a story of ships", "bells", "hills and more hills")
SHORT = {"opening": "{count}: {query}\n", "closing": "\n{query}, of {count}\n"}


def test_one_window_is_the_letters_logits():
    """The whole prompt written down by hand, and the model's own logits behind it."""
    model = tiny_model("llama", torch.float64)
    text = "4: why\n\n[A] the old river\n[B] a story of ships\n[C] bells\n[D] hills and more hills\nwhy, of 4\n["
    with torch.no_grad():
        logits = model(torch.tensor([Characters().encode(text)])).logits[0, -1]
    expected = [float(logits[2 + ord(letter) % 62]) for letter in "ABCD"]
    found = rerank(model, Characters(), "why", DOCUMENTS, FIRST(**SHORT))
    assert [score for _, score in sorted(found)] == pytest.approx(expected, abs=1e-12)
    assert [document for document, _ in found] == sorted(range(4), key=lambda i: -expected[i])
    small_letters = [float(logits[2 + ord(letter) % 62]) for letter in "abcd"]
    assert small_letters != pytest.approx(expected, abs=1e-3)


def test_the_default_words_hold_the_query_twice_and_all_documents():
    seen = []
    lens = FakeLens(lambda text: seen.append(text) or [0.0] * 4)
    FIRST().score(lens, TokenizedText(Bytes()), ["who {came}?"], DOCUMENTS)
    assert seen[0].count("who {came}?") == 2
    assert all(f"\n[{letter}] {document}" in seen[0] for letter, document in zip("ABCD", DOCUMENTS, strict=True))
    assert seen[0].endswith("\n[")


class Bytes:
    """A token a byte, so that a prompt can be read back."""

    chat_template = None

    def encode(self, text, add_special_tokens=True):
        return list(text.encode())


class FakeLens:
    """A model that is given by a function: the prompt → a logit for each letter."""

    max_length = None

    def __init__(self, judge):
        self.judge, self.windows = judge, []

    def forward(self, ids, mask=None, last=None, cache=None):
        logits = torch.full((1, 1, 256), 1e3)
        judged = self.judge(bytes(ids[0].tolist()).decode())
        logits[0, 0, 65 : 65 + len(judged)] = torch.tensor(judged)
        self.windows.append(len(judged))
        return logits


def by_number(text):
    """Documents say how good they are."""
    return [float(line.split()[1]) for line in text.splitlines() if line.startswith("[") and len(line) > 1]


def slow_windows(values, window, stride):
    """Back to front, on a list of values; every document keeps its place outside of the window."""
    order, end = list(range(len(values))), len(values)
    while True:
        begin = max(0, end - window)
        order[begin:end] = sorted(order[begin:end], key=lambda i: -values[i])
        if begin == 0:
            return order
        end -= stride


@pytest.mark.parametrize(("count", "window", "stride"), [(100, 20, 10), (21, 20, 10), (7, 4, 2), (9, 5, 3), (5, 2, 1)])
def test_windows_move_the_good_ones_forward(count, window, stride):
    values = [float(value) for value in random.Random(count).sample(range(1000), count)]
    lens = FakeLens(by_number)
    ranker = FIRST(window=window, stride=stride)
    found = ranker.score(lens, TokenizedText(Bytes()), ["why"], [f"{value:g} good" for value in values])[0]
    order = slow_windows(values, window, stride)
    assert torch.argsort(found, descending=True).tolist() == order
    assert sorted(found.tolist()) == list(range(count)), "the number of documents behind it"
    best = sorted(range(count), key=lambda i: -values[i])[: window - stride]
    assert order[: len(best)] == best, "what two windows share comes to the very front"
    assert order != sorted(range(count), key=lambda i: -values[i]) or count <= window + stride
    assert max(lens.windows) == window


def test_a_hundred_documents_take_nine_windows():
    lens = FakeLens(by_number)
    FIRST().score(lens, TokenizedText(Bytes()), ["why", "who"], [f"{i} good" for i in range(100)])
    assert lens.windows == [20] * 18


class Merging(Bytes):
    """Joins "[" and a letter into one token where they meet, as some tokenizers do."""

    def encode(self, text, add_special_tokens=True):
        raw = list(text.encode())
        joined = []
        for token in raw:
            if joined and joined[-1] == 91 and 65 <= token <= 90:
                joined[-1] = 200 + token - 65
            else:
                joined.append(token)
        return joined


class Spelling(Bytes):
    """Spells capital letters with two tokens."""

    def encode(self, text, add_special_tokens=True):
        return [part for token in text.encode() for part in ([94, token] if 65 <= token <= 90 else [token])]


class Unknown(Bytes):
    """Knows no capital letter: all are the same token."""

    def encode(self, text, add_special_tokens=True):
        return [0 if 65 <= token <= 90 else token for token in text.encode()]


def test_letters_are_tokens_of_their_own():
    lens = FakeLens(lambda text: [1.0, 3.0, 2.0])
    assert FIRST().score(lens, TokenizedText(Bytes()), ["why"], DOCUMENTS[:3]).tolist() == [[1, 3, 2]]
    for tokenizer in (Spelling(), Unknown()):
        with pytest.raises(MethodRefusedError, match=r"letters A to C are not single tokens.*icr"):
            FIRST().score(lens, TokenizedText(tokenizer), ["why"], DOCUMENTS[:3])


def test_a_letter_that_joins_its_bracket_is_read_alone():
    class Lens(FakeLens):
        def forward(self, ids, mask=None, last=None, cache=None):
            logits = torch.zeros(1, 1, 256)
            logits[0, 0, 65:68] = torch.tensor([1.0, 3.0, 2.0])
            logits[0, 0, 200:203] = torch.tensor([9.0, 8.0, 7.0])
            return logits

    found = FIRST().score(Lens(None), TokenizedText(Merging()), ["why"], DOCUMENTS[:3])
    assert found.tolist() == [[1, 3, 2]]


@pytest.mark.parametrize(
    "given",
    [
        {"window": 1}, {"window": 27}, {"stride": 0}, {"stride": 20}, {"window": 5, "stride": 5},
        {"opening": "{query} {passage}"}, {"closing": "{"}, {"closing": "{}"}, {"opening": "{query.name}"},
    ],
    ids=str,
)  # fmt: skip
def test_what_it_does_not_take(given):
    with pytest.raises(InvalidInputError):
        FIRST(**given)


def test_longer_than_the_model_is_refused():
    with pytest.raises(InvalidInputError, match=r"512 positions.*smaller window"):
        rerank(tiny_model("llama"), Characters(), "why", ["x" * 300, "y" * 300], "first")


def test_logits_that_are_no_numbers_are_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(MethodRefusedError, match="not finite"):
        rerank(model, Characters(), "why", DOCUMENTS, FIRST(**SHORT))
