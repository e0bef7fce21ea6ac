"""The session: a method at work on a model, for the length of a `with` block."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sparing.adapters.accounting import CacheReport
from sparing.adapters.attach import Attachment
from sparing.adapters.attention import CACHING
from sparing.adapters.cache import EvictingCache
from sparing.adapters.cascade_hooks import CascadeHooks
from sparing.adapters.cascading import Cascading
from sparing.adapters.handles import UPDATED
from sparing.adapters.lens import ModelLens
from sparing.adapters.shortening import implied_mask, short_arguments, shorten, whole_output
from sparing.adapters.structure import read_structure
from sparing.core.draft import Draft
from sparing.core.method import Method
from sparing.core.prompt import PromptDropper
from sparing.errors import CacheStateError, InvalidInputError, MethodRefusedError, require


class Session:
    """A method at work on a model. Made by `use`.

    Inside the block `model.generate(...)` and `model(...)` fill compressed caches by themselves. State lives in
    those caches: several can be alive at once, and each can be carried through several turns by passing it as
    `past_key_values`. On leaving, the model, torch and transformers are as they were found.

    Attributes:
        model, method: what was given.
        structure: what sparing has read of the model.
        cache: the cache that was made last, None before the first call.
    """

    def __init__(self, model: nn.Module, method: Method) -> None:
        if not isinstance(method, Method):
            raise InvalidInputError("method", method, "a method, e.g. sparing.SnapKV(keep=0.25)")
        self.structure = read_structure(model)
        check_measurements(model, [method])
        self.model, self.method = model, method
        self.cache: EvictingCache | None = None
        self._attachment: Attachment | None = None
        self._hook: Any = None
        self._cascade: CascadeHooks | None = None
        self._own_generate: dict[str, Any] = {}
        self._lenses: dict[Draft, ModelLens] = {}
        if method.shortening is not None:
            self._lens_of(method.shortening)  # refuses a draft model that does not fit

    def __enter__(self) -> Session:
        self._attachment = Attachment(self.model, CACHING)
        self._hook = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._own_generate = {name: value for name, value in vars(self.model).items() if name == "generate"}
        if hasattr(self.model, "generate"):
            generate: Any = self.model.generate
            # On the instance, so that leaving the block is deleting it again, or putting the user's own back.
            self.model.__dict__["generate"] = functools.wraps(generate)(functools.partial(self._generate, generate))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.model.__dict__.pop("generate", None)
        self.model.__dict__.update(self._own_generate)
        self._hook.remove()
        if self._cascade is not None:
            self._cascade.remove()
            self._cascade = None
        UPDATED.take()  # an exception may have come between a layer's update and its attention
        assert self._attachment is not None
        self._attachment.detach()
        self._attachment = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The model as it was found, for the length of a block: to watch it, or to rank with it. Caches stay.

        Example:
            >>> with session.paused():
            ...     ranked = sparing.rerank(model, tokenizer, query, documents)
        """
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def new_cache(self) -> EvictingCache:
        """A fresh cache for one conversation, to be passed as `past_key_values`."""
        self.cache = self._equipped(EvictingCache(self.structure, self.method))
        return self.cache

    def _equipped(self, cache: EvictingCache) -> EvictingCache:
        """The cache, able to run more tokens for scorers that replay the prompt."""
        for scorer in cache.scorers:
            scorer.meet(self.model)
        model = weakref.ref(self.model)

        def run(**inputs: Any) -> None:
            alive = model()
            assert alive is not None
            alive(**inputs)

        cache.tape.run = run
        return cache

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        chunk_size: int = 1024,
        attention_mask: Tensor | None = None,
        cache: EvictingCache | None = None,
    ) -> EvictingCache:
        """Read a context in chunks and compress it, before any question is known.

        With a method at `moment="chunk_end"` no more than the budget and one chunk is ever held.

        Example:
            >>> cache = session.prefill(context_ids, chunk_size=512)
            >>> model.generate(torch.cat([context_ids, question_ids], dim=1), past_key_values=cache)

        Args:
            input_ids: (B, n) all tokens so far, as `generate` takes them; what the cache has read is left out.
            chunk_size: tokens read at a time.
            attention_mask: (B, n), 0 for pads on the left.
            cache: one that holds earlier turns; a new one by default.

        Returns:
            The cache, compressed. `generate` goes on from it with at least one more token.

        Raises:
            InvalidInputError: nothing to read, or `chunk_size` is no number of tokens.
        """
        require(chunk_size >= 1, "chunk_size", chunk_size, "a number of tokens >= 1")
        cache = cache or self.new_cache()
        input_ids, attention_mask = self.shorten(cache, input_ids, attention_mask)
        read, length = cache.get_seq_length(), input_ids.shape[1]
        require(read < length, "input_ids", f"{length} tokens", f"more than the {read} that the cache has read")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        cache.expect_prompt(length)
        for start in range(read, length, chunk_size):
            end = min(start + chunk_size, length)
            self.model(
                input_ids=input_ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end],
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        cache.report()
        return cache

    @torch.no_grad()
    def shorten(
        self, cache: EvictingCache, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What a cache's model reads in the place of (B, n) tokens, and its mask: the same, unless a method drops some.

        The first prompt of a cache is shortened; later turns are read whole, behind the short prompt.

        Raises:
            MethodRefusedError: the draft model does not fit. CacheStateError: pads are not on the left.
        """
        if cache.dropper is not None and not cache.get_seq_length():
            lens = self._lens_of(cache.dropper)
            cache.shortening = shorten(cache.dropper, lens, input_ids, attention_mask)
        return (
            (input_ids, attention_mask)
            if cache.shortening is None
            else cache.shortening.apply(input_ids, attention_mask)
        )

    def _lens_of(self, dropper: PromptDropper) -> ModelLens:
        """How a method sees its draft model; made once."""
        draft: Draft = dropper.draft
        if draft not in self._lenses:
            draft.meet(dropper.label, self.model)
            self._lenses[draft] = ModelLens(draft.model)
        return self._lenses[draft]

    def watching_cache(self, methods: Iterable[Method]) -> EvictingCache:
        """A cache that drops nothing while the scorers of the given methods watch: one prefill, to be forked for each.

        All methods must read the prompt alike (`Method.reading`), and the same of it (`Method.shortening`, for which
        the prompt goes through `shorten` first).

        Example:
            >>> cache = session.watching_cache([snapkv, h2o])
            >>> cache.expect_prompt(ids.shape[1])
            >>> model(ids, past_key_values=cache)
            >>> compressed = cache.fork(snapkv)
        """
        given = list(methods)
        readings = {(method.reading, method.shortening) for method in given} or {(None, None)}
        if len(readings) > 1:
            labels = ", ".join(method.label for method in given)
            raise InvalidInputError("methods", labels, "methods that read the prompt alike, one cache for each way")
        watch = [method.parts().scorer for method in given if not method.keeps_all]
        return self._equipped(EvictingCache(self.structure, None, watch, *readings.pop()))

    def report(self, cache: EvictingCache | None = None) -> CacheReport:
        """What the given cache (by default the one made last) keeps, in tokens and bytes.

        Raises:
            CacheStateError: no cache has been made yet.
        """
        cache = cache or self.cache
        if cache is None:
            raise CacheStateError("nothing has been generated in this session yet", "call model.generate first")
        return cache.report()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give a call without a cache one of ours; refuse a cache that cannot be compressed."""
        UPDATED.take()  # of a forward that was interrupted
        self._follow(None)
        past = kwargs.get("past_key_values")
        if past is None and kwargs.get("use_cache") is False:
            return None
        if kwargs.get("output_attentions") or getattr(self.model.config, "output_attentions", False):
            fix = "compressed layers have no attention map; ask the model for it outside the block"
            raise InvalidInputError("output_attentions", True, "False inside `with sparing.use(...)`", fix)
        if isinstance(past, EvictingCache):
            self._follow(past)
            self._record(past, args, kwargs)
            return None
        if isinstance(past, Cache):
            problem = f"a {type(past).__name__} was passed, which cannot be compressed"
            raise CacheStateError(problem, "pass session.new_cache() or no cache at all")
        cache = self.new_cache()
        self._follow(cache)
        self._record(cache, args, kwargs)
        return args, {**kwargs, "past_key_values": cache, "use_cache": True}

    def _follow(self, cache: EvictingCache | None) -> None:
        """A forward with this cache begins: tokens may be dropped on its way through the blocks."""
        if self._cascade is None and cache is not None and isinstance(cache.prefilling, Cascading):
            self._cascade = CascadeHooks(self.model, len(cache.layers))
        if self._cascade is not None:
            self._cascade.cache = cache

    @staticmethod
    def _record(cache: EvictingCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the tokens that a cache is about to read, if a scorer wants to replay them."""
        ids = args[0] if args else kwargs.get("input_ids")
        if cache.replaying is None and isinstance(ids, Tensor) and any(scorer.replays for scorer in cache.scorers):
            cache.tape.write(ids)

    def _generate(self, generate: Any, *args: Any, **kwargs: Any) -> Any:
        """`model.generate` with a compressed cache."""
        past = kwargs.get("past_key_values")
        if past is None:
            past = kwargs["past_key_values"] = self.new_cache()
        elif not isinstance(past, EvictingCache):
            problem = f"a {type(past).__name__} was passed, which cannot be compressed"
            raise CacheStateError(problem, "pass session.new_cache() or no cache at all")
        self._refuse(kwargs)
        prompt = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if past.dropper is not None:
            return self._generate_short(generate, past, prompt, args, kwargs)
        self._announce(past, kwargs.get("inputs_embeds") if prompt is None else prompt)
        return generate(*args, **kwargs)

    def _generate_short(
        self, generate: Any, past: EvictingCache, prompt: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """`model.generate` on less than the prompt; what comes out begins with the whole one."""
        if not isinstance(prompt, Tensor):
            raise InvalidInputError("inputs", type(prompt).__name__, "token ids, which a draft model can read")
        config: Any = kwargs.get("generation_config") or self.model.generation_config
        short, mask = self.shorten(past, prompt, implied_mask(prompt, kwargs, config))
        self._announce(past, short)
        if short is prompt:
            return generate(*args, **kwargs)
        args, kwargs = short_arguments(args, kwargs, short, mask, config)
        return whole_output(generate(*args, **kwargs), prompt, short.shape[1])

    @staticmethod
    def _announce(past: EvictingCache, prompt: Any) -> None:
        """Tell a cache where its prompt ends."""
        if isinstance(prompt, Tensor):
            read = past.get_seq_length()
            new = "more tokens than the cache has read"
            require(prompt.shape[1] > read or not read, "inputs", f"{prompt.shape[1]} tokens, {read} of them read", new)
            past.expect_prompt(prompt.shape[1])

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        """What cannot work is refused before anything runs."""
        drafted = kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens") is not None
        if drafted and self.method.parts().moment == "every_step":
            problem = "drafted tokens are cropped again, but this method drops others for them at once"
            raise MethodRefusedError(self.method.label, problem, 'use moment="prefill_end"')
        config = kwargs.get("generation_config")
        got = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None))
        if isinstance(got, str) and got.startswith(
            "dynamic"
        ):  # what ours stands for; transformers asks drafters for it
            kwargs.pop("cache_implementation", None)
            if config is not None:
                kwargs["generation_config"] = copy.deepcopy(config)
                kwargs["generation_config"].cache_implementation = None
        elif got is not None:
            raise InvalidInputError("cache_implementation", got, "nothing: the session brings its own cache")


def check_measurements(model: nn.Module, methods: Iterable[Method]) -> None:
    """Refuse what was measured on a model of another shape. (Runs two tokens, if anything was measured.)

    Raises:
        ScoresMismatchError: architecture, layers or heads differ.
    """
    both = [each for method in methods for each in (method, method.prefill) if each is not None]
    measured = {scores for method in both for scores in method.measurements}
    if measured:
        identity = ModelLens(model).identity
        for scores in measured:
            scores.check_model(identity)


def use(model: nn.Module, method: Method) -> Session:
    """Compress the caches of a model inside a `with` block.

    Example:
        >>> with sparing.use(model, sparing.SnapKV(keep=0.25)) as session:
        ...     model.generate(**inputs, max_new_tokens=64)
        >>> print(session.report())

    Args:
        model: a decoder-only transformers model.
        method: what to keep, and how much.

    Raises:
        InvalidInputError: not a method. UnsupportedModelError: not a model with the seams that are needed.
        ScoresMismatchError: what the method knows was measured on a model of another shape.
    """
    return Session(model, method)
