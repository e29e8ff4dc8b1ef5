"""Text to tokens and back: sources and tokenizers, `prepare` (text to MDS shards) and the stream a run reads."""
