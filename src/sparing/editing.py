"""Acting on heads: for the length of a `with` block, or for good in an ordinary checkpoint."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparing.adapters.fold import fold_into
from sparing.adapters.lens import ModelLens
from sparing.core.edits import AblateHeads, Ablation, Head, HeadEdit
from sparing.errors import InvalidInputError, OutputError, require
from sparing.measures.batches import pad_left
from sparing.methods.heads.uniform_heads import UniformHeads


@contextmanager
def edit(model: Any, *edits: HeadEdit) -> Iterator[None]:
    """Scale, ablate or bias heads inside a `with` block; `model(...)` and `model.generate(...)` are edited.

    Edits of heads' outputs work together with `sparing.use` (enter `edit` first); edits of attention do not.

    Example:
        >>> with sparing.edit(model, sparing.AblateHeads(((2, 1), (2, 2)))):
        ...     model.generate(**inputs)

    Raises:
        InvalidInputError: no edit, or a head that the model does not have.
        UnsupportedModelError: the model has no seam that an edit needs.
    """
    if not edits:
        raise InvalidInputError("edits", edits, "at least one edit")
    lens = ModelLens(model)
    for each in edits:
        each.check(lens)
    with ExitStack() as stack:
        for each in edits:
            hook: Any = {each.at: each.heads if each.at == "heads" else each.attention}
            stack.enter_context(lens.hooked(**hook))
        yield


def fold(model: Any, *edits: HeadEdit) -> None:
    """Change the weights so that the model by itself does what the edits do.

    Raises:
        InvalidInputError: no edit, an unknown head, or an edit that is no scaling and shifting of heads' outputs.
        UnsupportedModelError: an output projection that would need a bias which the architecture cannot store.
        Nothing is changed in any of these cases.
    """
    if not edits:
        raise InvalidInputError("edits", edits, "at least one edit")
    lens = ModelLens(model)
    for each in edits:
        each.check(lens)
    fold_into(lens, edits)


def save_edited(model: Any, tokenizer: Any, edits: Sequence[HeadEdit], folder: str | os.PathLike[str]) -> Path:
    """Save a folded copy of a model as an ordinary checkpoint; the model itself is not changed.

    The folder appears whole or not at all.

    Raises:
        OutputError: the folder exists and is not empty, or cannot be written. See also `fold`.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(target, "exists already", "name a new folder")
    edited = copy.deepcopy(model)
    fold(edited, *edits)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".sparing-"))
        try:
            edited.save_pretrained(scratch)
            if tokenizer is not None:
                tokenizer.save_pretrained(scratch)
            scratch.chmod(0o755)
            if target.exists():
                target.rmdir()
            os.replace(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise OutputError(target, str(error)) from error
    return target


def ablate(kind: Ablation, heads: Sequence[Head], reference: Tensor | None = None) -> HeadEdit:
    """The edit that takes heads away in the named way: zero, mean, uniform or resample.

    Args:
        reference: what `head_outputs` measured; needed for mean and resample.
    """
    return UniformHeads(tuple(heads)) if kind == "uniform" else AblateHeads(tuple(heads), kind, reference)


def head_outputs(model: Any, samples: Sequence[Any], tokens: int = 512, seed: int = 0) -> Tensor:
    """(L, tokens, Hq, Dv) outputs of all heads at tokens drawn from samples: the reference of mean and resample.

    Args:
        samples: objects with `ids`, e.g. of `sparing.tasks.probes.text_samples`.
        tokens: how many are drawn, without repetition; all of them if there are fewer.

    Raises:
        InvalidInputError: no samples, or no tokens.
    """
    require(len(samples) >= 1, "samples", "none", "at least one")
    require(tokens >= 1, "tokens", tokens, "a whole number >= 1")
    lens = ModelLens(model)
    ids, mask = pad_left([sample.ids for sample in samples])
    found: list[list[Tensor]] = [[] for _ in range(lens.num_layers)]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(int(mask.sum()), generator=generator)[:tokens]

    def keep(layer: int, z: Tensor) -> None:
        found[layer].append(z[mask.to(z.device)][chosen.to(z.device)])

    with torch.no_grad(), lens.hooked(heads=keep):
        lens.forward(ids, mask, last=1)
    return torch.stack([layer[0] for layer in found])
