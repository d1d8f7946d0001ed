"""The story of a run: check, assemble, fit, test, write down."""
