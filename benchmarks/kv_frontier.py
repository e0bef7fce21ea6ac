"""Every KV method on the bundled model: score against bytes held, average and worst task, both modes, several seeds."""

from __future__ import annotations

from frontier import Cost, options, rows, write_down

from sparing.core.method import methods

TASKS = "needle_single,needle_multikey,kv_retrieval,perplexity"


def main() -> None:
    """Measure and write down."""
    # SpecKV needs a draft model.
    known = methods().items()
    names = [name for name, info in known if info.family == "kv_cache" and not info.needs_draft]
    given = options("kv_frontier", [*names, "adakv(bits=4)", "kvzip(bits=4)"], __doc__)
    cost = Cost("share", "bytes", "share of cache bytes held")
    write_down("kv_frontier", "KV methods: score against bytes held", rows(given, TASKS), given.seeds, cost)


if __name__ == "__main__":
    main()
