"""The defences' update rules, as pure PyTorch."""
