"""What the user sets, and what is refused at start."""
