"""Measuring: the family's benchmarks, asked with their own prompts and scored by their own rules."""
