"""From interactions and texts of others to a prepared data set."""
