"""Sequences, the scheduler, the KV budget and the prefix index."""
