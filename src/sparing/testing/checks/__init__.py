"""The contract checks, one function each; see `sparing.testing.contract` for the list and the runner."""
