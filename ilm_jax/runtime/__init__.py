"""What any long program needs: devices, processes, progress, curves, whole directories."""
