"""Texts and chats to token ids.

A chat is written by the tokenizer's own chat template. A model without one (the bundled model, most base models) reads
the contents of the messages one after the other, each on a new line, and no roles: what such a model was trained on is
text, and a format that it has never seen would not make it a chat model.

A document is the beginning of the first user message; what follows it (`cache_key`) is the rest of that message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparing.core.ranking_prompt import before_query, from_query
from sparing.errors import InvalidInputError
from sparing.reranking import TokenizedText
from sparing.serve.refusals import Refusal, invalid
from sparing.tasks.encoding import Encoder

Message = Mapping[str, str]

# Stands for a document in a chat template; from a range of code points that mean nothing.
_DOCUMENT = "\ue0d0\ue0d1\ue0d2"


class Prompts:
    """How a model's tokenizer has prompts.

    Attributes:
        tokenizer: the model's. has_template: whether chats are written by a template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)

    def text(self, text: str) -> list[int]:
        """A prompt as it is, behind the tokenizer's own beginning."""
        return Encoder(self.tokenizer).start(text)

    def rest_of_text(self, text: str) -> list[int]:
        """What follows a document, as it is."""
        return Encoder(self.tokenizer)(text)

    def ranking(self, query: str, documents: Sequence[str]) -> int:
        """How many tokens a prompt has in which documents are ranked.

        Raises:
            Refusal: the chat template cannot be used.
        """
        try:
            text = TokenizedText(self.tokenizer)
        except InvalidInputError as error:
            raise invalid("documents", str(error)) from None
        return len(before_query(text, documents)[0]) + len(from_query(text, query))

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """A chat, up to where the answer begins.

        Raises:
            Refusal: the template does not take these messages, or there is nothing in them.
        """
        if self.has_template:
            return self._encode(self._written(messages, answer=True))
        return self.text(_joined(messages))

    def document(self, text: str) -> list[int]:
        """A document."""
        return self._encode(self._before_document() + text) if self.has_template else self.text(text)

    def rest_of_chat(self, messages: Sequence[Message]) -> list[int]:
        """A chat that goes on from a document, up to where the answer begins.

        Raises:
            Refusal: as `chat`, or its first message is not the user's.
        """
        if messages[0]["role"] != "user":
            raise invalid("messages", "with cache_key the first message is the user's: it goes on from the document")
        if not self.has_template:
            return self.rest_of_text(_on_new_line(_joined(messages)))
        first = {**messages[0], "content": _DOCUMENT + _on_new_line(messages[0]["content"])}
        written, before = self._written([first, *messages[1:]], answer=True), self._before_document()
        if not written.startswith(before + _DOCUMENT):
            message = "the model's chat template writes these messages in front of the document; leave cache_key out"
            raise invalid("cache_key", message)
        return self.rest_of_text(written[len(before + _DOCUMENT) :])

    def _before_document(self) -> str:
        """What the template writes before the first user message."""
        return self._written([{"role": "user", "content": _DOCUMENT}], answer=False).partition(_DOCUMENT)[0]

    def _written(self, messages: Sequence[Message], answer: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=answer
            )
        except Exception as error:  # templates are programs, and raise what they like
            raise invalid("messages", f"the model's chat template refuses them: {error}") from None
        return text

    def _encode(self, text: str) -> list[int]:
        """The template has written special tokens already."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def _joined(messages: Sequence[Message]) -> str:
    """The contents, each on a new line."""
    contents = [message["content"] for message in messages if message["content"]]
    if not contents:
        raise Refusal(400, "the messages have no content", "invalid_value", "messages")
    return contents[0] + "".join(map(_on_new_line, contents[1:]))


def _on_new_line(text: str) -> str:
    return text if text[:1].isspace() else "\n" + text
