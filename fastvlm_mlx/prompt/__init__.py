"""People to arrays: pictures to uint8 pixels, messages to token ids. Knows no mlx."""
