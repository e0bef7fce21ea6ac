"""Loading a model and its tokenizer by name or path, with errors that say what to do."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparing.core.fingerprint import fingerprint
from sparing.errors import InvalidInputError, MethodRefusedError, MissingExtraError, UnsupportedModelError
from sparing.models import resolve
from sparing.tasks.chat import chat_frame

# Below so many parameters, sharing an operation between threads costs more than it saves (measured: twice the time).
TINY = 20_000_000

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")

_KINDS = 'give "bundled", a folder made by save_pretrained, or the name of a causal language model on the Hub'


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
    def end_ids(self) -> set[int]:
        """Tokens that end an answer."""
        eos = self.model.generation_config.eos_token_id
        return set(eos if isinstance(eos, list) else [eos]) - {None}

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
        name: "bundled", a folder, or the name of a model on the Hugging Face Hub, also `name@revision` with a
            branch, tag or commit.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", ...; by default a GPU if there is one.
        device_map: for models that are too large for one device: how transformers spreads the layers over all GPUs,
            then the CPU, then the disk: "auto", "balanced", "balanced_low_0" or "sequential". Needs accelerate.
        trust_remote_code: run Python code that comes with the model. Never done otherwise.
        chat: questions of the user's own are asked in the tokenizer's chat template.

    Raises:
        InvalidInputError: unknown dtype or device map, or a device and a device map. MissingExtraError: no accelerate.
    """

    name: str = "bundled"
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    trust_remote_code: bool = False
    chat: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidInputError("dtype", self.dtype, " or ".join(DTYPES))
        if self.device_map is None:
            return
        if self.device_map not in DEVICE_MAPS:
            raise InvalidInputError("device_map", self.device_map, " or ".join(DEVICE_MAPS))
        if self.device is not None:
            raise InvalidInputError("device", self.device, "none where a device map is given", "leave one of them out")
        if importlib.util.find_spec("accelerate") is None:
            raise MissingExtraError("accelerate", "big")

    @property
    def place(self) -> str:
        """The one device that it is loaded to, without a device map."""
        if self.device is not None:
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def load(self) -> LoadedModel:
        """Load a causal language model; for a tiny one on a CPU this process goes on with one thread.

        Raises:
            InvalidInputError: no such device here, or a chat with a tokenizer that has no template for it.
            UnsupportedModelError: no model that can be loaded has that name; the message says why.
        """
        from transformers import AutoConfig, AutoTokenizer

        if self.device_map is None:
            _check_device(self.place)
        source, revision = source_of(self.name)
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": self.trust_remote_code}
        with _named(self.name):
            config = AutoConfig.from_pretrained(source, **options)
        with _named(self.name, "its tokenizer "):
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        _check_tokenizer(self.name, tokenizer)
        if self.chat:
            chat_frame(tokenizer)
        model = self._model(source, {"config": config, **options})
        if self.place == "cpu" and sum(p.numel() for p in model.parameters()) < TINY:
            torch.set_num_threads(1)
        text = model.config.get_text_config(decoder=True)
        limit = getattr(text, "max_position_embeddings", None)
        return LoadedModel(self, model, tokenizer, fingerprint(model), limit)

    def _model(self, source: str, options: dict[str, Any]) -> Any:
        """The model itself, where it is to be, with all its weights."""
        from transformers import AutoModelForCausalLM

        with _named(self.name):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=self.dtype, device_map=self.device_map, output_loading_info=True, **options
            )
            model, info = loaded
            if self.device_map is None:
                model = model.to(self.place)
        missing = sorted(info["missing_keys"])
        if missing:  # transformers draws them at random, and goes on
            problem = f"its checkpoint lacks {len(missing)} of its weights, such as {missing[0]}"
            raise UnsupportedModelError(self.name, problem, "get the checkpoint again, or another one")
        return model.eval()


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
            self._loaded[name] = replace(self._spec, name=name, chat=False).load()
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
    fix = 'give "cpu", or leave it out'
    try:
        made = torch.empty(1, device=place)
    except (RuntimeError, AssertionError, ImportError) as error:
        allowed = f"one that torch finds here ({str(error).splitlines()[0]})"
        raise InvalidInputError("device", place, allowed, fix) from error
    if made.is_meta:
        raise InvalidInputError("device", place, "one that holds numbers", fix)


def source_of(name: str) -> tuple[str, str | None]:
    """What `from_pretrained` needs: a folder, or a name on the Hub and a revision of it.

    Raises:
        UnsupportedModelError: a path that leads to no model's folder.
    """
    path = Path(resolve(name)).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnsupportedModelError(name, "the folder has no config.json", _KINDS)
        return str(path), None
    if path.exists():
        raise UnsupportedModelError(name, "is a file, not a folder", _KINDS)
    if name[:1] in (".", "/", "~") or name.count("/") > 1:
        raise UnsupportedModelError(name, "there is no such folder", _KINDS)
    hub_name, at, revision = name.partition("@")
    if at and not revision:
        raise UnsupportedModelError(name, "names no revision", "write name@revision, or the name alone")
    return hub_name, revision or None


def _check_tokenizer(name: str, tokenizer: Any) -> None:
    """Refuse a tokenizer that knows no words: early transformers 5 makes one where a model has no files for it."""
    ids = set(tokenizer.encode("text", add_special_tokens=False))
    if ids <= {tokenizer.unk_token_id}:
        fix = "put the files there that tokenizer.save_pretrained writes"
        raise UnsupportedModelError(name, "its tokenizer knows no words", fix)


@contextmanager
def _named(name: str, part: str = "") -> Iterator[None]:
    """Turn what transformers, the Hub's client and a model's own code raise, which may be anything, into one error."""
    try:
        yield
    except Exception as error:
        raise UnsupportedModelError(name, *_diagnosis(error, part)) from error


def _diagnosis(error: Exception, part: str) -> tuple[str, str]:
    """What is wrong, and what to do about it."""
    from huggingface_hub import errors as hub

    if "trust_remote_code" in str(error):
        problem = f"{part}comes with Python code of its own, which is never run unasked"
        return problem, "if you have read and trust it: --trust-remote-code, or ModelSpec(trust_remote_code=True)"
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit into the device's memory", "use --device-map auto, or --dtype bfloat16"
    causes = [error, *_causes(error)]
    if any(isinstance(cause, hub.GatedRepoError) for cause in causes):
        return "is gated on the Hub", "ask for access on its page there, and log in with `hf auth login`"
    if any(isinstance(cause, hub.RevisionNotFoundError) for cause in causes):
        return "has no such revision on the Hub", "give a branch, a tag or a commit behind the @"
    if any(isinstance(cause, hub.RepositoryNotFoundError) for cause in causes):
        return "is not on the Hub, or private", "check its name, or log in with `hf auth login`"
    if any(isinstance(cause, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled) for cause in causes):
        return "is not on this machine, and the Hub cannot be reached", "connect to it, or give a folder"
    first = (str(error).strip().splitlines() or [""])[0].strip(": ")
    fix = "put the files there that tokenizer.save_pretrained writes" if part else _KINDS
    return f"{part}could not be loaded ({first or type(error).__name__})", fix


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause = error.__cause__ or error.__context__
    if cause is not None:
        yield cause
        yield from _causes(cause)
