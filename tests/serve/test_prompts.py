"""Chats and documents as token ids."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from sparing.serve.prompts import Prompts
from sparing.serve.refusals import Refusal

TEMPLATE = (
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('the user speaks first') }}{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def said(*pairs: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in zip(pairs[::2], pairs[1::2], strict=True)]


def with_template(tokenizer: Any, template: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.fixture(scope="module")
def templated(tokenizer: Any) -> Any:
    return with_template(tokenizer, TEMPLATE)


def test_a_model_without_a_template_reads_the_contents_line_by_line(tokenizer: Any) -> None:
    prompts = Prompts(tokenizer)
    assert not prompts.has_template
    token_ids = prompts.chat(said("system", "Be brief.", "user", "\nA text", "assistant", "Yes", "user", "Why?"))
    assert tokenizer.decode(token_ids) == "<s>Be brief.\nA text\nYes\nWhy?"


def test_a_template_writes_chats(templated: Any) -> None:
    prompts = Prompts(templated)
    assert prompts.has_template
    token_ids = prompts.chat(said("system", "Be brief.", "user", "Why?"))
    assert templated.decode(token_ids) == "[system]Be brief.[end][user]Why?[end][assistant]"


@pytest.mark.parametrize("kind", ["tokenizer", "templated"])
def test_a_document_and_the_rest_are_the_whole_chat(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    prompts = Prompts(tokenizer)
    document, rest = "A long story. The end.", said("user", "Who?", "assistant", "He.", "user", "Why?")
    whole = [{"role": "user", "content": f"{document}\nWho?"}, *rest[1:]]
    parts = tokenizer.decode(prompts.document(document)) + tokenizer.decode(prompts.rest_of_chat(rest))
    assert parts == tokenizer.decode(prompts.chat(whole))


def test_a_completion_goes_on_right_where_the_document_ended(tokenizer: Any) -> None:
    prompts = Prompts(tokenizer)
    assert prompts.document("A text") == prompts.text("A text")
    assert tokenizer.decode(prompts.document("A text") + prompts.rest_of_text(" goes on")) == "<s>A text goes on"


def test_what_a_template_refuses_is_said(templated: Any) -> None:
    with pytest.raises(Refusal, match="the user speaks first"):
        Prompts(templated).chat(said("assistant", "Hello"))


def test_what_a_template_breaks_on_is_said(tokenizer: Any) -> None:
    """Templates are programs: this one fails with Python's own TypeError."""
    with pytest.raises(Refusal, match="refuses them"):
        Prompts(with_template(tokenizer, "{{ messages[0]['content'] + 1 }}")).chat(said("user", "Hello"))


def test_the_first_message_behind_a_document_is_the_users(tokenizer: Any) -> None:
    with pytest.raises(Refusal, match="the first message is the user's"):
        Prompts(tokenizer).rest_of_chat(said("system", "Be brief.", "user", "Why?"))


def test_a_template_that_puts_messages_in_front_of_the_document_is_refused(tokenizer: Any) -> None:
    other = with_template(tokenizer, "{{ messages | length }} messages" + TEMPLATE)
    with pytest.raises(Refusal, match="in front of the document"):
        Prompts(other).rest_of_chat(said("user", "Who?", "assistant", "He.", "user", "Why?"))


def test_messages_without_content_are_refused(tokenizer: Any) -> None:
    with pytest.raises(Refusal, match="no content"):
        Prompts(tokenizer).chat(said("user", ""))
