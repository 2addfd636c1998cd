"""Where datasets come from: one file a source, each a `Source` that the catalogue names."""
