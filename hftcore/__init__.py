"""hftcore."""
