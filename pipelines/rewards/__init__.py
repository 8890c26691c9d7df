"""Rewards: the protocol (base.py) and one file per reward."""
