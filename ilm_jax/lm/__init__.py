"""Language models from elsewhere: readers of foreign formats, and what they are called there."""
