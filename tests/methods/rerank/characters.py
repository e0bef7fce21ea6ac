"""A tokenizer for models of 64 tokens, and prompts worked out from whole texts, apart from the code under test."""

from __future__ import annotations

QUERY = "\n\nWhich of these paragraphs answer the following query?\n\nQuery: "


class Characters:
    """A token a letter (several letters share one), 1 in front; "A" to "Z" and "[" have tokens of their own."""

    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [2 + ord(letter) % 62 for letter in text]


def documents_text(documents):
    """The prompt of in-context re-ranking up to its last document, and [start, end) of each in its tokens."""
    text, spans = "Here are some paragraphs:", []
    for number, document in enumerate(documents, 1):
        text += f"\n\n[{number}]"
        spans.append((1 + len(text), 1 + len(text) + 1 + len(document)))  # a token in front, and a space
        text += " " + document
    return text, spans


def prompt(documents, query):
    """(ids, spans, query_start) of the whole prompt."""
    text, spans = documents_text(documents)
    return Characters().encode(text + QUERY + query), spans, 1 + len(text)
