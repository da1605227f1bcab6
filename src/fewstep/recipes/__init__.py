"""Recipes: the YAML files that ship, and the schema they are checked against."""
