"""Files to weights: recognise a checkpoint's layout, rename, fold, load. Knows no text."""
