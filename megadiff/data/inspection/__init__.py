"""Looking into data sets: verification, statistics, sheets of samples."""
