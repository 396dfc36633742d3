"""`hftcore antidote BASE --adapters ...`: many adapters of one base model, which is loaded once."""
