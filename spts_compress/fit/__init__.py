"""What is fitted offline, a layer at a time."""
