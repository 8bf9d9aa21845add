"""Command line and process launching: everything that runs before a worker does."""
