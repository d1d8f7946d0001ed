class CorpusError(ValueError):
    """A corpus that cannot be read, split, tokenised or cut into windows; the message says what would work."""
