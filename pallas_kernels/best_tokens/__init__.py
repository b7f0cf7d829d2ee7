"""The few largest of many logits."""
