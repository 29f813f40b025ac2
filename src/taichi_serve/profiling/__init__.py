"""Measuring an engine step by step: which steps, how, what was measured so far, and the profile of it."""
