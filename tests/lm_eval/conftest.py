"""The harness without a network, on the bundled model."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval", reason="the extra sparing[lm-eval] is not installed")
pytest.importorskip("accelerate", reason="the extra sparing[lm-eval] is not installed")


@pytest.fixture(scope="session", autouse=True)
def no_download(tmp_path_factory):
    """Importing the harness's generators downloads sentence boundaries unless they are there; ours need none."""
    import nltk

    folder = tmp_path_factory.mktemp("nltk")
    (folder / "tokenizers" / "punkt_tab").mkdir(parents=True)
    nltk.data.path.insert(0, str(folder))
    yield folder
    nltk.data.path.remove(str(folder))
