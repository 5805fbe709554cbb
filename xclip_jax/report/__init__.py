"""What a run leaves for people to look at: one picture, and one page."""
