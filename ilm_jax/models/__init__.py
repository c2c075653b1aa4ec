"""What is trained: phase 1 (item_text) and the losses."""
