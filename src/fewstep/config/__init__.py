"""Recipes: their sections, loading, and the YAML files that ship."""
