"""The models that come with the package: one tiny language model, trained by us, that really retrieves."""

from __future__ import annotations

from pathlib import Path

# Folder of the bundled model, in the layout of Hugging Face transformers.
BUNDLED = Path(__file__).parent / "bundled"


def resolve(name_or_path: str) -> str:
    """Return what `from_pretrained` needs: the folder for the name "bundled", anything else unchanged."""
    return str(BUNDLED) if name_or_path == "bundled" else name_or_path
