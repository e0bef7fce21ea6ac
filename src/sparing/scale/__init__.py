"""The same work in this process or on a Ray cluster."""
