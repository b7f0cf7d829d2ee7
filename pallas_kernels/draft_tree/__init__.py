"""The likeliest paths through a block, as a tree."""
