"""Pictures for people: sheets and plots; a leaf."""
