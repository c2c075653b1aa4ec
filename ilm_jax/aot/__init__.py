"""Programs of a training job, compiled for a TPU topology without a TPU, and what they cost."""
