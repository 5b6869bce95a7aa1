"""Generated from proto/spa/v1 by `make proto`."""
