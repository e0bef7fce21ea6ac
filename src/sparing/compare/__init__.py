"""Comparing methods: the sweep, its store on disk, the table and the report."""
