"""EleutherAI's lm-evaluation-harness: a model type `sparing` for its command, and its tasks for `sparing compare`.

Everything here needs the extra `sparing[lm-eval]`. The harness's own package is called `lm_eval` as well; all imports
are absolute, so `import lm_eval` is always the harness.
"""
