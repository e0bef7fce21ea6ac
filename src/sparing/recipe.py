"""A recipe: which model, which method with which parameters, and what it was measured to do. One JSON file.

~~~python
recipe = sparing.load("recipe.json")
loaded = recipe.load_model()
with sparing.use(loaded.model, recipe.method) as session:
    loaded.model.generate(...)
~~~
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sparing.compare.environment import environment
from sparing.compare.store import write_json_atomic
from sparing.core.budget import Budget, Keep
from sparing.core.method import Method
from sparing.core.parsing import parse_method
from sparing.errors import InputFileError, InvalidInputError, MissingExtraError, OutputError
from sparing.loading import Drafts, LoadedModel, ModelSpec

FORMAT = "sparing-recipe-1"
# A file that a method's text names, as `parse_call` reads it.
_SCORES = re.compile(r"""\bscores\s*=\s*['"]?([^,]+?)['"]?\s*(?=,|\)\s*(?:[+&]|$))""")


@dataclass(frozen=True)
class Recipe:
    """What to run, and what to expect of it.

    Attributes:
        model: which model, and how it is loaded. fingerprint: of the model that it was made for.
        text: the method as text, see `parse_method`. keep: its budget. parameters: the method with all its values.
        work: on what it was measured: tasks as text, mode, lengths, the numbers of the contexts, and the seed.
        request: what was asked for. expected: what was measured: scores with intervals, bytes, seconds.
        artifacts: files that the text names, relative to the recipe's folder, and their SHA-256.
        environment: versions and hardware of the measurement. folder: where the recipe lies.
    """

    model: ModelSpec
    fingerprint: str
    text: str
    keep: Keep
    parameters: str
    work: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, Any] = field(default_factory=dict)
    artifacts: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=environment)
    folder: Path = Path()

    @cached_property
    def method(self) -> Method:
        """The method, ready for `sparing.use`.

        Raises:
            InputFileError: a file that it needs is missing or has changed, or this version of sparing makes another
                method of the same text.
        """
        self.check_artifacts()
        method = parse_method(self.resolved, self.keep, Drafts(self.model))
        self.check_method(repr(method))
        return method

    @property
    def resolved(self) -> str:
        """The method's text, with files where they are."""
        return _SCORES.sub(lambda found: f"scores={self.folder / found.group(1)}", self.text)

    def load_model(self) -> LoadedModel:
        """Load the model.

        Raises:
            InputFileError: it is not the model that the recipe was made for. UnsupportedModelError: see `ModelSpec`.
        """
        loaded = self.model.load()
        self.check_model(loaded.fingerprint)
        return loaded

    def check_artifacts(self) -> None:
        """Refuse to run with other files than the recipe was made with.

        Raises:
            InputFileError: one is missing or has changed.
        """
        for name, digest in self.artifacts.items():
            if _digest(self.folder / name) != digest:
                raise InputFileError(self.folder / name, "is not the file that the recipe was made with")

    def check_method(self, parameters: str) -> None:
        """Refuse another method than the recipe's; `parameters`: the method with all its values.

        Raises:
            InputFileError: it is another one.
        """
        if parameters != self.parameters:
            problem = f"means another method in this version of sparing: {parameters}, not {self.parameters}"
            made = self.environment.get("sparing")
            raise InputFileError(self.folder, problem, f"install sparing {made}, or tune again")

    def check_model(self, fingerprint: str) -> None:
        """Refuse another model than the recipe's.

        Raises:
            InputFileError: it is another one.
        """
        if fingerprint != self.fingerprint:
            problem = f"was made for another model than {self.model.name} is now, or for another dtype"
            raise InputFileError(self.folder, problem, "leave other models and dtypes out, or tune again")

    def save(self, path: str | Path) -> Recipe:
        """Write the recipe, and the files that it needs beside it.

        Returns:
            The recipe as it was written.

        Raises:
            OutputError: it can't be written. InputFileError: a file that it needs can't be read.
        """
        target = Path(path)
        artifacts: dict[str, str] = {}

        def beside(found: re.Match[str]) -> str:
            source = self.folder / found.group(1)
            digest = _digest(source)
            name = f"{target.stem}-{source.name}" if target.stem not in source.name else source.name
            if artifacts.get(name, digest) != digest:  # two files of one name
                name = f"{digest[:8]}-{name}"
            _copy(source, target.parent / name)
            artifacts[name] = digest
            return f"scores={name}"

        text = _SCORES.sub(beside, self.text)
        written = replace(self, text=text, artifacts=artifacts, folder=target.parent)
        content = asdict(written) | {"folder": None}
        content = {"format": FORMAT} | {name: value for name, value in content.items() if name != "folder"}
        write_json_atomic(target, content)
        return written


def load(path: str | Path, trust_remote_code: bool = False) -> Recipe:
    """Read a recipe that `sparing tune` wrote.

    Args:
        trust_remote_code: run Python code that comes with the model. A recipe can't allow that by itself: it may be
            somebody else's.

    Raises:
        InputFileError: the file is missing or is no recipe.
    """
    path = Path(path)
    fix = "write one with `sparing tune`"
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputFileError(path, f"cannot be read ({error.strerror})", fix) from error
    except ValueError as error:
        raise InputFileError(path, f"is not JSON ({error})", fix) from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InputFileError(path, f'is not a recipe (no "format": "{FORMAT}")', fix)
    try:
        content["model"] = ModelSpec(**content["model"] | {"trust_remote_code": trust_remote_code})
        recipe = Recipe(**content, folder=path.parent)
        Budget.parse(recipe.keep)
        _check_words(recipe)
    except (TypeError, KeyError, InvalidInputError, MissingExtraError) as error:
        raise InputFileError(path, f"a recipe with wrong parts ({error})", fix) from error
    return recipe


def _check_words(recipe: Recipe) -> None:
    """Refuse what is no text where text is expected: it would fail later and less clearly."""
    for name in ("fingerprint", "text", "parameters"):
        if not isinstance(getattr(recipe, name), str):
            raise TypeError(f"{name} is no text")
    for name in ("work", "request", "expected", "artifacts", "environment"):
        if not isinstance(getattr(recipe, name), dict):
            raise TypeError(f"{name} is no object")


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputFileError(path, f"cannot be read ({error.strerror})", "the recipe needs it beside it") from error


def _copy(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)
    except OSError as error:
        raise OutputError(target, f"cannot be written ({error.strerror})") from error
