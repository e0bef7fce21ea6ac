"""KV-cache eviction: which stored tokens stay."""
