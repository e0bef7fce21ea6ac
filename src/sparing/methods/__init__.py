"""One file per published method; importing this package's modules registers them."""
