"""A pass and a target for fraqat_compiler."""
