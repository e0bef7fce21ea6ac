"""One file per paper: how a prompt is read."""
