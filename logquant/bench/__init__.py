"""Measurements of speed and memory, all contenders in one run."""
