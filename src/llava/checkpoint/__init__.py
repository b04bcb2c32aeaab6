"""Model folders on disk: open, save, convert."""
