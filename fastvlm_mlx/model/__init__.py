"""Arrays in, arrays out: the FastVLM network. Knows no files and no text."""
