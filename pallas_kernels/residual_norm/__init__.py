"""The residual stream with what a layer adds to it, and its RMSNorm."""
