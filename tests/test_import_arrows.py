"""The import arrows of DESIGN.md, read from the source: cli → compare → methods → {measures, core} ← adapters."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparing

ROOT = Path(sparing.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

# Module (with all below it) → what it must not import.
FORBIDDEN = {
    "sparing.errors": ["sparing."],
    "sparing.core": [
        "sparing.adapters", "sparing.methods", "sparing.kernels", "sparing.compare", "sparing.measures",
        "sparing.session", "sparing.testing", "sparing.cli",
    ],
    "sparing.measures": [
        "sparing.adapters", "sparing.methods", "sparing.kernels", "sparing.compare", "sparing.session",
        "sparing.testing", "sparing.cli",
    ],
    "sparing.methods": ["sparing.adapters", "sparing.kernels", "sparing.compare", "sparing.session", "sparing.cli"],
    "sparing.adapters": ["sparing.methods", "sparing.measures", "sparing.compare", "sparing.session", "sparing.cli"],
    "sparing.kernels": ["sparing.adapters", "sparing.methods", "sparing.compare", "sparing.session", "sparing.cli"],
    "sparing.compare": ["sparing.cli", "sparing.serve"],
    "sparing.serve": ["sparing.cli", "sparing.testing"],
    "sparing.lm_eval": ["sparing.cli"],
    "sparing.tune": ["sparing.cli"],
    # Score, budget and action never import each other. Allocators are where scores meet budgets, as data.
    "sparing.core.token_scores": ["sparing.core"],
    "sparing.core.scorer": ["sparing.core"],
    "sparing.core.budget": ["sparing.core"],
    "sparing.core.allocate": ["sparing.core.scorer", "sparing.core.method", "sparing.core.plan"],
    "sparing.core.plan": ["sparing.core"],
    "sparing.measures.": ["sparing.core.budget", "sparing.core.allocate", "sparing.core.plan", "sparing.core.method"],
}  # fmt: skip

# The registry walks the methods package on first use, so that a method is registered in its own file alone.
ALLOWED = {("sparing.core.registry", "sparing.methods")}

TRANSFORMERS = (
    "sparing.adapters", "sparing.session", "sparing.scoring", "sparing.loading", "sparing.models", "sparing.compare",
    "sparing.testing", "sparing.cli",
)  # fmt: skip


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Every dotted name that the source imports, also inside functions; `from a import b` gives a and a.b."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.rsplit(".", node.level - 1)[0]
                base = f"{above}.{base}" if base else above
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def lies_in(name: str, place: str) -> bool:
    return name == place or name.startswith(place if place.endswith(".") else place + ".")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """The forbidden imports of one module, as sentences."""
    found = []
    for name in imports(source, module, is_package):
        for place, forbidden in FORBIDDEN.items():
            allowed = any(module == importer and lies_in(name, target) for importer, target in ALLOWED)
            if lies_in(module, place) and any(lies_in(name, bad) for bad in forbidden) and not allowed:
                found.append(f"{module} imports {name}")
        if lies_in(name, "transformers") and not any(lies_in(module, place) for place in TRANSFORMERS):
            found.append(f"{module} imports {name}")
    return sorted(set(found))


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_one_way(module):
    path = MODULES[module]
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


@pytest.mark.parametrize("module", MODULES)
def test_no_module_grows_without_end(module):
    assert len(MODULES[module].read_text().splitlines()) <= 400


def test_the_rules_name_places_that_exist():
    """A rule about a module that was moved would hold for nothing."""
    planned = {"sparing.cli", "sparing.testing", "sparing.compare"}
    places = set(FORBIDDEN) | {bad for names in FORBIDDEN.values() for bad in names} | set(TRANSFORMERS)
    assert {place.rstrip(".") for place in places} - planned - {"sparing"} <= set(MODULES)


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("sparing.core.x", "import sparing.adapters.cache", "sparing.adapters.cache"),
        ("sparing.core.x", "def f():\n    from sparing import methods", "sparing.methods"),
        ("sparing.core.x", "from ..kernels import attend", "sparing.kernels"),
        ("sparing.core.x", "from transformers.cache_utils import Cache", "transformers.cache_utils"),
        ("sparing.measures.x", "from sparing.core.budget import round_to_total", "sparing.core.budget"),
        ("sparing.methods.kv.x", "from sparing.kernels.attend import attend", "sparing.kernels.attend"),
        ("sparing.methods.kv.x", "if True:\n    import transformers", "transformers"),
        ("sparing.kernels.x", "from sparing.adapters import cache", "sparing.adapters"),
        ("sparing.core.token_scores", "from sparing.core import budget", "sparing.core.budget"),
        ("sparing.core.budget", "from .token_scores import TokenScores", "sparing.core.token_scores"),
        ("sparing.errors", "import sparing.core.plan", "sparing.core.plan"),
        ("sparing.tasks.x", "import transformers", "transformers"),
    ],
)
def test_a_broken_module_is_seen(module, source, found):
    assert f"{module} imports {found}" in violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "sparing.core.allocate",
            "from sparing.core.token_scores import TokenScores\nfrom sparing.core.budget import share_of",
        ),
        ("sparing.core.registry", "import sparing.methods"),
        ("sparing.measures.x", "from sparing.core.scorer import Queries"),
        ("sparing.adapters.x", "import transformers\nfrom sparing.kernels import attend"),
        ("sparing.core.x", "import transformers_like\nfrom sparing.errors import SparingError"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert violations(source, module) == []
