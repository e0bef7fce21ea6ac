"""Checks that what cannot be done is refused by a named error (promise 7)."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from transformers import AutoModelForSeq2SeqLM, T5Config
from transformers.cache_utils import DynamicCache, StaticCache

from sparing.core.parsing import parse_method
from sparing.errors import (
    CacheStateError,
    InvalidInputError,
    MethodRefusedError,
    SparingError,
    UnknownNameError,
    UnsupportedModelError,
)
from sparing.session import use
from sparing.testing.checks.common import MethodFactory, assert_raises
from sparing.testing.driving import Driver, random_prompt, run_method
from sparing.testing.models import VOCABULARY, tiny_model


def check_wrong_budgets_are_refused(make: MethodFactory) -> None:
    """A budget that is none is refused when it is given, by InvalidInputError, and so are unknown names."""
    wrong: list[Any] = [0, 0.0, -1, 1.5, -0.5, float("nan"), float("inf"), "lots", "0MiB", "", None, True, (0.5,)]
    for keep in wrong:
        assert_raises(InvalidInputError, partial(make, keep=keep), f"keep={keep!r}")
    assert_raises(UnknownNameError, lambda: parse_method("no_such_method"), "an unknown method")
    info = make(keep=0.5).info
    if info is not None:
        assert_raises(UnknownNameError, lambda: parse_method(f"{info.name}(no_such_field=1)"), "an unknown field")
        assert_raises(UnknownNameError, lambda: parse_method(f"{info.name}+no_such_allocator"), "an unknown allocator")


def check_unsupported_models_are_refused(make: MethodFactory) -> None:
    """Models without what is needed are refused by UnsupportedModelError before anything runs."""
    encoder_decoder = AutoModelForSeq2SeqLM.from_config(
        T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )  # type: ignore[call-arg]
    )
    all_sliding = tiny_model("mistral", sliding_window=8)
    for model, what in (
        (encoder_decoder, "an encoder-decoder"),
        (all_sliding, "a model with sliding windows only"),
        (torch.nn.Linear(2, 2), "a module that is no transformers model"),
    ):
        assert_raises(UnsupportedModelError, partial(use, model, make(keep=0.5)), what)
    assert_raises(InvalidInputError, lambda: use(tiny_model("llama"), cast(Any, "snapkv")), "text instead of a method")


def check_foreign_caches_are_refused(make: MethodFactory, name: str) -> None:
    """A cache that cannot be compressed is refused in generate() and in forward, as are static caches by name."""
    model = tiny_model(name)
    ids = random_prompt(20).ids
    caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)]
    with use(model, make(keep=0.5)):
        for cache in caches:
            what = f"a {type(cache).__name__}"
            assert_raises(CacheStateError, partial(model, ids, past_key_values=cache), f"{what} in forward")
            assert_raises(
                CacheStateError,
                partial(model.generate, ids, past_key_values=cache, max_new_tokens=2),
                f"{what} in generate",
            )
        for kind in ("static", "quantized"):
            assert_raises(
                SparingError,
                partial(model.generate, ids, cache_implementation=kind, max_new_tokens=2),
                f"cache_implementation={kind!r}",
            )


def check_misused_caches_are_refused(make: MethodFactory, name: str) -> None:
    """A compressed cache outside its session, or cropped into what was dropped, is refused, never silently wrong."""
    model, method = tiny_model(name), make(keep=0.5)
    run = run_method(model, method, random_prompt(40))
    assert_raises(
        SparingError, lambda: Driver(model, run.cache).feed(random_prompt(1).ids), "a cache after its session"
    )
    cache = run_method(model, method, random_prompt(40)).cache
    assert_raises(CacheStateError, lambda: cache.crop(-30), "cropping into what was compressed")
    with use(model, method) as session:
        assert_raises(CacheStateError, session.report, "a report before anything was generated")


def check_drafting_with_every_step_is_refused(make: MethodFactory, name: str) -> None:
    """Drafted tokens are cropped again, which a method that evicts at every step must refuse before it starts."""
    model, method = tiny_model(name), make(keep=0.5)
    if method.parts().moment != "every_step":
        return
    with use(model, method):
        for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_model(name)}):
            assert_raises(
                MethodRefusedError,
                partial(model.generate, random_prompt(30).ids, max_new_tokens=3, do_sample=False, **how),
                f"generate({next(iter(how))}=...)",
            )


def check_attention_weights_are_refused(make: MethodFactory, name: str) -> None:
    """Attention maps do not exist for compressed layers: asking for them is refused, not answered with None."""
    model = tiny_model(name)
    ids = random_prompt(20).ids
    with use(model, make(keep=0.5)):
        assert_raises(SparingError, lambda: model(ids, output_attentions=True), "output_attentions in forward")
        assert_raises(
            SparingError,
            lambda: model.generate(ids, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2),
            "output_attentions in generate",
        )
