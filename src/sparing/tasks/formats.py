"""The sentences of the synthetic tasks, in one place.

The tasks (any model, any tokenizer) and the recipe of the bundled model both build their samples from
these strings, so the bundled model is asked exactly what it was trained on. The wording follows the
needle-in-a-haystack tasks of RULER (Hsieh et al. 2024, arXiv:2404.06654), shortened: the question ends
with the words that precede the value in the needle. Scores are therefore "RULER-style" and not
comparable with its leaderboard.
"""

from __future__ import annotations

# One planted fact. `kind` is "number" or "word"; keys are two words ("amber river").
NEEDLE = " The special magic {kind} for {key} is: {value}."

# A question, up to and including the words after which the value is expected (with a leading space).
NEEDLE_QUESTION = "\nWhat is the special magic {kind} for {key}? The special magic {kind} for {key} is:"

# One key with several values; the answer lists them in the order of the text: " v1, v2, v3, v4."
NEEDLE_ALL_VALUES_QUESTION = (
    "\nWhat are all the special magic {kind}s for {key}? The special magic {kind}s for {key} are:"
)

# Several keys in one question; the answer is " v1." and then one NEEDLE sentence per further key.
NEEDLE_MANY_KEYS_QUESTION = (
    "\nWhat are the special magic {kind}s for {keys}? The special magic {kind} for {first_key} is:"
)

# Five sentences over and over: RULER's "noise" haystack.
NOISE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# A JSON object with many entries, and the lookup of one of them; the answer is `{value}"`.
JSON_OPEN, JSON_ENTRY, JSON_SEPARATOR, JSON_CLOSE = "{", '"{key}": "{value}"', ", ", "}"
JSON_QUESTION = '\nWhat is the value of "{key}"? "{key}": "'

# The first words of a passage of the text; the answer is how the passage goes on, word for word.
COPY_QUESTION = "\nRepeat the passage that begins with these words:{start}"
