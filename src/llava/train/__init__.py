"""Learning: recipes, the loop, state that resumes."""
