"""The generation loop: prefill, decode, sampling, beam search, caches. Knows no files."""
