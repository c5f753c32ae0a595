"""Functions that return a whole run, and their parts."""
