"""`python -m sparing.lm_eval`: the harness's command `lm_eval`, with all its arguments, which knows `--model sparing`.

Versions of the harness that look for models in other packages find ours by its entry point, and their own command will
do. Up to 0.4.13 they know their own models only; this command names ours first and then hands over.
"""

from __future__ import annotations

import sys

from sparing.errors import MissingExtraError, SparingError


def main() -> None:
    """Run the harness's command; errors made on purpose are one line on standard error and exit code 2.

    Raises:
        SystemExit: after such an error, and where the harness ends so.
    """
    try:
        _register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except SparingError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


def _register() -> None:
    """Name the model type where the harness looks for it; it is imported when it is asked for."""
    try:
        import lm_eval.models  # noqa: F401  (its own models must be there first: it looks for them in an empty list only)
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise MissingExtraError("lm-evaluation-harness", "lm-eval") from error
    if "sparing" not in model_registry:
        model_registry.register("sparing", target="sparing.lm_eval.model:SparingLM")


if __name__ == "__main__":
    main()
