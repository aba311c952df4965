"""Checkpoints from a hub (Hugging Face, a mirror of it, ModelScope) to whole folders under storage/models."""
