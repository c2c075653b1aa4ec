"""What the train loop trains: each phase puts together data, model and evaluation."""
