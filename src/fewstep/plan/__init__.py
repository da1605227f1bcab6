"""What a training needs, before any weight is loaded."""
