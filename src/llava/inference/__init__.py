"""Answering: token ids in, token ids out."""
