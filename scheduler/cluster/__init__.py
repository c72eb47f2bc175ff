"""What runs on Ray. The only package that imports ray."""
