"""Methods as text, as typed on the command line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from sparing.core.allocate import ALLOCATORS
from sparing.core.allocate_blocks import BLOCK_ALLOCATORS
from sparing.core.budget import Keep
from sparing.core.cascade import Cascade
from sparing.core.draft import Draft
from sparing.core.method import METHODS, Evict, Method
from sparing.core.prefill import BlockSparse, SparsePrefill
from sparing.core.prompt import PromptDropper
from sparing.core.recipe_text import build, parse_call
from sparing.core.scores import load_scores
from sparing.errors import MethodRefusedError, UnknownNameError


def parse_method(text: str, keep: Keep = 0.5, load_draft: Callable[[str], Any] | None = None) -> Method:
    """Build a method from text.

    Grammar: `name`, `name(field=value,...)`, or `scorer+allocator` with the scorer of any registered method and
    any allocator for what it ranks (of tokens: uniform, pyramid, adaptive, global; of blocks: rows, layer, top_mass),
    each with fields in brackets: `snapkv`, `snapkv(window=16)`, `keydiff+adaptive(floor=0.1)`, `xattention+rows`. A
    token scorer with an allocator evicts at the prompt's end. `prompt & prefill & method`, any of them left out, drops
    tokens of the prompt by the first, reads it by the second and stores by the third: `xattention(keep=0.25) & snapkv`.
    The `scores` of a method that needs measurements are a file: `duo(scores=duo.safetensors)`; the `draft` of one that
    needs a draft model is a folder or a name on the Hub: `specpc(draft=NAME)`. A `keep` among a method's fields comes
    before the argument, which is that of the last method named. Fields that are no number, word or truth value (a
    scorer, a tuple) can be set in Python only.

    Args:
        load_draft: loads a model by name, for methods that need a draft model; None if that can be done in Python only.

    Raises:
        UnknownNameError: no such method or allocator.
        InvalidInputError: text that does not follow the grammar, or a value that the field does not take.
        InputFileError: a file of scores cannot be read.
        MethodRefusedError: two methods that do not go together.
    """
    *before, last = text.split("&")
    method = _single(last, {"keep": keep}, load_draft)
    for part in reversed(before):
        first = _single(part, {}, load_draft)
        if isinstance(method, PromptDropper) or method.shortening is not None:
            raise _not_together(text)
        if isinstance(first, PromptDropper):
            method = replace(method, prompt=first)
        elif isinstance(first, SparsePrefill) and method.reading is None:
            method = replace(method, prefill=first)
        else:
            raise _not_together(text)
    return method


def check_method(text: str, keep: Keep = 0.5) -> None:
    """Refuse text that is no method. Draft models that it names are not loaded.

    Raises:
        SparingError: see `parse_method`.
    """
    parse_method(text, keep, load_draft=Draft)  # a draft that knows no more than its name


def _not_together(text: str) -> MethodRefusedError:
    problem = "does not go together: one method drops prompt tokens, one reads the prompt, the last says what is stored"
    return MethodRefusedError(text.strip(), problem, 'write "prompt method & prefill method & KV method"')


def split_methods(text: str) -> list[str]:
    """Split a list of methods at the commas that are outside brackets."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def _single(text: str, defaults: dict[str, Any], load_draft: Callable[[str], Any] | None) -> Method:
    """One method, with an allocator or without."""
    head, plus, tail = text.partition("+")
    name, words = parse_call(head, "method")
    info = METHODS.find(name)
    allocator = _allocator(tail, info.recipe) if plus else None
    given = defaults | words
    if info.needs + info.takes and "scores" in words:
        given["scores"] = load_scores(words["scores"])
    if info.needs_draft and "draft" in words and load_draft is not None:
        given["draft"] = load_draft(words["draft"])
    recipe: Method = build(info.recipe, given, name)
    return recipe if allocator is None else _allocated(recipe, allocator, name)


def _allocator(text: str, recipe: type[Method]) -> Any:
    """An allocator of what a recipe ranks."""
    known: dict[str, Any] = BLOCK_ALLOCATORS if issubclass(recipe, SparsePrefill) else ALLOCATORS
    name, given = parse_call(text, "method")
    if name not in known:
        raise UnknownNameError("allocator", name, known)
    return build(known[name], given, name)


def _allocated(recipe: Method, allocator: Any, name: str) -> Method:
    """The scorer of a recipe with another allocator."""
    common: dict[str, Any] = {f.name: getattr(recipe, f.name) for f in fields(Method)} | {"prompt": recipe.shortening}
    if isinstance(recipe, SparsePrefill):
        parts = recipe.block_parts()
        common |= {"first": parts.first, "recent": parts.recent, "block": recipe.block, "dispatch": recipe.dispatch}
        return BlockSparse(scorer=parts.scorer, allocator=allocator, **common)
    if not recipe.parts().frees or isinstance(recipe, Cascade | PromptDropper):
        problem = "drops nothing that is stored, so it has no scores to spread a budget by"
        raise MethodRefusedError(name, problem, f"use {name} alone")
    return Evict(scorer=recipe.parts().scorer, allocator=allocator, **common)
