"""Text that comes token by token: nothing split, nothing lost, cut exactly."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sparing.serve.text import Detokenizer, StopStrings, TextStream, decoder, token_texts

TEXTS = [
    "plain words, 123.",
    "Ünïcödé ångström",
    "日本語の文章です。",
    "🎉👩‍👩‍👧‍👦 flags 🇩🇪",
    "\n\n\ttabs  and   spaces ",
    "e\u0301 \u200b",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text_and_split_no_character(tokenizer: Any, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    stream = Detokenizer(decoder(tokenizer))
    pieces = [stream.push(token) for token in token_ids]
    assert "".join(pieces) == text
    assert stream.flush() == ""
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_a_stream_that_decodes_every_token_alone_is_caught(tokenizer: Any) -> None:
    """The specimen: what the check above is there to catch."""
    alone = "".join(tokenizer.decode([token]) for token in tokenizer.encode(TEXTS[2], add_special_tokens=False))
    assert alone != TEXTS[2]
    assert "\N{REPLACEMENT CHARACTER}" in alone


def test_random_tokens_give_the_text_of_all_of_them(tokenizer: Any) -> None:
    rng = random.Random(0)
    for _ in range(200):
        token_ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 30))]
        stream = Detokenizer(decoder(tokenizer))
        text = "".join(stream.push(token) for token in token_ids) + stream.flush()
        assert text == decoder(tokenizer)(token_ids)


def test_a_tokenizer_whose_first_word_lacks_its_space() -> None:
    """As SentencePiece's do: decoded alone, every word would come without the space before it."""
    words = ["▁one", "▁two", "s", "▁three"]

    def decode(token_ids: list[int]) -> str:
        return "".join(words[token] for token in token_ids).replace("▁", " ").removeprefix(" ")

    stream = Detokenizer(decode)
    assert [stream.push(token) for token in range(4)] == ["one", " two", "s", " three"]


def test_the_texts_of_tokens_join_to_the_text(tokenizer: Any) -> None:
    for text in TEXTS:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        texts = token_texts(tokenizer, token_ids)
        assert len(texts) == len(token_ids)
        assert "".join(texts) == text
    assert token_texts(tokenizer, []) == []
    cut = token_texts(tokenizer, tokenizer.encode("語", add_special_tokens=False)[:-1])
    assert "".join(cut) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("text", ["</s>", "\N{REPLACEMENT CHARACTER}"])
def test_tokens_without_text_or_with_broken_text_are_not_decoded_again_and_again(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    token_ids = tokenizer.encode(f"one{text * 400} two", add_special_tokens=False)
    decode, decoded = tokenizer.decode, 0

    def counted(ids: list[int], **options: Any) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", counted)
    texts = token_texts(tokenizer, token_ids)
    assert "".join(texts) == decode(token_ids, skip_special_tokens=True)
    assert (len(texts), texts[-1]) == (len(token_ids), " two")
    assert decoded < 50 * len(token_ids)


def test_the_space_before_a_word_outlives_special_tokens() -> None:
    """Token 0 gives no text; words as SentencePiece's."""
    words = ["", "▁one", "▁two"]
    stream = Detokenizer(lambda ids: "".join(words[token] for token in ids).replace("▁", " ").removeprefix(" "))
    assert "".join(stream.push(token) for token in [0] * 99 + [1] + [0] * 99 + [2]) == "one two"


def cut_at_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The rule, character by character: the stop string that ends first; of two that end together, the longer one."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def test_stop_strings_cut_as_the_rule_says_however_the_text_is_split() -> None:
    rng = random.Random(0)
    stopped = 0
    for _ in range(4000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(14)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(4))]
        found, given, at = StopStrings(stops), "", 0
        is_stopped = False
        while at < len(text) and not is_stopped:
            size = rng.randrange(1, 4)
            piece, is_stopped = found.push(text[at : at + size])
            given, at = given + piece, at + size
        assert (given if is_stopped else given + found.flush(), is_stopped) == cut_at_first_stop(text, stops)
        stopped += is_stopped
    assert 1000 < stopped < 3900


def test_no_more_is_held_back_than_could_be_a_stop_string() -> None:
    found = StopStrings(["END", "E!"])
    assert found.push("the E") == ("the ", False)
    assert found.push("N") == ("", False)
    assert found.push("D") == ("", True)
    found = StopStrings(["END"])
    assert found.push("EN") == ("", False)
    assert found.push("EMY") == ("ENEMY", False)
    assert StopStrings([]).push("anything") == ("anything", False)


def spelled(text: str, **options: Any) -> tuple[str, Any, int]:
    """Text, reason and tokens of a stream whose tokens are the letters of a text; 0 ends it."""
    stream, given = TextStream(lambda ids: "".join(map(chr, ids)), {0}, **options), ""
    for letter in text:
        piece, reason = stream.push(ord(letter))
        given += piece
        if reason is not None:
            return given, reason, stream.tokens
    return given, None, stream.tokens


@pytest.mark.parametrize(
    ("letters", "options", "expected"),
    [
        ("hello\0more", {"stop": [], "max_tokens": 99}, ("hello", "stop", 6)),
        ("hello", {"stop": [], "max_tokens": 99}, ("hello", None, 5)),
        ("hello", {"stop": [], "max_tokens": 3}, ("hel", "length", 3)),
        ("hello", {"stop": ["ll"], "max_tokens": 99}, ("he", "stop", 4)),
        ("hell\0", {"stop": ["llo"], "max_tokens": 99}, ("hell", "stop", 5)),
        ("hello", {"stop": ["llo"], "max_tokens": 4}, ("hell", "length", 4)),
        ("hello", {"stop": ["llo"], "max_tokens": 5}, ("he", "stop", 5)),
        ("\0", {"stop": ["x"], "max_tokens": 1}, ("", "stop", 1)),
    ],
)
def test_why_an_answer_ends(letters: str, options: Any, expected: Any) -> None:
    assert spelled(letters, **options) == expected


def test_a_character_cut_off_at_the_limit_is_shown_as_what_it_is(tokenizer: Any) -> None:
    token_ids = tokenizer.encode("ab語", add_special_tokens=False)
    stream = TextStream(decoder(tokenizer), set(), [], len(token_ids) - 1)
    results = [stream.push(token) for token in token_ids[:-1]]
    assert "".join(text for text, _ in results) == "ab\N{REPLACEMENT CHARACTER}"
    assert results[-1][1] == "length"
