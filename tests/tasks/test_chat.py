"""Chats: context and question in a row are what the tokenizer's own template gives, cut at the context's end."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparing
from sparing.errors import InvalidInputError
from sparing.models import BUNDLED
from sparing.tasks import load_user_task
from sparing.tasks.chat import chat_frame, prompt_parts

from .conftest import LOSSLESS
from .letters import Letters

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CONTEXT = "  Ada came on Monday.\n\nGrace came on Friday, with 12 books."
QUESTIONS = ["\n\nWho came first?", "\n\nWhen did Grace come? "]


def with_template(tokenizer, template, *more):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": MARKS})
    tokenizer.add_tokens(list(more))
    tokenizer.chat_template = template
    return tokenizer


def whole(tokenizer, context, question):
    """What transformers itself makes of the chat."""
    chat = [{"role": "user", "content": (context + question).strip()}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("template", [CHATML, HEADERS], ids=["chatml", "headers"])
@pytest.mark.parametrize("family", LOSSLESS)
def test_both_parts_are_the_whole_chat(tokenizers, family, template):
    tokenizer = with_template(tokenizers[family], template)
    context_ids, question_ids = prompt_parts(tokenizer, CONTEXT, QUESTIONS, chat=True)
    for question, ids in zip(QUESTIONS, question_ids, strict=True):
        assert context_ids + ids == whole(tokenizer, CONTEXT, question)
    said = tokenizer.decode(context_ids)
    assert said.rstrip(".").endswith("with 12 books")
    assert said.count("<|im_start|>" if template == CHATML else "<|start_header_id|>") == (
        2 if template == CHATML else 1
    )
    for question, ids in zip(QUESTIONS, question_ids, strict=True):
        rest = tokenizer.decode(ids)
        assert question.strip() in rest
        assert "assistant" in rest
        assert "books" not in rest


def test_a_token_over_the_cut_belongs_to_the_question(tokenizers):
    """Many vocabularies hold a full stop with two line breaks as one token: no cut at the context's end gives that."""
    tokenizer = with_template(tokenizers["byte_level_bpe"], CHATML, ".\n\n")
    context_ids, (question_ids, _) = prompt_parts(tokenizer, CONTEXT, QUESTIONS, chat=True)
    wanted = whole(tokenizer, CONTEXT, QUESTIONS[0])
    assert context_ids + question_ids == wanted
    assert tokenizer.decode(question_ids[:1]) == ".\n\n"
    # The broken specimen: both parts encoded by themselves.
    header, tail = chat_frame(tokenizer)
    parts = (header + CONTEXT.lstrip(), QUESTIONS[0] + tail)
    apart = [id for part in parts for id in tokenizer.encode(part, add_special_tokens=False)]
    assert apart != wanted


def test_the_context_is_the_same_for_all_its_questions(tokenizers):
    tokenizer = with_template(tokenizers["byte_level_bpe"], HEADERS)
    together, _ = prompt_parts(tokenizer, CONTEXT, QUESTIONS, chat=True)
    for question in QUESTIONS:
        assert prompt_parts(tokenizer, CONTEXT, [question], chat=True)[0] == together


def test_without_a_chat_nothing_is_added():
    context_ids, question_ids = prompt_parts(Letters(), CONTEXT, QUESTIONS)
    assert Letters().decode(context_ids) == CONTEXT
    assert [Letters().decode(ids) for ids in question_ids] == QUESTIONS


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "this one has none"),
        ("{{ messages[0]['content'] | upper }}", "does not hold the user's message"),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "does not hold the user's message once"),
        ("{{ messages | length }}", "does not hold the user's message"),
        ("{{ messages[0]['content'] | replace('Ada', 'Eve') }}", "changes the text"),
        ("{{ raise_exception('system first') }}", "fails on one message of a user .*system first"),
        ("{% if %}", "fails on one message"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tokenizers, template, problem):
    tokenizer = with_template(tokenizers["bytes"], template)
    with pytest.raises(InvalidInputError, match=problem) as refused:
        prompt_parts(tokenizer, CONTEXT, QUESTIONS, chat=True)
    assert "\n" not in str(refused.value)
    assert "leave --chat out" in str(refused.value)


def test_a_tokenizer_that_knows_nothing_of_chats_is_refused():
    with pytest.raises(InvalidInputError, match="this one has none"):
        prompt_parts(Letters(), CONTEXT, QUESTIONS, chat=True)


def test_questions_of_a_file_as_a_chat(tokenizers, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("Ada came.\nQ: Who came?\nA: Ada\nQ: When?\n")
    tokenizer = with_template(tokenizers["byte_level_bpe"], CHATML)
    plain, chat = load_user_task(file), load_user_task(file, chat=True)
    sample = chat.sample(tokenizer)
    first, _ = sample.questions
    assert sample.context_ids + list(first.token_ids) == whole(tokenizer, "Ada came.", "\n\nWho came?")
    assert first.text == "\n\nWho came?"
    # A chat answers in sentences of its own, and ends by itself.
    assert first.max_new_tokens == 64 > plain.sample(tokenizer).questions[0].max_new_tokens
    assert not first.one_line
    assert plain.sample(tokenizer).questions[0].one_line
    assert chat.label != load_user_task(file, question_format=chat.question_format).label
    assert (
        load_user_task(file, question_format="{question}", chat=True).sample(tokenizer).questions[0].text == "Who came?"
    )


def test_a_chat_is_compressed_before_its_question_is_known():
    """Read in two parts with everything kept, a chat gets the answer that it gets as a whole."""
    tokenizer = with_template(AutoTokenizer.from_pretrained(BUNDLED), CHATML)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    context_ids, (question_ids, _) = prompt_parts(tokenizer, CONTEXT * 20, QUESTIONS, chat=True)
    ids = torch.tensor([context_ids + question_ids])
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False)
    for keep, is_equal in ((1.0, True), (0.1, False)):
        with sparing.use(model, sparing.SnapKV(keep=keep)) as session:
            cache = session.prefill(ids[:, : len(context_ids)])
            answer = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
        assert torch.equal(answer, wanted) == is_equal
