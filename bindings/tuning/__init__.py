"""`hftcore tune`: the smallest dose of a defence that repairs a model."""
