"""Settings: gin files and flags become the arguments of a command, each known by its place."""
