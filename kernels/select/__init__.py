"""Choose, move and merge cached tokens: one folder per operation."""
