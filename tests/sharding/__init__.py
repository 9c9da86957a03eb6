"""Sharded parameters, on two processes of one machine."""
