"""Answers that do not depend on the order of documents or options: `position_invariant`."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sparing.adapters.attach import Attachment
from sparing.adapters.segments import SEGMENTS, UPDATED, SegmentedCache, require_turnable, zero_positions
from sparing.core.placement import input_device
from sparing.core.segments import Ids, SegmentedPrompt
from sparing.errors import CacheStateError, InvalidInputError, require
from sparing.methods.rerank.pine import Pine

# Arguments of `generate` that say what the session says itself.
_OWN = (
    "inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache",
    "cache_implementation", "output_attentions",
)  # fmt: skip


class SegmentSession:
    """Prompts of a prefix, segments in any order, and a suffix, on a model. Made by `position_invariant`.

    Inside the block `generate` and `logits` give the same for all orders of the segments, bit for bit. Calls of the
    model itself are as ever. On leaving, the model, torch and transformers are as they were found.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self._layers, self._rotary = require_turnable(model)
        self._attachment: Attachment | None = None
        self._hook: Any = None

    def __enter__(self) -> SegmentSession:
        self._attachment = Attachment(self.model, SEGMENTS)
        self._hook = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._attachment is not None
        self._hook.remove()
        UPDATED.take()  # an exception may have come between a layer's update and its attention
        self._attachment.detach()
        self._attachment = None

    def generate(self, prefix: Ids, segments: Sequence[Ids], suffix: Ids, **options: Any) -> Any:
        """What the model writes after the prompt.

        Args:
            prefix: ids of what comes before the segments, special tokens included; may be empty.
            segments: ids of each segment, in any order.
            suffix: ids of what comes after them, usually the question.
            options: of the model's `generate`: greedy, sampling, beams, `num_return_sequences`, ...

        Returns:
            What `generate` returns, without the prompt: (rows, new tokens), or with `return_dict_in_generate=True` an
            object whose `sequences` are that.

        Raises:
            InvalidInputError: no token ids, an empty segment or suffix, or an option that is the session's to set.
            CacheStateError: outside the `with` block, or `prefill_chunk_size` cuts the prompt.
        """
        ids, cache = self._begin(prefix, segments, suffix)
        for name in _OWN:
            require(name not in options, name, options.get(name), "nothing: the session sets it")
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True, **options
        )
        if isinstance(output, Tensor):
            return output[:, ids.shape[1] :]
        output.sequences = output.sequences[:, ids.shape[1] :]
        return output

    @torch.no_grad()
    def logits(self, prefix: Ids, segments: Sequence[Ids], suffix: Ids) -> Tensor:
        """(suffix tokens, vocabulary): what the model expects after each token of the suffix.

        See `generate`, also for what is raised.
        """
        ids, cache = self._begin(prefix, segments, suffix)
        count = ids.shape[1] - cache.layout.end
        logits: Tensor = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=count).logits
        return logits[0, -count:]

    def _begin(self, prefix: Ids, segments: Sequence[Ids], suffix: Ids) -> tuple[Tensor, SegmentedCache]:
        """The (1, n) ids of a prompt and an empty cache for it."""
        prompt = SegmentedPrompt.of(prefix, segments, suffix).in_canonical_order()
        known = self.model.get_input_embeddings().num_embeddings
        if max(prompt.ids) >= known:
            raise InvalidInputError("token id", max(prompt.ids), f"below {known}, the model's vocabulary")
        return torch.tensor([prompt.ids], device=input_device(self.model)), self._new_cache(prompt)

    def _new_cache(self, prompt: SegmentedPrompt) -> SegmentedCache:
        """A cache for a prompt as it stands, its segments in the order that they have."""
        if self._attachment is None:
            problem = "the session is not open, so the model would attend as ever"
            raise CacheStateError(problem, "call it inside `with sparing.position_invariant(model) as session:`")
        return SegmentedCache(self._layers, prompt.layout, self._rotary, Pine())

    @staticmethod
    def _before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take the positions out of forwards that fill one of our caches."""
        UPDATED.take()  # of a forward that was interrupted
        if isinstance(kwargs.get("past_key_values"), SegmentedCache):
            return args, zero_positions(args, kwargs)
        return None


def position_invariant(model: nn.Module) -> SegmentSession:
    """Make a model's answers independent of the order of documents or options, without training (PINE).

    Segments see each other, and each head of each layer decides by its own attention which segment is the nearest, so
    no order has to be given (Wang et al. 2024, arXiv:2407.01100; see `methods.rerank.pine`). What the model says
    differs from what it would say to any order of the text: with two or more segments no order is kept.

    Example:
        >>> with sparing.position_invariant(model) as session:
        ...     answer = session.generate(prefix_ids, [first_ids, second_ids, third_ids], suffix_ids, max_new_tokens=20)

    Args:
        model: a decoder-only transformers model with rotary positions and full attention in every layer.

    Raises:
        UnsupportedModelError: another model; or it is in use by another session.
    """
    return SegmentSession(model)
