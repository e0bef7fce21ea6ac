"""The bundled model's tokenizer: byte-level BPE in which pieces of text can be encoded one by one.

The text is first cut into words, single digits and single punctuation marks, each with the space before it;
merges never cross such a cut. So encoding the parts of a sentence and joining the ids gives the ids of the
sentence, which lets the recipe assemble samples from cached ids, and a number always costs one token a digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sparing.tasks import formats
from sparing.tasks.words import ADJECTIVES, NOUNS

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 2048
MAX_LENGTH = 8192
HELD_OUT = ("dracula", "emma")

# Words, digits, the `":` between a JSON key and its value (one token, so that a value is as far from its key
# as in the sentence "... river is: 71234"), other marks, white space.
_CUTS = r"""'(?:s|t|d|m|re|ve|ll)| ?\p{L}+| ?\p{N}|":| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"""

# How often each key word is added to the training text, enough to make it one token.
_BOOST = 4000


def books(folder: Path, held_out: bool) -> list[str]:
    """Return the texts of the folder's books, either the training books or the held-out ones."""
    paths = [path for path in sorted(folder.glob("*.txt")) if (path.stem in HELD_OUT) == held_out]
    return [path.read_text(encoding="utf-8") for path in paths]


def load_corpus(tokenizer: Tokenizer, folder: Path, held_out: bool) -> np.ndarray:
    """Return the ids of the books, one after the other: as they are, then with all white space as one space.

    The tasks fill haystacks with sentences joined by spaces; other users of the model will keep paragraphs.
    """
    joined = "\n\n".join(books(folder, held_out))
    texts = joined, " " + " ".join(joined.split())
    ids = [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False).ids]
    return np.array(ids, np.uint16)


def _task_words() -> list[str]:
    sentences = [value for name, value in vars(formats).items() if name.isupper() and isinstance(value, str)]
    words = {f" {word}" for sentence in sentences for word in sentence.split() if word.isalpha()}
    digits = {prefix + digit for digit in "0123456789" for prefix in ("", " ")}
    keys = {f" {word}" for word in ADJECTIVES + NOUNS} | set(ADJECTIVES)
    kinds = {" number", " numbers", " word", " words"}
    return sorted(words | digits | keys | kinds | {'":', ' "', "What", "Repeat"})


def _training_text(texts: list[str]) -> Iterator[str]:
    for text in texts:
        yield from text.splitlines(keepends=True)
        yield from ["\n\n"] * text.count("\n\n")
    for word in _task_words():
        yield from [word] * _BOOST


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train the tokenizer on texts; encoding puts `BOS` in front unless special tokens are switched off."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUTS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_pretrained(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files from which `AutoTokenizer.from_pretrained` loads the tokenizer."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
