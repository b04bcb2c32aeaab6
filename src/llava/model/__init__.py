"""The network: vision tower, projector, language model."""
