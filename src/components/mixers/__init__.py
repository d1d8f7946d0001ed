"""Sequence mixers: one file each, all to the contract of ``base.py``."""
