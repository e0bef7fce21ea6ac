"""A context and the questions about it as token ids, plain or as one turn of a chat.

In a chat a context and a question are one message of the user. The ids of the whole prompt are those that the
tokenizer's own template gives, to the token; they are cut at the context's end, so that the context can be compressed
before a question is known:

    | system prompt, user header, context | question, end of turn, assistant header |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparing.errors import InvalidInputError
from sparing.tasks.encoding import Encoder, common_length

# Stands for the message while the text around it is looked for.
_MARK = "The message itself"
_LEAVE = "leave --chat out"


def prompt_parts(
    tokenizer: Any, context: str, questions: Sequence[str], chat: bool = False
) -> tuple[list[int], list[list[int]]]:
    """Return the ids of a context, and of each question as it follows on it.

    Where the tokens of a chat run over the context's end, as ".\\n\\n" does in many vocabularies, the cut is before
    them: the ids of both parts in a row are those of the whole chat, always.

    Args:
        questions: with what separates them from the context, such as a line break, in front.
        chat: put both into the tokenizer's chat template, as one message, without the white space at its ends.

    Raises:
        InvalidInputError: a chat is wanted, and there is no template that can be used; see `chat_frame`.
    """
    if not chat:
        encoder = Encoder(tokenizer)
        return encoder.start(context), [encoder(question) for question in questions]
    header, tail = chat_frame(tokenizer)
    messages = [(context + question).strip() for question in questions]
    if any(_render(tokenizer, message) != header + message + tail for message in messages):
        raise _unusable("changes the text of messages")
    whole = [_encode(tokenizer, header + message + tail) for message in messages]
    shared = _encode(tokenizer, header + context.lstrip())
    for ids in whole:
        shared = shared[: common_length(shared, ids)]
    return shared, [ids[len(shared) :] for ids in whole]


def chat_frame(tokenizer: Any, fix: str = _LEAVE) -> tuple[str, str]:
    """Return what a tokenizer's chat template puts before and behind the user's one message, assistant header included.

    Args:
        fix: what to do about a template that cannot be used.

    Raises:
        InvalidInputError: the tokenizer has no chat template, or one that does not hold a message as it is.
    """
    if not getattr(tokenizer, "chat_template", None):
        allowed = "only for a tokenizer with a chat template, and this one has none"
        raise InvalidInputError("chat", True, allowed, f"{fix}, or take an instruction-tuned model")
    header, mark, tail = _render(tokenizer, _MARK, fix).partition(_MARK)
    if not mark or _MARK in tail:
        raise _unusable("does not hold the user's message once, as it is", fix)
    return header, tail


def _render(tokenizer: Any, message: str, fix: str = _LEAVE) -> str:
    chat = [{"role": "user", "content": message}]
    try:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs, and raise what they like
        said = " ".join(str(error).split())
        raise _unusable(f"fails on one message of a user ({type(error).__name__}: {said})", fix) from error
    return text


def _encode(tokenizer: Any, text: str) -> list[int]:
    # Templates write their special tokens themselves.
    return list(tokenizer.encode(text, add_special_tokens=False))


def _unusable(problem: str, fix: str = _LEAVE) -> InvalidInputError:
    allowed = f"only with a chat template that can be used; this one {problem}"
    return InvalidInputError("chat", True, allowed, fix)
