"""Data: from the name of a data set to the batch of each step."""
