"""Rows of paged pools that move to the front of their block."""
