"""From nothing to an assistant that sees, in minutes: drawn scenes, two tiny bases, two training stages, a report."""
