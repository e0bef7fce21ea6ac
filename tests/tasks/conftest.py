"""Tokenizers of four families, trained in seconds on the shipped novel."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sparing.tasks import haystack

FAMILIES = ("byte_level_bpe", "metaspace_bpe", "bytes", "words")

# Those from whose ids the text comes back letter for letter.
LOSSLESS = FAMILIES[:3]


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Return one tokenizer of each family."""
    return {name: globals()[f"_{name}"]() for name in FAMILIES}


def _byte_level_bpe() -> PreTrainedTokenizerFast:
    """GPT-2's family, with a token in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, trainers.BpeTrainer(vocab_size=1000, special_tokens=["<s>"], initial_alphabet=alphabet))
    return _wrap(tokenizer, "<s> $A")


def _metaspace_bpe() -> PreTrainedTokenizerFast:
    """Llama 2's family: a text gets a space in front, and any piece of one would too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="always"), decoders.ByteFallback()])
    specials = ["<s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    _train(tokenizer, trainers.BpeTrainer(vocab_size=1200, special_tokens=specials, initial_alphabet=letters))
    return _wrap(tokenizer, "<s> $A")


def _bytes() -> PreTrainedTokenizerFast:
    """One token a byte, and special tokens at both ends: those at the end do not belong in a context."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(["<s>", "</s>", *letters])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer, "<s> $A </s>")


def _words() -> PreTrainedTokenizerFast:
    """One token a word, most of them unknown, and nothing in front."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    _train(tokenizer, trainers.WordLevelTrainer(vocab_size=500, special_tokens=["<s>", "<unk>"]))
    return _wrap(tokenizer, None)


def _train(tokenizer: Tokenizer, trainer: trainers.Trainer) -> None:
    trainer.show_progress = False
    tokenizer.train_from_iterator(haystack.sentences()[:1500], trainer)


def _wrap(tokenizer: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    if template:
        specials = [(token, tokenizer.token_to_id(token)) for token in template.split() if token != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
