"""Eviction: which tokens are dropped as they leave the window, instead of being packed."""
