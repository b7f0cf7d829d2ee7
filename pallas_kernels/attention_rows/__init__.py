"""From a projection to what attention reads: queries, and keys and values in their pages."""
