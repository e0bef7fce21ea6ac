"""What users see: names, help, documents. Drift between them and the registry is a failure."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparing
from sparing.core.method import methods

ROOT = Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("name", sparing.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(sparing, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Snap'"):
        sparing.Snap  # noqa: B018


def test_every_registered_method_has_a_public_class() -> None:
    for info in methods().values():
        assert getattr(sparing, info.recipe.__name__) is info.recipe


@pytest.mark.parametrize(
    "code", ["import sparing", "import sparing.cli", "import sparing.tasks, sparing.compare.store"]
)
def test_importing_loads_no_torch(code: str) -> None:
    done = run("-c", f"{code}; import sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_importing_everything_changes_nothing_in_transformers() -> None:
    code = """
import torch, transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING
before = (sorted(ALL_ATTENTION_FUNCTIONS.keys()), dict(DYNAMIC_LAYER_TYPE_MAPPING), torch.get_num_threads())
import sparing.session, sparing.compare.sweep
from sparing.core.method import methods
methods()
after = (sorted(ALL_ATTENTION_FUNCTIONS.keys()), dict(DYNAMIC_LAYER_TYPE_MAPPING), torch.get_num_threads())
assert before == after
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    return run("-c", f"import sys; sys.argv = {['sparing', *words]!r}\nfrom sparing.cli import main; main()")


def test_help_lists_the_commands() -> None:
    done = cli("--help")
    assert done.returncode == 0
    assert re.findall(r"^  (\w+)  ", done.stdout, flags=re.MULTILINE) == [
        "ablate", "agree", "calibrate", "compare", "corpus", "edit", "generate", "methods", "rerank", "score",
        "scorers", "serve", "tune",
    ]  # fmt: skip


def test_methods_json_is_the_registry() -> None:
    listed = json.loads(cli("methods", "--json").stdout)
    assert [entry["name"] for entry in listed] == list(methods())
    assert all(entry["summary"] and entry["paper"] and entry["unit"] for entry in listed)


def test_the_readme_table_is_the_registry() -> None:
    done = run("scripts/tables", "--check")
    assert done.returncode == 0, done.stderr


def test_the_changelog_is_at_the_version() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == sparing.__version__


def test_documents_are_short_and_name_no_machine() -> None:
    for name, limit in (("README.md", 150), ("DESIGN.md", 200), ("CONTRIBUTING.md", 150)):
        text = (ROOT / name).read_text("utf-8")
        assert text.count("\n") <= limit, f"{name} has more than {limit} lines"
        assert not re.search(r"/work/|/root/|/home/", text), name
