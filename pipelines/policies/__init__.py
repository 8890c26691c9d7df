"""Policies: the protocol (base.py) and one file per model family."""
