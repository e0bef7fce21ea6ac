"""The model type `sparing` of lm-evaluation-harness: its `hf`, with every prompt's cache compressed by a method.

~~~
lm_eval --model sparing --model_args pretrained=NAME,method=snapkv,keep=0.25 --tasks ...
lm_eval --model sparing --model_args pretrained=NAME,recipe=recipe.json --tasks ...
~~~

- `generate_until`: the prompt is read, compressed, and answered from what is left, with the task's own stop sequences,
  greedy or sampled as it says. The first token comes from the prompt's own forward, as in every paper on the subject.
- `loglikelihood`: the context is read and compressed, and the continuation scored on what is left, its first token
  included (see `likelihood`). A context of a single token has nothing to compress, and is scored as `hf` does.
- `loglikelihood_rolling` is refused, unless nothing is dropped: the harness defines it as text after a single token, so
  there is no context to compress, and the number would be the full cache's under a method's name.

A prompt of the harness is context and question in one text: this is the query-aware setting. For the other one, see
`tasks`. Without `method` and `recipe` the full cache is kept, and all results are those of `hf`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from sparing.compare.engine import FULL
from sparing.core.budget import parse_keep
from sparing.core.fingerprint import fingerprint
from sparing.core.method import Method
from sparing.core.parsing import parse_method
from sparing.core.prefill import as_said
from sparing.errors import (
    InvalidInputError,
    MethodRefusedError,
    MissingExtraError,
    UnsupportedModelError,
)
from sparing.lm_eval.held import Held
from sparing.lm_eval.likelihood import Asked, log_likelihoods
from sparing.loading import Drafts, LoadedModel, ModelSpec, source_of
from sparing.recipe import Recipe, load
from sparing.session import use

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as missing:
    raise MissingExtraError("lm-evaluation-harness", "lm-eval") from missing

# Below the harness's own logger: shown as its lines are.
LOGGER = logging.getLogger("lm_eval.sparing")

Request = tuple[Any, list[int], list[int]]


@register_model("sparing")
class SparingLM(HFLM):
    """A causal language model of transformers that answers from compressed caches.

    Args:
        pretrained: "bundled", a folder, a name on the Hugging Face Hub, or a loaded model; by default the recipe's.
        recipe: a file that `sparing tune` wrote.
        method: a method as text (see `core.parsing.parse_method`) or as an object; not together with a recipe.
        keep: the method's budget, 0.5 by default; as on the command line: 0.25 is a share, 512 tokens, "64MiB" bytes.
        dtype, device: see `ModelSpec`; by default the recipe's.
        **options: all others of the harness's `hf`: batch_size, max_length, revision, parallelize, ...

    Attributes:
        method: at work. label: its name. held: what all caches so far have held.

    Raises:
        InvalidInputError: arguments that do not go together, or no method. InputFileError: no recipe, or one of another
            model. MethodRefusedError: the method cannot work on this model. UnsupportedModelError: nor can any.
    """

    def __init__(
        self,
        pretrained: Any = None,
        recipe: str | None = None,
        method: str | Method | None = None,
        keep: float | str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        chosen = None if recipe is None else load(recipe)
        spec = _spec(chosen, pretrained, dtype, device)
        drafts = Drafts(spec)
        self.method = as_said(_method(chosen, method, keep, drafts))
        self.label = "full cache" if self.method is FULL else self.method.label
        self.held = Held()
        mine = {"pretrained": pretrained} if isinstance(pretrained, torch.nn.Module) else _arguments(spec)
        super().__init__(**(mine | options))
        if self.backend != "causal":
            raise UnsupportedModelError(spec.name, "is no causal language model", "use the harness's own `hf`")
        mark = fingerprint(self.model)
        drafts.check(LoadedModel(spec, self.model, self.tokenizer, mark, self.max_length))
        if chosen is not None:
            chosen.check_model(mark)
        self._session = use(self.model, self.method)  # refuses what cannot work before the requests are built
        if self.batch_size != 1 and not self.method.keeps_all and self.method.parts().scorer.replays:
            problem = "replays the prompt, which it can do for one sequence at a time only"
            raise MethodRefusedError(self.label, problem, "use batch_size=1")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """See `HFLM`; every batch is answered from compressed caches."""
        answers: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        LOGGER.info("%s: %s", self.label, self.held)
        return answers

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        with self._session as session:
            tokens: torch.Tensor = super()._model_generate(context, max_length, stop, **generation_kwargs)
        assert session.cache is not None
        self.held.add(session.cache, len(context))
        session.cache = None
        return tokens

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `HFLM`; every continuation is scored on its context's compressed cache."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        LOGGER.info("%s: %s", self.label, self.held)
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """See `HFLM`; there is no context to compress.

        Raises:
            MethodRefusedError: the method would change something else.
        """
        if self.method.keeps_all and self.method.reading is None and self.method.shortening is None:
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            return found
        problem = "the harness scores rolling likelihoods after a single token, so there is no context to compress"
        fix = "leave `method` out for the model's own number, or use `sparing compare --tasks perplexity`"
        raise MethodRefusedError(self.method.label, problem, fix)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            groups.setdefault(self._fitting(context, continuation), []).append(number)
        alone = [number for context, numbers in groups.items() if len(context) == 1 for number in numbers]
        by_hf = super()._loglikelihood_tokens([requests[number] for number in alone], disable_tqdm, override_bs)
        answers: dict[int, tuple[float, bool]] = dict(zip(alone, by_hf, strict=True))
        longest = sorted((context for context in groups if len(context) > 1), key=len, reverse=True)
        size = self._size(requests[groups[longest[0]][0]]) if longest else 1
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring continuations")
        progress.update(len(alone))
        for start in range(0, len(longest), size):
            part = [(context, groups[context]) for context in longest[start : start + size]]
            batch = [Asked(context, [requests[number][2] for number in numbers]) for context, numbers in part]
            for (_, numbers), scores in zip(part, self._score(batch), strict=True):
                for number, score in zip(numbers, scores, strict=True):
                    answers[number] = score
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], score)
                progress.update(len(numbers))
        progress.close()
        return [answers[number] for number in range(len(requests))]

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """The end of a context that leaves room for a continuation, as `hf` cuts it."""
        room = self.max_length + 1 - len(continuation)
        if not 1 <= room <= self.max_length:
            allowed = f"1 to {self.max_length} tokens, what the model was made for"
            raise InvalidInputError("continuation", f"{len(continuation)} tokens", allowed)
        if len(context) > room:
            LOGGER.warning("a context of %d tokens was cut to its last %d", len(context), room)
        return tuple(context[-room:])

    def _size(self, longest: Request) -> int:
        """Contexts per batch; "auto" tries what the longest allows."""
        return int(self._detect_batch_size([longest], 0) if self.batch_size == "auto" else self.batch_size)

    def _score(self, batch: Sequence[Asked]) -> list[list[tuple[float, bool]]]:
        """Of each context's continuations: log-likelihood, and whether it is greedy decoding's."""
        kind, dtype = self.device.type, self.mixed_precision_dtype
        with self._session as session, torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            cache, read, found = log_likelihoods(session, batch, self.softmax_dtype)
        self.held.add(cache, len(batch))
        self.held.read += read
        session.cache = None
        return found

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into the `config` of its results; of our own, under "sparing"."""
        info: dict[str, Any] = super().get_model_info()
        return info | {"sparing": {"method": repr(self.method), **self.held.facts()}}


