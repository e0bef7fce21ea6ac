"""Loading a model and its tokenizer by name or path, with errors that say what to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sparing.core.fingerprint import fingerprint
from sparing.errors import InvalidInputError, MethodRefusedError, UnsupportedModelError
from sparing.models import resolve

# Below so many parameters, sharing an operation between threads costs more than it saves (measured: twice the time).
TINY = 20_000_000

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be compared.

    Attributes:
        spec: as the user asked for it. model: in evaluation mode. tokenizer: its own.
        fingerprint: short hash of its configuration and of a sample of its weights.
        max_length: positions it was made for; None if its configuration does not say.
    """

    spec: ModelSpec
    model: Any
    tokenizer: Any
    fingerprint: str
    max_length: int | None

    @property
    def name(self) -> str:
        """The model's name as the user gave it."""
        return self.spec.name

    @property
    def description(self) -> str:
        """One line: type, layers, heads, parameters."""
        text = self.model.config.get_text_config(decoder=True)
        parameters = sum(p.numel() for p in self.model.parameters())
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        heads = f"{text.num_attention_heads} query / {kv_heads} KV heads"
        size = f"{parameters / 1e6:.2f} M parameters"
        return f"{type(self.model).__name__}, {text.num_hidden_layers} layers, {heads}, {size}"


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is loaded: all that another process needs to load the same one.

    Attributes:
        name: "bundled", a folder, or the name of a model on the Hugging Face Hub.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", ...; by default a GPU if there is one.

    Raises:
        InvalidInputError: unknown dtype.
    """

    name: str = "bundled"
    dtype: str = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidInputError("dtype", self.dtype, " or ".join(DTYPES))

    def load(self) -> LoadedModel:
        """Load a causal language model; for a tiny one on a CPU this process goes on with one thread.

        Raises:
            InvalidInputError: no such device here. UnsupportedModelError: no model that can be loaded has that name.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        _check_device(place)
        source = resolve(self.name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=self.dtype)
        except (OSError, ValueError, KeyError, ImportError) as error:
            problem = f"could not be loaded ({str(error).strip().splitlines()[0]})"
            fix = 'give "bundled", a folder made by save_pretrained, or the name of a causal language model on the Hub'
            raise UnsupportedModelError(self.name, problem, fix) from error
        model = model.to(place).eval()
        if place == "cpu" and sum(p.numel() for p in model.parameters()) < TINY:
            torch.set_num_threads(1)
        text = model.config.get_text_config(decoder=True)
        limit = getattr(text, "max_position_embeddings", None)
        return LoadedModel(self, model, tokenizer, fingerprint(model), limit)


class Drafts:
    """Loads draft models by name, each once, the way that the model itself is loaded.

    Example:
        >>> spec = ModelSpec("bundled", "float32")
        >>> drafts = Drafts(spec)
        >>> method = parse_method("specpc(draft=bundled)", 0.5, drafts)
        >>> drafts.check(spec.load())
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._loaded: dict[str, LoadedModel] = {}

    def __call__(self, name: str) -> Any:
        """The model of that name, see `ModelSpec.load`."""
        if name not in self._loaded:
            self._loaded[name] = replace(self._spec, name=name).load()
        return self._loaded[name].model

    def check(self, loaded: LoadedModel) -> None:
        """Refuse draft models whose tokenizers give texts other ids than a model's own.

        Raises:
            MethodRefusedError: one does.
        """
        for name, draft in self._loaded.items():
            if draft.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
                problem = f"the draft model has another tokenizer than {loaded.name}"
                raise MethodRefusedError(name, problem, "use a draft model with the same tokenizer")


def _check_device(place: str) -> None:
    """Refuse a device that is none, or that this machine or this build of torch lacks."""
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, ImportError) as error:
        allowed = f"one that torch finds here ({str(error).splitlines()[0]})"
        raise InvalidInputError("device", place, allowed, 'give "cpu", or leave it out') from error
