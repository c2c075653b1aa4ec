"""What is measured of a run, and its reports."""
