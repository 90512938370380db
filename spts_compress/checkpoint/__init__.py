"""A model's folder, a base or an export: its files, whether it loads, what its answers depend on."""