def _spec(recipe: Recipe | None, pretrained: Any, dtype: str | None, device: str | None) -> ModelSpec:
    """Which model: what is given, and from the recipe what is not."""
    if recipe is None and pretrained is None:
        raise InvalidInputError("pretrained", None, 'a model: "bundled", a folder, or a name on the Hub; or a `recipe`')
    spec = ModelSpec() if recipe is None else recipe.model
    name = getattr(pretrained, "name_or_path", pretrained)
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        device = None  # the harness's command asks for one wherever it is told nothing
    given = {"name": name, "dtype": dtype, "device": device}
    return replace(spec, **{field: value for field, value in given.items() if value is not None})


def _arguments(spec: ModelSpec) -> dict[str, Any]:
    """What the harness's `hf` calls the parts of a spec."""
    source, revision = source_of(spec.name)
    return {
        "pretrained": source, "dtype": spec.dtype, "device": spec.place, "parallelize": spec.device_map is not None,
        "trust_remote_code": spec.trust_remote_code, **({} if revision is None else {"revision": revision}),
    }  # fmt: skip


def _method(recipe: Recipe | None, method: str | Method | None, keep: float | str | None, drafts: Drafts) -> Method:
    """The one method that the arguments mean."""
    if recipe is not None:
        if method is not None or keep is not None:
            raise InvalidInputError("method", method or f"keep={keep}", "nothing beside a recipe, which says it")
        return recipe.method
    if isinstance(method, Method) or method is None:
        if keep is not None:
            raise InvalidInputError("keep", keep, "nothing without a method's name")
        return FULL if method is None else method
    return parse_method(method, 0.5 if keep is None else parse_keep(str(keep)), drafts)
