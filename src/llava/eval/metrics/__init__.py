"""Scorers that several tasks share."""
