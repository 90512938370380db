"""The finished checkpoint: written, described, verified, stripped, published."""
