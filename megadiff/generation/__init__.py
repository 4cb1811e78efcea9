"""From what is asked for to samples in a folder."""
