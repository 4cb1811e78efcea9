"""megadiff: a production trainer for one network that diffuses several modalities, each on its own clock."""

__version__ = "0.1.0"
