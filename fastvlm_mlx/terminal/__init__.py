"""The chat terminal: a line to type in, answers as they come, one thread that owns the model."""
