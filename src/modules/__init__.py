"""LightningModules: loss, optimizer, and what is logged."""
