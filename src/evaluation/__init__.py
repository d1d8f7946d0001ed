"""Scorers: what is measured on evaluation windows."""
